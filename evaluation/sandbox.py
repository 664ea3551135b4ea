"""Runs a program that nobody has read: for a limited time, in limited memory, away from the network where Linux can.

This is a limit and not a wall: the program runs as this user and may read, and remove, what this user may. Run it where
nothing is lost with the machine, as in a container.
"""

import contextlib
import functools
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass

# The child takes its limits upon itself before it reads the program; hard limits cannot be raised again.
CHILD = """
import resource, sys
nonce, seconds, size = sys.stdin.readline().strip(), int(sys.argv[1]), int(sys.argv[2])
limits = {"CPU": 2 * seconds, "AS": size, "FSIZE": 1 << 20, "CORE": 0, "NOFILE": 64}
for name, most in limits.items():
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (most, most))
with open("program.py") as file:
    source = file.read()
exec(compile(source, "program.py", "exec"), {"__name__": "__main__"})
sys.__stdout__.write(nonce)
"""
OUTPUT = 1 << 16  # bytes of the error that are looked at


@dataclass(frozen=True)
class Limits:
    """How many seconds and megabytes a program may take before it is ended."""

    seconds: int = 10
    megabytes: int = 1024


LIMITS = Limits()


def run_program(source: str, limits: Limits = LIMITS) -> str:
    """How a program ends: passed (it came to its end), timed out, or failed: with its last line."""
    nonce = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="isomesh-program-") as folder, tempfile.TemporaryFile() as out:
        with open(os.path.join(folder, "program.py"), "w", encoding="utf-8", errors="replace") as file:
            file.write(source)
        command = [*_apart(), sys.executable, "-I", "-c", CHILD, str(limits.seconds), str(limits.megabytes << 20)]
        process = subprocess.Popen(
            command, cwd=folder, stdin=subprocess.PIPE, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            env={"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8"},
        )  # fmt: skip
        try:
            process.communicate(f"{nonce}\n".encode(), timeout=limits.seconds)
        except subprocess.TimeoutExpired:
            return "timed out"
        finally:
            _end(process)
        out.seek(0, os.SEEK_END)
        out.seek(max(0, out.tell() - OUTPUT))
        text = out.read().decode("utf-8", "replace")
    if process.returncode == 0 and text.endswith(nonce):
        return "passed"
    lines = text.strip().splitlines() or [f"it left with {process.returncode} before its end"]
    return f"failed: {lines[-1][:200]}"


def _end(process: subprocess.Popen) -> None:
    """Ends the program with all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@functools.cache
def _apart() -> tuple[str, ...]:
    """What gives a program its own network, which is empty, and its own processes, which end with it; () if nothing."""
    command = ("unshare", "--user", "--map-root-user", "--net", "--pid", "--fork", "--kill-child")
    if shutil.which("unshare") is None:
        return ()
    tried = subprocess.run([*command, "true"], capture_output=True, check=False)
    return command if tried.returncode == 0 else ()
