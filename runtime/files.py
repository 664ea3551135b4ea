"""Errors of the file system that name their file."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


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
