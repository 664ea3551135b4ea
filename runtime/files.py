"""Files and folders that come to be whole or not at all, and errors of the file system that name their file."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from runtime import leave


@contextlib.contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """An OSError inside that names no file, as that of a full disk while writing, names this one."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def replace_text(path: Path, text: str) -> None:
    """Replaces a file at once, so that no reader sees half of it, and a failure leaves what was there."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with naming(path):
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def folder_made(folder: Path) -> Iterator[Path]:
    """A hidden folder beside, which gets its name when all that is inside has gone well; else nothing is left of it.

    Of a process that is killed it stays. Raises ValueError where something has the name meanwhile.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    with _named_at_last(beside, folder, "folder", lambda: shutil.rmtree(beside, ignore_errors=True)):
        yield beside
        os.chmod(beside, 0o755)


@contextlib.contextmanager
def file_made(path: Path) -> Iterator[Path]:
    """As `folder_made`, a file: the name to write to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}-{os.getpid()}")
    with _named_at_last(beside, path, "name", lambda: beside.unlink(missing_ok=True)):
        yield beside


@contextlib.contextmanager
def _named_at_last(beside: Path, path: Path, what: str, clear: Callable[[], None]) -> Iterator[None]:
    try:
        with leave.on_leaving(clear):
            yield
            if path.exists():
                raise ValueError(f"{path} is there already: choose another {what}")
            beside.rename(path)
    except BaseException:
        clear()
        raise
