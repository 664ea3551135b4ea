"""Processes of tests of access: servers, a real Postgres, and how to end them."""

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from runtime.ports import free_port

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests" / "serving"


def environment(**more: str) -> dict[str, str]:
    """Of a process that uses the project and the doubles."""
    return {**os.environ, "PYTHONPATH": f"{ROOT}:{TESTS}", "PYTHONUNBUFFERED": "1", **more}


@contextlib.contextmanager
def server(log: Path, *words: str, **env: str) -> Iterator[subprocess.Popen]:
    """A guarded server over the double; `address` is where it listens, `said` all that it has written."""
    command = [sys.executable, str(TESTS / "guarded_server.py"), str(log.parent), "--port", "0", *words]
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT, env=environment(**env), start_new_session=True
        )
    process.said = lambda: log.read_text(errors="replace")
    try:
        deadline = time.monotonic() + 90
        while not any(line.startswith("http") for line in process.said().splitlines()):
            assert process.poll() is None, process.said()
            assert time.monotonic() < deadline, process.said()
            time.sleep(0.05)
        process.address = next(line for line in process.said().splitlines() if line.startswith("http"))
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class Postgres:
    """A database server, run by the user `postgres`, since it refuses to be run by root."""

    def __init__(self):
        self.bin = max(Path("/usr/lib/postgresql").glob("*/bin"))
        self.user = pwd.getpwnam("postgres")
        self.folder, self.port = Path(tempfile.mkdtemp(prefix="isomesh-pg-")), free_port()
        password = self.folder / "password"
        password.write_text("planted-pw-3141\n")
        for path in (self.folder, password):
            os.chown(path, self.user.pw_uid, self.user.pw_gid)
        self._run("initdb", "-D", self.folder / "data", "-U", "mesh", "--auth=scram-sha-256", f"--pwfile={password}")
        self.address = f"postgresql://mesh:planted-pw-3141@127.0.0.1:{self.port}/postgres"
        self.start()

    def _run(self, program: str, *words) -> None:
        done = subprocess.run(
            [str(self.bin / program), *map(str, words)],
            user=self.user.pw_uid, group=self.user.pw_gid, cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr.decode()

    def close(self) -> None:
        """Ends it, and removes what it has written."""
        self.stop()
        shutil.rmtree(self.folder)

    def start(self) -> None:
        """Listens on loopback."""
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={self.folder}"
        self._run("pg_ctl", "-D", self.folder / "data", "-l", self.folder / "log", "-w", "-o", options, "start")

    def stop(self, mode: str = "immediate") -> None:
        """As by kill -9: what is committed is there afterwards."""
        self._run("pg_ctl", "-D", self.folder / "data", "-m", mode, "-w", "stop")
