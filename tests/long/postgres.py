"""A Postgres of its own for tests: made, stopped and started again."""

import os
import pwd
import shutil
import subprocess
import tempfile
from pathlib import Path


class Postgres:
    """A database server at a port of loopback. As root it runs as the user postgres, who must exist."""

    def __init__(self, port: int):
        self.address = f"postgresql://postgres@127.0.0.1:{port}/postgres"
        self._programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))[-1]
        self._folder = Path(tempfile.mkdtemp(prefix="pg-"))
        self._user = "postgres" if os.getuid() == 0 else None
        if self._user:
            os.chown(self._folder, pwd.getpwnam(self._user).pw_uid, -1)
        self._data = self._folder / "data"
        self._run("initdb", "-A", "trust", "-U", "postgres", "--no-sync")
        self._options = (
            f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={self._folder} -c fsync=off"
        )

    def _run(self, program: str, *words: str) -> None:
        command = [self._programs / program, "-D", self._data, *words]
        subprocess.run(
            command, user=self._user, cwd=self._folder, check=True, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip

    def start(self) -> None:
        """Returns when it answers."""
        self._run("pg_ctl", "start", "-w", "-l", str(self._folder / "log"), "-o", self._options)

    def stop(self) -> None:
        """Ends it; connections are closed at once."""
        self._run("pg_ctl", "stop", "-m", "immediate")

    def __enter__(self) -> "Postgres":
        self.start()
        return self

    def __exit__(self, *exception) -> None:
        self.stop()
        shutil.rmtree(self._folder)
