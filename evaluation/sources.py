"""The documents that perplexity is taken of, as tokens: a run's held-out ones, a prepared corpus, text files."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.corpus import DataConfig, documents
from data.objects import exists, is_url, join
from data.opening import open_corpora
from data.prepared import INDEX
from data.shards import prepare
from data.tokenizer import Tokenizer
from evaluation.options import HELDOUT, PERPLEXITY
from evaluation.perplexity import Stream, Texts
from inference.opening import Found
from tracking.run_directory import RunDirectory

CHUNK = 1 << 22  # characters of text that are tokenised at a time


@dataclass(frozen=True)
class Source:
    """Documents, what they are called wherever they lie, and a digest of what they hold."""

    name: str
    stream: Stream
    digest: str


def open_sources(task: str, found: Found, *, split: str, limit: int | None) -> list[Source]:
    """The documents of a `perplexity:` task: one source, or each of the mixture that a run was trained on.

    Raises ValueError where there are none, or where they have other tokens than the model.
    """
    place = task.removeprefix(PERPLEXITY)
    if place == HELDOUT:
        return _heldout(task, found)
    folder = place if is_url(place) else str(Path(place).expanduser())
    if exists(join(folder, INDEX)) if is_url(place) else Path(folder, INDEX).is_file():
        return [_prepared(folder, found, split)]
    return [_text(place, found.tokenizer, limit)]


def _heldout(task: str, found: Found) -> list[Source]:
    if not RunDirectory(found.path).config.exists():
        raise ValueError(f"{task}: {found.path} is no run, and has no held-out documents; give perplexity:PATH")
    corpora = open_corpora(found.config.data, found.config.tokenizer)
    _require_same_tokens(f"the text of data.source={found.config.data.source}", corpora.tokenizer, found.tokenizer)
    several = len(corpora.by_name) > 1
    return [
        Source(f"{task}/{name}" if several else task, dataset.heldout, dataset.digest)
        for name, dataset in corpora.by_name.items()
    ]


def _prepared(folder: str, found: Found, split: str) -> Source:
    dataset = prepare(DataConfig(source="prepared", path=folder, cache=found.config.data.cache), found.config.tokenizer)
    _require_same_tokens(folder, dataset.tokenizer, found.tokenizer)
    stream = dataset.train if split == "train" else dataset.heldout
    if not len(stream):
        raise ValueError(f"{folder} has no document of the split {split}; choose another --split")
    return Source(f"{PERPLEXITY}{folder.rstrip('/').rpartition('/')[2]}", stream, f"{dataset.digest} {split}")


def _require_same_tokens(what: str, theirs: Tokenizer, ours: Tokenizer) -> None:
    if theirs.digest != ours.digest:
        raise ValueError(
            f"{what} has tokens of another tokenizer ({theirs.digest[:12]}) than the model's ({ours.digest[:12]}): "
            "give its text, or prepare it with the model's tokenizer"
        )


def _text(place: str, tokenizer: Tokenizer, limit: int | None) -> Source:
    """Text files; with a limit only as many documents are read."""
    found: list[np.ndarray] = []
    chunk, size, digest = [], 0, hashlib.sha256()
    for document in documents(DataConfig(source="text", path=place)):
        chunk.append(document.text)
        size += len(document.text)
        digest.update(hashlib.sha256(document.text.encode()).digest())
        if size >= CHUNK:
            found, chunk, size = found + tokenizer.encode_batch(chunk), [], 0
        if limit is not None and len(found) + len(chunk) >= limit:
            break
    found += tokenizer.encode_batch(chunk) if chunk else []
    if not found:
        raise ValueError(f"{place} has no text")
    name = Path(place).name if Path(place).is_file() else place.strip("/").replace("/", "_").replace("*", "x")
    return Source(f"{PERPLEXITY}{name}", Texts(found, tokenizer.eos_id), digest.hexdigest())
