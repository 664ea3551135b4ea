"""Writes a prepared corpus into a folder, shard by shard, and goes on after the last whole shard when it was killed.

A journal beside the shards has a line for each that is on the disk for good, with the place in the source where the
next one begins. What is written does not depend on how many processes tokenise, nor on how often it was interrupted.
"""

import contextlib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.card import LENGTHS, SAMPLES, category, write_card
from data.corpus import DataConfig, Document, Item, split
from data.encoding import MANY_CORES, Encoded, chunk_encoder
from data.prepared import FORMAT, INDEX, SPLITS, TOKENIZER, Progress, bin_file, digest_of, totals
from data.processes import in_order
from data.token_files import ends_file
from data.tokenizer import ByteTokenizer, Tokenizer, TokenizerConfig, load_tokenizer, train
from runtime.files import naming, replace_text

CHUNK = 1 << 20  # characters of text that are tokenised at a time
SHARD_TOKENS = 1 << 25
JOURNAL = "journal.jsonl"


@dataclass(frozen=True)
class Job:
    """What decides a corpus, and how it is written: a `Journal` goes on with the same settings only."""

    settings: str  # digest of the source's content and of what decides the tokens
    total: int  # bytes of the source's files
    shard_tokens: int = SHARD_TOKENS  # a shard ends with the chunk that reaches so many
    workers: int = 1  # processes that tokenise; 1: this one
    skip_bad: bool = False


@dataclass(frozen=True)
class Place:
    """Where in a source the next shard begins."""

    file: int = 0
    within: int = 0  # items of that file that were read
    items: int = 0  # and of all files


def write_corpus(
    folder: Path,
    data: DataConfig,
    config: TokenizerConfig,
    ready: Tokenizer | None,
    job: Job,
    progress: Progress,
    on_shard: Callable[[dict], None] = lambda shard: None,
) -> dict:
    """Prepares a source into `folder`, after what is there already; returns the index, which is written last.

    ready: the tokenizer, unless it is to be trained. on_shard: called with each shard that is whole, also with those
    that an earlier process made. Raises ValueError for a source that cannot be read or a folder of another job.
    """
    journal = Journal(folder, job)
    shards = [shard for line in journal.lines for shard in line["shards"]]
    for shard in shards:
        on_shard(shard)
    tokenizer = _tokenizer(folder, data, config, ready, job, progress)
    dtype = "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"
    texts = _from(journal.place, data, tokenizer, job)
    writing = Shards(folder, dtype, len(journal.lines), journal.place)
    chunks = _chunks(texts, min(CHUNK, job.shard_tokens))
    alone = job.workers > 1 or (os.cpu_count() or 1) < MANY_CORES
    progress("tokenizing", journal.read, job.total)
    for chunk, encoded in in_order(chunks, job.workers, chunk_encoder, config, folder / TOKENIZER, dtype, alone):
        writing.add(chunk, encoded)
        progress("tokenizing", writing.read, job.total)
        if writing.tokens >= job.shard_tokens:
            shards += journal.commit(writing, on_shard)
    if writing.place != journal.place:
        shards += journal.commit(writing, on_shard)
    progress("tokenizing", job.total, job.total)
    index = {
        "format": FORMAT,
        "dtype": dtype,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "tokenizer": "bytes" if isinstance(tokenizer, ByteTokenizer) else "json",
        "tokenizer_digest": tokenizer.digest,
        "heldout": data.heldout,
        "settings": job.settings,
        "splits": totals(shards),
        "shards": shards,
    }
    index["digest"] = digest_of(index)
    write_card(folder, index, journal.lines, data)
    replace_text(folder / INDEX, json.dumps(index, indent=1))
    journal.path.unlink()
    return index


def _tokenizer(
    folder: Path, data: DataConfig, config: TokenizerConfig, ready: Tokenizer | None, job: Job, progress: Progress
) -> Tokenizer:
    """The tokenizer, trained if it has to be, and saved."""
    if ready is None and (folder / TOKENIZER).exists():
        return load_tokenizer(config, folder / TOKENIZER)  # trained before the job was interrupted
    if ready is None:
        texts = _reported(split(data, None, skip_bad=job.skip_bad), "training the tokenizer", job.total, progress)
        ready = train(config, (item.text for item, heldout in texts if isinstance(item, Document) and not heldout))
    ready.save(folder / TOKENIZER)
    return ready


def _reported(
    texts: Iterator[tuple[Item, bool]], what: str, total: int, progress: Progress
) -> Iterator[tuple[Item, bool]]:
    progress(what, 0, total)
    shown = 0
    for item, heldout in texts:
        yield item, heldout
        if item.read - shown >= total // 200:  # a bar needs no more, and a call may cost more than a document
            shown = item.read
            progress(what, shown, total)
    progress(what, total, total)


def _from(place: Place, data: DataConfig, tokenizer: Tokenizer, job: Job) -> Iterator[tuple[Item, bool]]:
    """The items of a source from a place on. Whole files before it are not even opened."""
    return split(data, tokenizer, skip_bad=job.skip_bad, first=place.file, skip=(place.within, place.items))


def _chunks(texts: Iterator[tuple[Item, bool]], limit: int) -> Iterator[list[tuple[Item, bool]]]:
    chunk, size = [], 0
    for item, heldout in texts:
        chunk.append((item, heldout))
        size += len(item.text) if isinstance(item, Document) else 0
        if size >= limit:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


# ---- shards ------------------------------------------------------------------------------------------------------


