"""The dataset of a run: tokens prepared once into a cache, or a corpus that was prepared before.

    <cache>/<digest>/   a prepared corpus (data.prepared) under the digest of its source's content and the settings
    <cache>/sources/    what each set of files held when last looked at, so that an unchanged source is not read again
    <cache>/.verified/  which files were compared with their digests
    <cache>/.shards/    copies of shards that lie in a store

An entry is written beside its place and renamed into it, whole or not at all; a lock lets one process at a time do so.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data.corpus import DataConfig, source_files
from data.objects import RemotePath, is_url, join, read_bytes
from data.prepared import INDEX, TOKENIZER, Progress, open_folder, parse_index, read_index, remember, roots_of, verify
from data.shard_cache import ShardCache, open_store
from data.sources.files import kind, stamp
from data.token_files import Tokens
from data.tokenizer import ByteTokenizer, JsonTokenizer, Tokenizer, TokenizerConfig, load_tokenizer
from data.writer import Job, write_corpus
from runtime import leave
from runtime.locks import Locked, locked

log = logging.getLogger("isomesh.data")

FORMAT = 1  # of the key: raise it when the same source and settings would give other tokens
SETTLED_S = 2.0  # a file touched more recently may change again within the resolution of its timestamp


@dataclass(frozen=True, eq=False)
class Dataset:
    """Token streams of the two splits, every document ended by `tokenizer.eos_id`; memory-mapped, read-only."""

    train: Tokens
    heldout: Tokens
    tokenizer: Tokenizer
    digest: str  # of the source's content and the settings, or of a prepared corpus; the same on every machine
    tokens_digest: str  # of the corpus: every shard by its digest
    directory: str  # or address

    @property
    def told(self) -> dict[str, str | int]:
        """What all processes of a run must have found alike, by the settings it comes from."""
        return {
            "tokenizer (digest)": self.tokenizer.digest[:12],
            "data (digest of the text)": self.digest[:12],
            "data (digest of the tokens)": self.tokens_digest[:12],
            "data (training tokens)": len(self.train),
            "data (held-out tokens)": len(self.heldout),
        }


def prepare(data: DataConfig, tokenizer: TokenizerConfig, progress: Progress | None = None) -> Dataset:
    """The dataset of a source: a prepared corpus, or from the cache, or else prepared into it.

    progress: called as (what, bytes done, bytes in all). Safe for several processes at once and against being killed.
    Raises ValueError for a source, a tokenizer or a cache that cannot be used.
    """
    progress = progress or (lambda what, done, total: None)
    cache = Path(data.cache).expanduser()
    if data.source == "prepared":
        return open_prepared(data, cache, progress)
    ready = None if tokenizer.is_trained else load_tokenizer(tokenizer)
    try:
        _make_private(cache / "sources")
        before = stamps(data)
        entry = cache / digest_of_source(cache, data, tokenizer, ready, before, progress)
        dataset = _open(entry, tokenizer, ready, progress)
        if dataset is None:
            with _lock(cache, entry.name, progress):
                dataset = _open(entry, tokenizer, ready, progress)
                dataset = dataset or _build(entry, data, tokenizer, ready, before, progress)
    except OSError as error:  # the source's own are ValueErrors already
        raise ValueError(
            f"data.cache={data.cache}: {error.strerror}; set data.cache to a folder that can be written and has room"
        ) from error
    return dataset


# ---- a corpus that was prepared before ---------------------------------------------------------------------------


def open_prepared(data: DataConfig, cache: Path, progress: Progress) -> Dataset:
    """A prepared corpus: the first of data.path and data.replicas that is whole. Raises ValueError if none is.

    A local folder is compared with its digests once, and mapped as it lies. Of a store each shard is fetched when it is
    first read, from whichever place gives it.
    """
    roots = roots_of(data)
    index, _ = read_index(roots)
    streams, root = _open_first(roots, index, data, cache, progress)
    return Dataset(**streams, tokenizer=_tokenizer_of(roots, index), digest=index["digest"],
                   tokens_digest=index["digest"], directory=root)  # fmt: skip


def _open_first(
    roots: list[str], index: dict, data: DataConfig, cache: Path, progress: Progress
) -> tuple[dict[str, Tokens], str]:
    reasons = []
    for number, root in enumerate(roots):
        try:
            if is_url(root):
                store = ShardCache(cache / ".shards", int(data.cache_gb * 1e9), roots[number:], index["dtype"])
                return open_store(index, store), root
            if parse_index(read_bytes(join(root, INDEX)), join(root, INDEX))["digest"] != index["digest"]:
                raise ValueError(f"{root} holds another corpus than {roots[0]}")
            streams = open_folder(Path(root), index)
            verify(Path(root), index, cache / ".verified", progress)
            return streams, root
        except (ValueError, OSError) as error:
            reasons.append(str(error))
            if root != roots[-1]:
                log.warning("%s; taken from %s", error, roots[number + 1])
    raise ValueError("; ".join(reasons))


def _tokenizer_of(roots: list[str], index: dict) -> Tokenizer:
    """The tokenizer of a corpus, from the first place that has the right one."""
    if index["tokenizer"] == "bytes":
        return ByteTokenizer()
    reasons = []
    for root in roots:
        name = join(root, TOKENIZER)
        try:
            spec = read_bytes(name).decode()
        except (OSError, ValueError) as error:
            reasons.append(f"{name}: {getattr(error, 'strerror', None) or error}")
            continue
        if hashlib.sha256(spec.encode()).hexdigest() == index["tokenizer_digest"]:
            return JsonTokenizer(spec, name, index["vocab_size"])
        reasons.append(f"{name} is not the tokenizer that made the tokens: its digest differs from that in {INDEX}")
    raise ValueError("; ".join(reasons))


# ---- the key -----------------------------------------------------------------------------------------------------


def stamps(data: DataConfig) -> list[tuple]:
    """Name, bytes and marks of the files of a source: cheap to look at, and another when any of them changes."""
    return [stamp(path) for path in source_files(data)]


def digest_of_source(
    cache: Path, data: DataConfig, tokenizer: TokenizerConfig, ready: Tokenizer | None, stats: list, progress: Progress
) -> str:
    """The digest of what a source holds and of the settings that decide its tokens."""
    settings = {
        "format": FORMAT,
        "content": _content(cache, stats, progress),
        "data": [data.source, data.field, data.heldout],
        "tokenizer": ready.digest if ready else [tokenizer.kind, tokenizer.vocab_size],
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
    newest = max((max(stat[2:]) for stat in stats if not is_url(stat[0])), default=0)
    settled = time.time() - newest / 1e9 > SETTLED_S
    for name, size, mark, _ in stats:
        digest.update(kind(Path(name)).encode() + b"\0" + _content_of(name, mark))
        done += size
        progress("looking at the files", done, total)
    if settled:
        memo.write_text(digest.hexdigest())
    return digest.hexdigest()


def _content_of(name: str, mark: str | int) -> bytes:
    """A digest of a file's content. A store knows one, under which it is not read twice."""
    if is_url(name) and mark:
        return hashlib.sha256(str(mark).encode()).digest()
    try:
        with (RemotePath(name) if is_url(name) else Path(name)).open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise ValueError(f"{name}: {error.strerror}") from error


