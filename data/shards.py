"""Tokens prepared once: one memory-mapped stream per split, in a cache keyed by the source's content and the settings.

    <cache>/<digest>/   train.bin heldout.bin (little-endian uint16 or uint32)  tokenizer.json  meta.json
    <cache>/sources/    what each set of files held when last looked at, so that an unchanged source is not read again

An entry is written beside its place and renamed into it, whole or not at all; a lock lets one process at a time do so.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.corpus import DataConfig, Document, kind, source_files, split
from data.token_files import Tokens
from data.tokenizer import Tokenizer, TokenizerConfig, load_tokenizer, train_bpe
from runtime import leave
from runtime.locks import Locked, locked

FORMAT = 1  # raise it when the same source and settings would give other files
SPLITS = ("train", "heldout")
CHUNK = 1 << 22  # characters of text that are tokenized at a time
SETTLED_S = 2.0  # a file touched more recently may change again within the resolution of its timestamp

Progress = Callable[[str, int, int], None]  # what is done, bytes done, bytes in all


@dataclass(frozen=True, eq=False)
class Dataset:
    """Token streams of the two splits, every document ended by `tokenizer.eos_id`; memory-mapped, read-only."""

    train: Tokens
    heldout: Tokens
    tokenizer: Tokenizer
    digest: str  # of the source's content and the settings; the same on every machine
    directory: Path

    @property
    def told(self) -> dict[str, str | int]:
        """What all processes of a run must have found alike, by the settings it comes from."""
        return {
            "tokenizer (digest)": self.tokenizer.digest[:12],
            "data (digest of the text)": self.digest[:12],
            "data (training tokens)": len(self.train),
            "data (held-out tokens)": len(self.heldout),
        }


def prepare(data: DataConfig, tokenizer: TokenizerConfig, progress: Progress | None = None) -> Dataset:
    """The dataset of a source, from the cache or else prepared into it.

    progress: called as (what, bytes done, bytes in all). Safe for several processes at once and against being killed.
    Raises ValueError for a source, a tokenizer or a cache that cannot be used.
    """
    progress = progress or (lambda what, done, total: None)
    cache = Path(data.cache).expanduser()
    ready = None if tokenizer.kind == "bpe" else load_tokenizer(tokenizer)
    try:
        _make_private(cache / "sources")
        before = _stat(data)
        entry = cache / _digest(cache, data, tokenizer, ready, before, progress)
        dataset = _open(entry, tokenizer, ready)
        if dataset is None:
            with _lock(cache, entry.name, progress):
                dataset = _open(entry, tokenizer, ready)
                dataset = dataset or _build(entry, data, tokenizer, ready, before, progress)
    except OSError as error:  # the source's own are ValueErrors already
        raise ValueError(
            f"data.cache={data.cache}: {error.strerror}; set data.cache to a folder that can be written and has room"
        ) from error
    return dataset


# ---- the key -----------------------------------------------------------------------------------------------------


def _stat(data: DataConfig) -> list[tuple[str, int, int, int]]:
    """Name, bytes and times of the files of a source: cheap to look at, and another when any of them changes."""
    stats = []
    for path in source_files(data):
        try:
            stat = path.stat()
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}") from error
        stats.append((os.path.abspath(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
    return stats


def _digest(
    cache: Path, data: DataConfig, tokenizer: TokenizerConfig, ready: Tokenizer | None, stats: list, progress: Progress
) -> str:
    settings = {
        "format": FORMAT,
        "content": _content(cache, stats, progress),
        "data": [data.source, data.field, data.heldout],
        "tokenizer": ready.digest if ready else ["bpe", tokenizer.vocab_size],
    }
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]


def _content(cache: Path, stats: list, progress: Progress) -> str:
    """Digest of what the files hold, in order; their names count only by suffix."""
    memo = cache / "sources" / hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:32]
    with contextlib.suppress(FileNotFoundError):
        content = memo.read_text()
        if len(content) == 64:  # else it was cut short
            return content
    total, done, digest = sum(stat[1] for stat in stats), 0, hashlib.sha256()
    newest = max(max(stat[2:]) for stat in stats)
    settled = time.time() - newest / 1e9 > SETTLED_S
    for name, size, *_ in stats:
        try:
            with open(name, "rb") as file:
                digest.update(kind(Path(name)).encode() + b"\0" + hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise ValueError(f"{name}: {error.strerror}") from error
        done += size
        progress("looking at the files", done, total)
    if settled:
        memo.write_text(digest.hexdigest())
    return digest.hexdigest()


# ---- an entry ----------------------------------------------------------------------------------------------------


def _open(entry: Path, config: TokenizerConfig, ready: Tokenizer | None) -> Dataset | None:
    """The dataset of a whole entry; None where there is none or it is damaged. ready: the tokenizer, unless trained."""
    try:
        meta = json.loads((entry / "meta.json").read_text())
        tokenizer = ready or load_tokenizer(config, entry / "tokenizer.json")
        streams = [entry / f"{name}.bin" for name in SPLITS]
        dtype = np.dtype(meta["dtype"])
        whole = all(
            path.stat().st_size == meta[name]["tokens"] * dtype.itemsize
            for name, path in zip(SPLITS, streams, strict=True)
        )
        if not whole or tokenizer.digest != meta["tokenizer_digest"]:
            return None
        arrays = [np.memmap(path, dtype, mode="r") for path in streams]
        train, heldout = (Tokens.of([a], [np.flatnonzero(a == tokenizer.eos_id) + 1]) for a in arrays)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return Dataset(train, heldout, tokenizer, entry.name, entry)


def _build(
    entry: Path, data: DataConfig, config: TokenizerConfig, ready: Tokenizer | None, before: list, progress: Progress
) -> Dataset:
    """Prepares an entry beside its place and publishes it. Must hold its lock."""
    total = sum(stat[1] for stat in before)
    folder = Path(tempfile.mkdtemp(prefix=f".tmp-{entry.name}-", dir=entry.parent))
    with leave.on_leaving(lambda: _discard(folder)), contextlib.ExitStack() as stack:
        stack.callback(_discard, folder)
        tokenizer = ready
        if tokenizer is None:
            texts = _reported(data, "training the tokenizer", total, progress)
            tokenizer = train_bpe((document.text for document, heldout in texts if not heldout), config.vocab_size)
        dtype = "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"
        counts = _write_streams(folder, data, tokenizer, dtype, _reported(data, "tokenizing", total, progress))
        if _stat(data) != before:
            raise ValueError(f"the files of data.source={data.source} changed while they were read: start again")
        tokenizer.save(folder / "tokenizer.json")
        meta = {
            "format": FORMAT,
            "source": data.source,
            "heldout_share": data.heldout,
            "tokenizer": config.kind,
            "tokenizer_digest": tokenizer.digest,
            "vocab_size": tokenizer.vocab_size,
            "dtype": dtype,
            **counts,
        }
        (folder / "meta.json").write_text(json.dumps(meta, indent=1))
        _publish(folder, entry)
    dataset = _open(entry, config, ready)
    assert dataset is not None, f"{entry} was published but cannot be opened"
    return dataset


def _discard(folder: Path) -> None:
    """Removes a temporary folder, perhaps while another thread still writes there: by another name it finds no way."""
    with contextlib.suppress(FileNotFoundError):  # published
        shutil.rmtree(folder.rename(f"{folder}-discarded"), ignore_errors=True)


def _reported(data: DataConfig, what: str, total: int, progress: Progress) -> Iterator[tuple[Document, bool]]:
    progress(what, 0, total)
    shown = 0
    for document, heldout in split(data):
        yield document, heldout
        if document.read - shown >= total // 200:  # a bar needs no more, and a call may cost more than a document
            shown = document.read
            progress(what, shown, total)
    progress(what, total, total)


def _write_streams(
    folder: Path, data: DataConfig, tokenizer: Tokenizer, dtype: str, texts: Iterator[tuple[Document, bool]]
) -> dict:
    counts = {name: {"documents": 0, "tokens": 0, "bytes": 0} for name in SPLITS}
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(open(folder / f"{name}.bin", "wb")) for name in SPLITS}
        for chunk in _chunks(texts):
            tokens = tokenizer.encode_batch([document.text for document, _ in chunk])
            for (_, heldout), ids in zip(chunk, tokens, strict=True):
                name = "heldout" if heldout else "train"
                files[name].write(np.append(ids, tokenizer.eos_id).astype(dtype).tobytes())
                counts[name]["documents"] += 1
                counts[name]["tokens"] += len(ids) + 1
                counts[name]["bytes"] += int(tokenizer.token_bytes[ids].sum())
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    return counts


def _chunks(texts: Iterator[tuple[Document, bool]]) -> Iterator[list[tuple[Document, bool]]]:
    chunk, size = [], 0
    for document, heldout in texts:
        chunk.append((document, heldout))
        size += len(document.text)
        if size >= CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _publish(folder: Path, entry: Path) -> None:
    if not entry.exists():
        os.rename(folder, entry)
        return
    # It is damaged, or it would have been used. Whoever has it open keeps what was open.
    with tempfile.TemporaryDirectory(prefix=f".tmp-{entry.name}-", dir=entry.parent) as aside:
        os.rename(entry, Path(aside, entry.name))
        os.rename(folder, entry)


# ---- one process at a time ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def _lock(cache: Path, digest: str, progress: Progress) -> Iterator[None]:
    """Holds the lock of an entry, which ends with the process however it ends, and removes what killed ones left."""
    waiting = lambda: progress("waiting for another process to prepare the data", 0, 1)
    with locked(cache / f".lock-{digest}", on_wait=waiting):
        _remove_stale(cache, digest)
        yield


def _remove_stale(cache: Path, held: str) -> None:
    """A temporary folder is stale when the lock of its entry is ours or free: its maker no longer lives."""
    for folder in cache.glob(".tmp-*"):
        digest = folder.name.split("-")[1]
        if digest == held:
            shutil.rmtree(folder, ignore_errors=True)
            continue
        with contextlib.suppress(Locked), locked(cache / f".lock-{digest}"):
            shutil.rmtree(folder, ignore_errors=True)


def _make_private(folder: Path) -> None:
    """Creates a folder and its missing parents for this user alone."""
    for part in [*reversed(folder.parents), folder]:
        part.mkdir(mode=0o700, exist_ok=True)
