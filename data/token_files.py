"""The tokens of a split as one stream, however many files they lie in: memory-mapped, so that nothing is read early."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np


class Part(Protocol):
    """One piece of a stream: a shard of a corpus, or an array."""

    tokens: int
    documents: int
    bytes: int | None  # of text

    def array(self) -> np.ndarray:
        """Its tokens: 1-D, read-only, perhaps memory-mapped."""

    def ends(self) -> np.ndarray:
        """Where each of its documents ends, counted from its own start: int64 of (documents,), increasing."""


@dataclass(frozen=True, eq=False)
class Held:
    """A part in memory. An array without ends is one document."""

    held: np.ndarray
    held_ends: np.ndarray
    bytes: int | None = None

    @property
    def tokens(self) -> int:
        """How many tokens it has."""
        return len(self.held)

    @property
    def documents(self) -> int:
        """How many documents it has."""
        return len(self.held_ends)

    def array(self) -> np.ndarray:
        """Its tokens."""
        return self.held

    def ends(self) -> np.ndarray:
        """Where its documents end."""
        return self.held_ends


class Mapped:
    """A part in two files: NAME.bin with the tokens, NAME.ends.npy with the ends of its documents."""

    def __init__(self, path: Path, dtype: str, tokens: int, documents: int, bytes: int | None = None):
        self.path, self.dtype, self.tokens, self.documents, self.bytes = path, dtype, tokens, documents, bytes
        self._array: np.ndarray | None = None

    def array(self) -> np.ndarray:
        """Its tokens, memory-mapped. Raises OSError or ValueError where the file is gone or shorter than it was."""
        if self._array is None:
            self._array = mapped(self.path, self.dtype, self.tokens)
        return self._array

    def ends(self) -> np.ndarray:
        """Where its documents end."""
        return np.load(ends_file(self.path))

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_array": None}  # a copy maps the file anew


def mapped(path: Path, dtype: str, tokens: int) -> np.ndarray:
    """The tokens of a file, (tokens,), as a plain read-only array over the mapped memory: indexing a memmap is slow.

    Raises OSError or ValueError where the file is gone or shorter.
    """
    if tokens == 0:
        return np.empty(0, dtype)  # an empty file cannot be mapped
    return np.asarray(np.memmap(path, dtype, mode="r", shape=(tokens,)))


def ends_file(path: Path) -> Path:
    """NAME.ends.npy of a NAME.bin."""
    return path.with_suffix(".ends.npy")


class Tokens:
    """The documents of one split, each ended by its end-of-document token, as one stream over all parts.

    Pickles cheaply: a copy opens the files anew. Reading is safe in several threads.
    """

    def __init__(self, parts: list[Part], dtype: np.dtype | str):
        self.parts = [part for part in parts if part.tokens]
        self.dtype = np.dtype(dtype)
        self._borders = np.cumsum([0, *(part.tokens for part in self.parts)], dtype=np.int64)

    @staticmethod
    def of(arrays: list[np.ndarray], ends: list[np.ndarray] | None = None) -> "Tokens":
        """A stream of arrays in memory. ends: where the documents of each end in it; without, each is one document."""
        ends = [np.array([len(array)]) for array in arrays] if ends is None else ends
        held = [Held(np.asarray(array), np.asarray(e, np.int64)) for array, e in zip(arrays, ends, strict=True)]
        return Tokens(held, np.result_type(*(part.held for part in held)) if held else np.int32)

    @property
    def total(self) -> int:
        """How many tokens there are, ends of documents included."""
        return int(self._borders[-1])

    def __len__(self) -> int:
        return self.total

    @property
    def documents(self) -> int:
        """How many documents there are."""
        return sum(part.documents for part in self.parts)

    @property
    def bytes(self) -> int | None:
        """Bytes of the text that the tokens stand for; None where that is not known of some part."""
        counts = [part.bytes for part in self.parts]
        return None if None in counts else sum(counts)

    @cached_property
    def ends_N(self) -> np.ndarray:
        """Where each document ends in the stream, one past its end-of-document token: int64, increasing."""
        ends = [part.ends() + border for part, border in zip(self.parts, self._borders, strict=False)]
        return np.concatenate(ends).astype(np.int64) if ends else np.empty(0, np.int64)

    def read(self, starts: np.ndarray, count: int) -> np.ndarray:
        """Windows of the stream, wherever its files begin: (len(starts), count) tokens of `dtype`.

        Raises IndexError for a window that is not inside the stream.
        """
        starts = np.asarray(starts, np.int64)
        result = np.empty((len(starts), count), self.dtype)
        if not result.size:
            return result
        if starts.min() < 0 or starts.max() + count > self.total:
            raise IndexError(f"a window of {count:,} tokens is not inside a stream of {self.total:,}")
        first = np.searchsorted(self._borders, starts, side="right") - 1
        inside = starts + count <= self._borders[first + 1]
        for number in np.unique(first[inside]):
            rows = np.flatnonzero(inside & (first == number))
            windows = np.lib.stride_tricks.sliding_window_view(self.parts[number].array(), count)
            result[rows] = windows[starts[rows] - self._borders[number]]
        for row in np.flatnonzero(~inside):
            result[row] = self._across(int(starts[row]), int(starts[row]) + count, int(first[row]))
        return result

    def slice(self, start: int, stop: int) -> np.ndarray:
        """The tokens [start, stop) of the stream, copied. Raises IndexError where that is not inside the stream."""
        return self.read(np.array([start]), stop - start)[0]

    def _across(self, start: int, stop: int, number: int) -> np.ndarray:
        pieces = []
        while start < stop:
            border, after = int(self._borders[number]), int(self._borders[number + 1])
            pieces.append(self.parts[number].array()[start - border : min(stop, after) - border])
            start, number = min(stop, after), number + 1
        return np.concatenate(pieces)
