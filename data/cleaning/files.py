"""The files that cleaning writes: one JSON line a document."""

import hashlib
import io
import json
import os
from array import array
from pathlib import Path

LEVEL = 3  # of zstd


class Kept:
    """The documents that are kept, as they are written; any of them can be read back by its number."""

    def __init__(self, path: Path):
        self._file = path.open("w+b")
        self._ends = array("Q")  # where each document ends
        self._written = 0  # bytes that are not in a buffer any more

    def __len__(self) -> int:
        return len(self._ends)

    def add(self, name: str, text: str) -> None:
        """Writes a document behind the others; its number is how many there were before."""
        line = json_line({"id": name, "text": text})
        self._file.write(line)
        self._ends.append(self._begin(len(self._ends)) + len(line))

    def read(self, number: int) -> dict:
        """The `id` and the `text` of a document."""
        start, end = self._begin(number), self._ends[number]
        if end > self._written:
            self._file.flush()
            self._written = self._begin(len(self._ends))
        return json.loads(os.pread(self._file.fileno(), end - start, start))

    def _begin(self, number: int) -> int:
        return self._ends[number - 1] if number else 0

    def close(self) -> None:
        """Ends the file; it is on the disk then."""
        end(self._file)


def json_line(record: dict) -> bytes:
    """A record on a line of its own; half a surrogate pair, which a file's name may hold, is spelled as JSON does."""
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def end(file: io.BufferedIOBase) -> None:
    """Closes a file once it is on the disk."""
    file.flush()
    os.fsync(file.fileno())
    file.close()


def compress(path: Path) -> Path:
    """The file as .zst, in its place; the same content gives the same bytes."""
    import zstandard

    compressed = path.with_name(f"{path.name}.zst")
    with path.open("rb") as source, compressed.open("wb") as target:
        zstandard.ZstdCompressor(level=LEVEL).copy_stream(source, target, size=path.stat().st_size)
        target.flush()
        os.fsync(target.fileno())
    path.unlink()
    return compressed


def digest(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
