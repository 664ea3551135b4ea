"""The header of a GGUF file (llama.cpp's format): its metadata, and where each tensor lies.

Nothing is trusted: a length is compared with what is left of the file before anything is read, so that a file that lies
about its lengths ends in one line and takes no memory. Format: docs/gguf.md of github.com/ggml-org/ggml.
"""

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


class Tensor(NamedTuple):
    """The shape of a tensor in a file, how it is stored, and where."""

    shape: tuple[int, ...]  # the last dim is contiguous
    kind: int  # how its numbers are stored
    offset: int  # bytes from `Header.begin`


@dataclass(frozen=True)
class Header:
    """What stands before the tensors."""

    metadata: dict[str, Any]  # numbers, texts, and lists of them
    tensors: dict[str, Tensor]
    begin: int  # byte of the file at which the tensors begin


def read_header(path: Path) -> Header:
    """The header of a file. Raises ValueError in one line for a damaged one."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(data, path).header()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from error


class _Reader:
    def __init__(self, data: mmap.mmap, path: Path):
        self._data, self._path, self._at = data, path, 0

    def header(self) -> Header:
        if self._bytes(4) != b"GGUF":
            raise self._error("not a GGUF file")
        version = self._number("I")
        if version not in (2, 3):
            raise self._error(f"GGUF version {version}; versions 2 and 3 are read")
        count = self._count(8 + 4 + 4 + 8)
        metadata = self._metadata()
        tensors = dict(self._tensor() for _ in range(count))
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= 1 << 20:
            raise self._error(f"general.alignment={alignment!r}")
        return Header(metadata, tensors, -(-self._at // alignment) * alignment)

    def _tensor(self) -> tuple[str, Tensor]:
        name, dims = self._text(), self._number("I")
        if dims > 4:
            raise self._error(f"{name[:80]!r} has {dims} dims; there are 4 at most")
        shape = tuple(self._number("Q") for _ in range(dims))[::-1]
        return name, Tensor(shape, self._number("I"), self._number("Q"))

    def _metadata(self) -> dict[str, Any]:
        found = {}
        for _ in range(self._count(8 + 4 + 1)):
            key = self._text()
            if key in found:
                raise self._error(f"{key} is there twice")
            found[key] = self._value(self._number("I"))
        return found

    def _value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self._number(SCALARS[kind])
        if kind == STRING:
            return self._text()
        if kind != ARRAY:
            raise self._error(f"a value of the unknown type {kind}")
        kind = self._number("I")
        if kind == STRING:
            return [self._text() for _ in range(self._count(8))]
        if kind not in SCALARS:
            raise self._error(f"a list of values of type {kind}, which is not read")
        form = struct.Struct("<" + SCALARS[kind])
        count = self._count(form.size)
        return [value for (value,) in form.iter_unpack(self._bytes(count * form.size))]

    def _count(self, smallest: int) -> int:
        """How many values follow, of `smallest` bytes at least."""
        count, left = self._number("Q"), len(self._data) - self._at
        if count * smallest > left:
            raise self._error(f"says that {count:,} values follow, where {left:,} bytes are left")
        return count

    def _text(self) -> str:
        text = self._bytes(self._number("Q"))
        try:
            return text.decode()
        except UnicodeDecodeError:
            raise self._error("a text that is not UTF-8") from None

    def _number(self, form: str):
        form = struct.Struct("<" + form)
        return form.unpack(self._bytes(form.size))[0]

    def _bytes(self, count: int) -> bytes:
        left = len(self._data) - self._at
        if count > left:
            raise self._error(f"says that {count:,} bytes follow, where {left:,} are left")
        self._at += count
        return self._data[self._at - count : self._at]

    def _error(self, what: str) -> ValueError:
        return ValueError(f"{self._path}: {what} (at byte {self._at:,})")
