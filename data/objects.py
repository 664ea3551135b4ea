"""Files in object stores: s3://, gs://, hf:// and whatever else fsspec knows. Every request is repeated with backoff.

Credentials come from the environment, as each store's own tools read them; for S3: AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL. Nothing heavy is imported before the first address is used.
"""

import contextlib
import io
import logging
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from runtime.files import naming

log = logging.getLogger("isomesh.data")
T = TypeVar("T")

PATIENCE_S = {"hf": 15.0}  # how long a store may be away before it is an error
DEFAULT_PATIENCE_S = 180.0
FIRST_WAIT_S, LONGEST_WAIT_S = 0.25, 15.0
BLOCK = 8 << 20  # bytes that one request reads
# What no repetition mends, by the class's name: the packages that define them may be absent.
FINAL = {
    *("FileNotFoundError", "PermissionError", "IsADirectoryError", "ValueError", "TypeError", "NotImplementedError"),
    *("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "NoSuchBucket"),
    *("RepositoryNotFoundError", "GatedRepoError", "OfflineModeIsEnabled"),
}
OPTIONS = {  # the repeating is done here, where the user is told of it
    "s3": {
        "use_listings_cache": False,
        "config_kwargs": {"retries": {"max_attempts": 1}, "connect_timeout": 5, "read_timeout": 30},
    }
}


class Final(Exception):
    """Ends the repetition of a request at once; its text is what the user is told."""


def is_url(name: str | os.PathLike) -> bool:
    """Whether a name is an address in a store and not a local path."""
    return re.match(r"[a-z][a-z0-9+.-]+://", str(name)) is not None


def protocol(url: str) -> str:
    """The s3 of s3://bucket/key."""
    return url.partition("://")[0]


def repeated(what: str, action: Callable[[], T], patience: float | None = None) -> T:
    """What `action` returns, tried again after a while that doubles, until `patience` seconds are over.

    Raises ValueError with one line that names `what`. What cannot get better (nothing there, no permission) is told at
    once.
    """
    patience = PATIENCE_S.get(protocol(what), DEFAULT_PATIENCE_S) if patience is None else patience
    began, wait, tries = time.monotonic(), FIRST_WAIT_S, 0
    while True:
        tries += 1
        try:
            return action()
        except Exception as error:  # each store has exceptions of its own
            reason = _reason(error)
            if isinstance(error, Final) or FINAL & {kind.__name__ for kind in type(error).__mro__}:
                raise ValueError(f"{what}: {reason}") from error
            left = patience - (time.monotonic() - began)
            if left <= 0:
                raise ValueError(f"{what}: {reason} (tried {tries} times in {patience:g} s)") from error
        if tries == 3:  # the first two are ordinary
            log.warning("%s: %s; trying again for %.0f s", what, reason, left)
        time.sleep(min(wait * random.uniform(0.5, 1.0), max(left, 0.01)))
        wait = min(2 * wait, LONGEST_WAIT_S)


def _reason(error: Exception) -> str:
    text = " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__
    if type(error).__name__ == "NoCredentialsError":
        return "no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    if isinstance(error, FileNotFoundError):
        return "not found"
    return text[:300]


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of an address, and the path in it. Raises ValueError where its package is absent."""
    try:
        import fsspec
    except ImportError:
        raise ValueError(f"{url} needs the package fsspec: make setup EXTRAS=data") from None
    try:
        logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # repeats and tells by itself
        return fsspec.core.url_to_fs(url, **OPTIONS.get(protocol(url), {}))
    except ImportError as error:
        needed = "s3:// and hf:// need make setup EXTRAS=data, gs:// the package gcsfs"
        raise ValueError(f"{url}: {_reason(error)}; {needed}") from None
    except ValueError as error:
        raise ValueError(f"{url}: {_reason(error)}") from None


def join(root: str, *names: str) -> str:
    """The address of what lies below another, by names divided by /."""
    return "/".join([root.rstrip("/"), *names])


# ---- reading -----------------------------------------------------------------------------------------------------


class RemotePath:
    """A file in a store, with the face of a Path that readers of sources use."""

    def __init__(self, url: str):
        self.url = url
        parts = PurePosixPath(url.partition("://")[2])
        self.name, self.suffix, self.stem = parts.name, parts.suffix, parts.stem

    def __str__(self) -> str:
        return self.url

    def __lt__(self, other) -> bool:
        return str(self) < str(other)

    def __eq__(self, other) -> bool:
        return isinstance(other, RemotePath) and self.url == other.url

    def __hash__(self) -> int:
        return hash(self.url)

    def info(self) -> dict:
        """What the store says of it: "size", and a mark that changes with the content, under "mark"."""
        fs, path = filesystem(self.url)
        found = repeated(self.url, lambda: fs.info(path))
        marks = (found.get(key) for key in ("ETag", "etag", "sha256", "blob_id", "md5Hash", "LastModified", "created"))
        mark = next((str(mark).strip('"') for mark in marks if mark), "")
        return {"size": found["size"], "mark": mark}

    def open(self, mode: str = "rb") -> io.BufferedReader:
        """Its bytes, which may be read from any place. Raises ValueError where the store stays away."""
        return io.BufferedReader(_Ranges(self.url), 1 << 20)


class _Ranges(io.RawIOBase):
    """Reads a file of a store in blocks, each a request of its own that can be repeated."""

    def __init__(self, url: str):
        self._url, (self._fs, self._path) = url, filesystem(url)
        self._size = repeated(url, lambda: self._fs.info(self._path))["size"]
        self._at, self._first, self._block = 0, 0, b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer) -> int:
        if self._at >= self._size:
            return 0
        if not self._first <= self._at < self._first + len(self._block):
            stop = min(self._at + BLOCK, self._size)
            self._block = repeated(self._url, lambda: self._range(self._at, stop))
            self._first = self._at
        piece = memoryview(self._block)[self._at - self._first :][: len(buffer)]
        buffer[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)

    def _range(self, start: int, stop: int) -> bytes:
        data = self._fs.cat_file(self._path, start=start, end=stop)
        if len(data) != stop - start:
            raise OSError(f"{len(data):,} bytes came of the {stop - start:,} asked for")
        return data


def matching(pattern: str) -> list[RemotePath]:
    """The files of a store whose addresses match a pattern with * and **, sorted."""
    fs, path = filesystem(pattern)
    found = repeated(pattern, lambda: fs.glob(path, detail=True))
    return sorted(RemotePath(fs.unstrip_protocol(name)) for name, info in found.items() if info["type"] == "file")


def read_bytes(place: str, patience: float | None = None) -> bytes:
    """The content of a small file, local or in a store. Raises OSError or ValueError."""
    if not is_url(place):
        return Path(place).expanduser().read_bytes()
    fs, path = filesystem(place)
    return repeated(place, lambda: fs.cat_file(path), patience)


def exists(place: str) -> bool:
    """Whether there is a file of this name, local or in a store."""
    if not is_url(place):
        return Path(place).exists()
    fs, path = filesystem(place)
    return repeated(place, lambda: fs.exists(path))


# ---- moving whole files ------------------------------------------------------------------------------------------


def download(url: str, target: Path) -> None:
    """One try at copying a file of a store (or of a local folder) to `target`; the caller repeats and checks."""
    fs, path = filesystem(url)
    with naming(target):
        fs.get_file(path, str(target))


def upload(source: Path, url: str) -> None:
    """Copies a file into a store. A store shows an object whole or not at all. Raises ValueError if it stays away."""
    fs, path = filesystem(url)

    def put() -> None:
        if protocol(url) in ("file", "local"):
            fs.makedirs(os.path.dirname(path), exist_ok=True)
        fs.put_file(str(source), path)
        there = fs.info(path)["size"]
        if there != source.stat().st_size:
            raise OSError(f"{there:,} bytes arrived of {source.stat().st_size:,}")

    repeated(url, put)


@contextlib.contextmanager
def beside(target: Path) -> Iterator[Path]:
    """A name to write to, which becomes `target` when all went well and is removed when not."""
    temporary = target.with_name(f".tmp-{os.getpid()}-{random.getrandbits(32):08x}-{target.name}")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
