"""The documents that perplexity is taken of, as tokens: a run's held-out ones, a prepared corpus, text files."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from config.schema import Config
from data.corpus import DataConfig, documents
from data.shards import prepare
from data.token_files import Mapped, Tokens
from data.tokenizer import Tokenizer
from evaluation.options import HELDOUT, PERPLEXITY
from evaluation.perplexity import Stream, Texts

CHUNK = 1 << 22  # characters of text that are tokenised at a time


@dataclass(frozen=True)
class Source:
    """Documents, what they are called wherever they lie, and a digest of what they hold."""

    name: str
    stream: Stream
    digest: str


def open_source(task: str, config: Config, tokenizer: Tokenizer, *, split: str, limit: int | None) -> Source:
    """The source of a `perplexity:` task. Raises ValueError for one that is not there, or of other tokens."""
    place = task.removeprefix(PERPLEXITY)
    if place == HELDOUT:
        dataset = prepare(config.data, config.tokenizer)
        return Source(task, _as_stream(dataset.heldout, tokenizer.eos_id), dataset.digest)
    path = Path(place).expanduser()
    if (path / "index.json").is_file():
        return _prepared(path, tokenizer, split)
    return _text(place, tokenizer, limit)


def _as_stream(tokens, eos_id: int) -> Tokens:
    if isinstance(tokens, Tokens):
        return tokens
    return Tokens.of([tokens], [np.flatnonzero(np.asarray(tokens) == eos_id) + 1])


def _prepared(folder: Path, tokenizer: Tokenizer, split: str) -> Source:
    try:
        index = json.loads((folder / "index.json").read_text())
        shards = [shard for shard in index["shards"] if shard["split"] == split]
        parts = [
            Mapped(folder / f"{shard['name']}.bin", index["dtype"], shard["tokens"], shard["documents"], shard["bytes"])
            for shard in shards
        ]
        tokenizer_digest, digest = index["tokenizer_digest"], index["digest"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'index.json'} is damaged: {type(error).__name__} {error}") from error
    if tokenizer_digest != tokenizer.digest:
        raise ValueError(
            f"{folder} was prepared with another tokenizer ({tokenizer_digest[:12]}) than the model's "
            f"({tokenizer.digest[:12]}): give its text, or prepare it with the model's tokenizer"
        )
    if not parts:
        raise ValueError(f"{folder} has no shard of the split {split}; choose another --split")
    return Source(f"{PERPLEXITY}{folder.name}", Tokens(parts, index["dtype"]), f"{digest} {split}")


def _text(place: str, tokenizer: Tokenizer, limit: int | None) -> Source:
    """Text files; of those with a limit only as many documents are read."""
    found, chunk, size, digest = [], [], 0, hashlib.sha256()
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
