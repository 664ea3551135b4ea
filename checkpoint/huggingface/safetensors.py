"""The safetensors format, read and written: a JSON header with each tensor's dtype, shape and place, then the bytes.

Nothing is trusted: lengths, names, shapes and dtypes are checked against the file before memory is taken, and tensors
are memory-mapped. Format: the README of github.com/huggingface/safetensors.
"""

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, Protocol

import ml_dtypes
import numpy as np

LARGEST_HEADER = 100_000_000  # bytes, as in the reference implementation
DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"


class Source(Protocol):
    """Named tensors in files, as arrays of the host. A name that is not there is a KeyError."""

    def names(self) -> set[str]:
        """The names of all tensors."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one, without reading it."""

    def dtype(self, name: str) -> np.dtype:
        """What it is stored as; float32 for what is stored in blocks of few bits."""

    def tensor(self, name: str) -> np.ndarray:
        """One, memory-mapped where that can be."""

    def files(self) -> list[Path]:
        """The files that hold them."""


class Safetensors:
    """The tensors of one file. Raises ValueError in one line for a file that is not whole or lies about its lengths."""

    def __init__(self, path: Path):
        self._path = Path(path)
        try:
            self._header, self._begin = _header(self._path)
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}") from None

    def names(self) -> set[str]:
        """The names in the header."""
        return set(self._header)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from the header."""
        return tuple(self._header[name]["shape"])

    def dtype(self, name: str) -> np.dtype:
        """What a tensor is stored as, from the header."""
        return np.dtype(DTYPES[self._header[name]["dtype"]])

    def tensor(self, name: str) -> np.ndarray:
        """One tensor, memory-mapped and read-only."""
        begin, end = self._header[name]["data_offsets"]
        if begin == end:
            return np.zeros(self.shape(name), self.dtype(name))
        raw = np.memmap(self._path, np.uint8, "r", self._begin + begin, (end - begin,))
        return raw.view(self.dtype(name)).reshape(self.shape(name))

    def files(self) -> list[Path]:
        """The one file."""
        return [self._path]


class Several:
    """The tensors of several sources, each in one of them. Raises ValueError for a name that two of them have."""

    def __init__(self, sources: Iterable[Source]):
        self._sources = list(sources)
        self._of = {}
        for source in self._sources:
            for name in source.names():
                if name in self._of:
                    raise ValueError(f"{name} is in {self._of[name].files()[0]} and in {source.files()[0]}")
                self._of[name] = source

    def names(self) -> set[str]:
        """The names of all sources."""
        return set(self._of)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from the source that has it."""
        return self._of[name].shape(name)

    def dtype(self, name: str) -> np.dtype:
        """What a tensor is stored as, from the source that has it."""
        return self._of[name].dtype(name)

    def tensor(self, name: str) -> np.ndarray:
        """A tensor of the source that has it."""
        return self._of[name].tensor(name)

    def files(self) -> list[Path]:
        """The files of all sources."""
        return [file for source in self._sources for file in source.files()]


def open_folder(folder: Path) -> Source | None:
    """The safetensors of a folder, in one file or in several; None if there are none. Raises ValueError."""
    index = folder / INDEX
    if not index.exists():
        single = folder / "model.safetensors"
        return Safetensors(single) if single.exists() else None
    try:
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: no weight_map in it ({type(error).__name__})") from None
    for name in files:
        if not isinstance(name, str) or name != os.path.basename(name):
            raise ValueError(f"{index}: {name!r} is no name of a file beside it")
        if not (folder / name).exists():
            raise ValueError(f"{index}: names {name}, which is not there")
    return Several(Safetensors(folder / name) for name in files)


def _header(path: Path) -> tuple[dict, int]:
    """The checked header, and where the tensors' bytes begin."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(LARGEST_HEADER, size - 8):
            raise ValueError(f"{path}: a header of {length:,} bytes in a file of {size:,}: damaged, or no safetensors")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError):
            raise ValueError(f"{path}: its header is not JSON: damaged, or no safetensors") from None
    if not isinstance(header, dict):
        raise ValueError(f"{path}: its header is no table of tensors")
    header.pop("__metadata__", None)
    for name, entry in header.items():
        _check_entry(path, name, entry, size - 8 - length)
    return header, 8 + length


def _check_entry(path: Path, name: str, entry, room: int) -> None:
    try:
        shape, (begin, end), dtype = entry["shape"], entry["data_offsets"], entry["dtype"]
        numbers = [*shape, begin, end]
        if not all(type(n) is int and n >= 0 for n in numbers):
            raise TypeError
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path}: {name[:80]!r} has no sound dtype, shape and data_offsets") from None
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{path}: {name[:80]!r} is {str(dtype)[:20]}, not one of {', '.join(DTYPES)}")
    needed = math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
    if end - begin != needed or end > room:
        raise ValueError(
            f"{path}: {name[:80]!r} of {dtype} {tuple(shape)} needs {needed:,} bytes, and its place is {begin:,} to "
            f"{end:,} of {room:,}: cut short or damaged"
        )


def write_header(file: BinaryIO, tensors: dict[str, tuple[np.dtype, tuple[int, ...]]]) -> None:
    """Writes the header for tensors whose bytes follow in this order."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * np.dtype(dtype).itemsize
        header[name] = {"dtype": NAMES[np.dtype(dtype)], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
