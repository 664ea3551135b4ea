"""Shards of a corpus in a store: fetched when they are first read, kept on this machine within a bound."""

import contextlib
import logging
import os
import threading
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from data.order import WINDOW
from data.prepared import SPLITS, fetch
from data.token_files import Tokens, mapped
from runtime.locks import locked

log = logging.getLogger("isomesh.data")

HEADER = 128  # bytes before the numbers of a .npy file
AT_ONCE = 4  # shards that are fetched ahead together
ABANDONED_S = 3600.0  # after which a file that is still being fetched has no living process


class ShardCache:
    """Copies of shards, each under its digest, at most `limit` bytes together; those read longest ago make room.

    Several processes may share the folder. A copy is compared with its digest before it gets its name. A shard that is
    thrown out while a process reads it takes its place on the disk until that process reads enough others.
    """

    def __init__(self, folder: Path, limit: int, roots: list[str], dtype: str):
        self.folder, self.limit, self.roots, self.dtype = folder, limit, roots, dtype
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._begin()

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._open: OrderedDict[str, np.ndarray] = OrderedDict()

    def __getstate__(self) -> dict:
        kept = ("folder", "limit", "roots", "dtype")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict) -> None:
        self.__dict__ |= state
        self._begin()

    def array(self, shard: dict) -> np.ndarray:
        """The tokens of a shard, (tokens,), memory-mapped.

        Raises ValueError where no place gives it whole, or the cache may not hold even this one.
        """
        with self._lock:
            if (found := self._open.get(shard["digest"])) is not None:
                self._open.move_to_end(shard["digest"])
                return found
        size = shard["tokens"] * np.dtype(self.dtype).itemsize
        while True:
            path = self.file(f"{shard['name']}.bin", shard["digest"], size)
            with contextlib.suppress(FileNotFoundError):  # another process needed the room
                array = mapped(path, self.dtype, shard["tokens"])
                break
        with self._lock:
            self._open[shard["digest"]] = array
            while sum(one.nbytes for one in self._open.values()) > self.limit:
                self._open.popitem(last=False)
        return array

    def ends(self, shard: dict) -> np.ndarray:
        """Where the documents of a shard end in it, as `data.token_files.Part.ends`. Raises as `array` does."""
        size = HEADER + 8 * shard["documents"]
        while True:
            path = self.file(f"{shard['name']}.ends.npy", shard["ends_digest"], size)
            with contextlib.suppress(FileNotFoundError):
                return np.load(path)

    def file(self, name: str, digest: str, size: int) -> Path:
        """The local copy of a file of the corpus, fetched where it is not there. Raises as `array` does."""
        path = self.folder / digest
        with locked(self.folder / f".lock-{digest[:3]}", on_wait=lambda: None):
            if path.exists():
                with contextlib.suppress(FileNotFoundError):
                    os.utime(path)  # it is in use
                    return path
            temporary = self.folder / f".tmp-{size}-{os.getpid()}-{threading.get_ident()}-{digest}"
            self._make_room(name, size, temporary)
            try:
                fetch(self.roots, name, digest, temporary)
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
        return path

    def _make_room(self, name: str, size: int, temporary: Path) -> None:
        if size > self.limit:
            raise ValueError(
                f"{name} takes {size / 1e9:.3g} GB, and data.cache_gb={self.limit / 1e9:g} allows for less; "
                f"set data.cache_gb={size / 1e9:.2g} or more"
            )
        with locked(self.folder / ".lock", on_wait=lambda: None):
            files = self._files()
            total = sum(taken for _, taken, _ in files)
            for _, taken, path in sorted(files):
                if total + size <= self.limit:
                    break
                if not path.name.startswith(".tmp-"):
                    path.unlink(missing_ok=True)
                    with self._lock:
                        self._open.pop(path.name, None)
                    total -= taken
            temporary.touch()

    def _files(self) -> list[tuple[float, int, Path]]:
        """When each file was last used, how much it takes or will take, and where it is."""
        found = []
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                stat = path.stat()
                if path.name.startswith(".tmp-"):
                    if time.time() - stat.st_mtime > ABANDONED_S:
                        path.unlink()
                        continue
                    found.append((stat.st_mtime, int(path.name.split("-")[1]), path))
                elif not path.name.startswith("."):
                    found.append((stat.st_mtime, stat.st_size, path))
        return found


class Fetched:
    """A part of a stream that lies in a store."""

    def __init__(self, shard: dict, cache: ShardCache):
        self.shard, self.cache = shard, cache
        self.tokens, self.documents, self.bytes = shard["tokens"], shard["documents"], shard["bytes"]

    def array(self) -> np.ndarray:
        """Its tokens."""
        return self.cache.array(self.shard)

    def ends(self) -> np.ndarray:
        """Where its documents end."""
        return self.cache.ends(self.shard)


def open_store(index: dict, cache: ShardCache) -> dict[str, Tokens]:
    """The streams of both splits. Where the cache has room for all, they are fetched ahead in the background."""
    parts = {name: [Fetched(s, cache) for s in index["shards"] if s["split"] == name] for name in SPLITS}
    width, counts = np.dtype(index["dtype"]).itemsize, [shard["tokens"] for shard in index["shards"]]
    size = needed = sum(counts) * width
    if len(counts) >= 2 * WINDOW:  # it is not shuffled as a whole: what is read at a time, and what comes next
        needed = min(size, 2 * WINDOW * max(counts) * width)
    if size <= cache.limit:
        _fetch_ahead([part for name in reversed(SPLITS) for part in parts[name]])
    elif needed > cache.limit:
        log.warning(
            "%s has %.3g GB of tokens and data.cache_gb=%g holds less: shards are fetched again and again; "
            "set data.cache_gb=%.3g where there is room",
            *(cache.roots[0], size / 1e9, cache.limit / 1e9, 1.05 * needed / 1e9),
        )
    return {name: Tokens(parts[name], index["dtype"]) for name in SPLITS}


def _fetch_ahead(parts: list[Fetched]) -> None:
    def fetch_all() -> None:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for part in parts:
                pool.submit(part.array)  # what goes wrong is told to whoever reads it

    threading.Thread(target=fetch_all, name="fetch-ahead", daemon=True).start()