# ---- an entry ----------------------------------------------------------------------------------------------------


def _open(entry: Path, config: TokenizerConfig, ready: Tokenizer | None, progress: Progress) -> Dataset | None:
    """The dataset of a whole entry; None where there is none or it is damaged. ready: the tokenizer, unless trained."""
    try:
        index = parse_index((entry / INDEX).read_bytes(), str(entry / INDEX))
        tokenizer = ready or load_tokenizer(config, entry / TOKENIZER)
        if tokenizer.digest != index["tokenizer_digest"]:
            return None
        streams = open_folder(entry, index)
        verify(entry, index, entry.parent / ".verified", progress)
    except (FileNotFoundError, ValueError):
        return None
    return Dataset(**streams, tokenizer=tokenizer, digest=entry.name, tokens_digest=index["digest"],
                   directory=str(entry))  # fmt: skip


def _build(
    entry: Path, data: DataConfig, config: TokenizerConfig, ready: Tokenizer | None, before: list, progress: Progress
) -> Dataset:
    """Prepares an entry beside its place and publishes it. Must hold its lock."""
    folder = Path(tempfile.mkdtemp(prefix=f".tmp-{entry.name}-", dir=entry.parent))
    with leave.on_leaving(lambda: _discard(folder)), contextlib.ExitStack() as stack:
        stack.callback(_discard, folder)
        job = Job(entry.name, sum(stat[1] for stat in before))
        index = write_corpus(folder, data, config, ready, job, progress)
        require_unchanged(data, before)
        _publish(folder, entry)
        remember(entry, index, entry.parent / ".verified")
    dataset = _open(entry, config, ready, progress)
    assert dataset is not None, f"{entry} was published but cannot be opened"
    return dataset


def require_unchanged(data: DataConfig, before: list) -> None:
    """Raises ValueError where the files of a source are not what they were."""
    if stamps(data) != before:
        raise ValueError(f"the files of data.source={data.source} changed while they were read: start again")


def _discard(folder: Path) -> None:
    """Removes a temporary folder, perhaps while another thread still writes there: by another name it finds no way."""
    with contextlib.suppress(FileNotFoundError):  # published
        shutil.rmtree(folder.rename(f"{folder}-discarded"), ignore_errors=True)


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