class _Shard:
    """A shard of one split that is being written."""

    def __init__(self, folder: Path, number: int, name: str):
        self.name, self.split = f"{name}-{number:05d}", name
        self.path = Path(folder, f"{self.name}.bin")
        self.file = self.path.open("wb")
        self.digest, self.tokens, self.bytes = hashlib.sha256(), 0, 0
        self.ends: list[np.ndarray] = []

    def add(self, tokens: np.ndarray, lengths: np.ndarray, size: int) -> None:
        content = tokens.tobytes()
        with naming(self.path):
            self.file.write(content)
        self.digest.update(content)
        self.ends.append(self.tokens + np.cumsum(lengths))
        self.tokens += len(tokens)
        self.bytes += size

    def finish(self) -> dict:
        """Puts both files on the disk for good; returns the shard's entry of the index."""
        ends = np.concatenate(self.ends).astype("<i8")
        with naming(self.path), self.file as file:
            file.flush()
            os.fsync(file.fileno())
        path = ends_file(self.path)
        with naming(path), path.open("wb") as file:
            np.save(file, ends)
            file.flush()
            os.fsync(file.fileno())
        return {
            "name": self.name,
            "split": self.split,
            "documents": len(ends),
            "tokens": self.tokens,
            "bytes": self.bytes,
            "digest": self.digest.hexdigest(),
            "ends_digest": hashlib.sha256(path.read_bytes()).hexdigest(),
        }


class Shards:
    """The shards that are being written, one of each split that has documents, and what is counted of them."""

    def __init__(self, folder: Path, dtype: str, number: int, place: Place):
        self._folder, self._dtype, self._number = folder, dtype, number
        self.place, self.read = place, 0
        self._begin()

    def _begin(self) -> None:
        self._open: dict[str, _Shard] = {}
        self.tokens = 0
        self._lengths = np.zeros((len(SPLITS), LENGTHS), np.int64)
        self._skipped: Counter[str] = Counter()
        self._samples: list[str] = []

    def add(self, chunk: list[tuple[Item, bool]], encoded: Encoded) -> None:
        """Writes the documents of a chunk, and counts what was skipped."""
        heldout = np.array([side for item, side in chunk if isinstance(item, Document)], bool)
        for side, name in enumerate(SPLITS):
            own = heldout == bool(side)
            if not own.any():
                continue
            if name not in self._open:
                self._open[name] = _Shard(self._folder, self._number, name)
            lengths = encoded.lengths[own]
            self._open[name].add(
                encoded.tokens[np.repeat(own, encoded.lengths)], lengths, int(encoded.bytes[own].sum())
            )
            self._lengths[side] += np.bincount(np.log2(lengths).astype(int), minlength=LENGTHS)
        self.tokens += len(encoded.tokens)
        for item, _ in chunk:
            self._count(item)

    def _count(self, item: Item) -> None:
        place = self.place
        within = place.within + 1 if item.file == place.file else 1
        self.place, self.read = Place(item.file, within, place.items + 1), max(self.read, item.read)
        if not isinstance(item, Document):
            self._skipped[category(item.reason)] += 1
            if item.bad and len(self._samples) < SAMPLES:
                self._samples.append(f"{item.name}: {item.reason}")

    def finish(self) -> dict:
        """Ends the shards; returns the journal's line about them."""
        line = {
            "shards": [self._open[name].finish() for name in SPLITS if name in self._open],
            "lengths": self._lengths.tolist(),
            "skipped": dict(self._skipped),
            "samples": self._samples,
            "place": [self.place.file, self.place.within, self.place.items],
            "read": self.read,
        }
        self._number += 1
        self._begin()
        return line


class Journal:
    """What a folder holds for good: a first line with the job, then a line for the shards of each number.

    A line that a kill tore off, or whose shards are gone, is dropped. Raises ValueError for a folder of another job.
    """

    def __init__(self, folder: Path, job: Job):
        self.path, self.lines = folder / JOURNAL, []
        first = {"format": FORMAT, "job": [job.settings, job.shard_tokens, job.skip_bad]}
        whole = self._read()
        if whole and whole[0] != first:
            raise ValueError(
                f"{folder} was begun from other files or with other settings: remove it, or give another name"
            )
        self.lines = [line for line in whole[1:] if self._is_whole(folder, line)]
        replace_text(self.path, "".join(json.dumps(line) + "\n" for line in [first, *self.lines]))

    def _read(self) -> list[dict]:
        whole = []
        with contextlib.suppress(FileNotFoundError):
            for line in self.path.read_text().splitlines():
                try:
                    whole.append(json.loads(line))
                except ValueError:  # the last one, which was being written
                    break
        return whole

    @staticmethod
    def _is_whole(folder: Path, line: dict) -> bool:
        """Whether its shards are there, or were moved on to a store; a power cut may have taken them."""
        missing = [shard for shard in line["shards"] if not bin_file(folder, shard).exists()]
        return not missing or all(Path(folder, f"{shard['name']}.uploaded").exists() for shard in missing)

    @property
    def place(self) -> Place:
        """Where the next shard begins."""
        return Place(*self.lines[-1]["place"]) if self.lines else Place()

    @property
    def read(self) -> int:
        """Bytes of the source that lie before it."""
        return self.lines[-1]["read"] if self.lines else 0

    def commit(self, writing: Shards, on_shard: Callable[[dict], None]) -> list[dict]:
        """Ends the shards that are being written, and notes them."""
        line = writing.finish()
        with naming(self.path), self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.lines.append(line)
        for shard in line["shards"]:
            on_shard(shard)
        return line["shards"]
