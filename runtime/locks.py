"""Locks between processes: files that the system unlocks when their holder ends, however it ends."""

import contextlib
import fcntl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO


class Locked(Exception):
    """Another process holds the lock."""


def acquire(file: IO, *, wait: bool = False, shared: bool = False) -> None:
    """Locks an open file. Raises Locked where another process holds it and this one shall not wait.

    Several processes may hold a shared lock at once, but none beside an exclusive one. Child processes that inherit
    the file hold the lock with their parent. A file system without locks raises OSError.
    """
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise Locked(file.name) from None


@contextlib.contextmanager
def locked(path: Path, *, on_wait: Callable[[], None] | None = None) -> Iterator[IO]:
    """Holds the lock of the file `path`, made for it. Where it is taken, waits after `on_wait()` or raises Locked."""
    with open(path, "w") as file:
        try:
            acquire(file)
        except Locked:
            if on_wait is None:
                raise
            on_wait()
            acquire(file, wait=True)
        yield file


def is_locked(path: Path) -> bool:
    """Whether a living process holds the lock of this file. No file, or a file system without locks: no."""
    try:
        with path.open("rb") as file:
            acquire(file, shared=True)
    except Locked:
        return True
    except OSError:
        return False
    return False
