"""The audit: who did what, as JSON lines of which each holds the hash of the one before, so that no change goes unseen.

Each process writes a chain of its own: the files <chain>.<number>.jsonl, and <chain>.head with the number and hash of
its last record, signed with the server's secret. A record is changed, cut or moved: its hash, or the next one's link,
is wrong. The end of a chain is cut: the head knows better. Heads are also copied to the database now and then, so that
a whole chain, or a chain and its head put back to an older state, are missed.

What is not noticed: changes by somebody who has the server's secret and the database as well, and the loss of what
came after the last copy of a head, where chain and head are put back together.

When is it on the disk: an admin's action before it is done (fsync); all other records within a second (`flush`).
A full disk: what cannot be written is kept in memory, up to a bound, and written later; see Door for who is refused.
"""

import contextlib
import hashlib
import hmac
import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from runtime import locks
from serving.access import secrets

FOLDER = "audit"
LARGEST = 64 * 2**20  # bytes of a file, after which the next one begins
MOST_KEPT = 10_000  # records that wait for room on the disk
CHAINS = 256  # processes that write into one folder at once
START = "0" * 64
LONGEST_FIELD = 256  # characters of words from outside
LONGEST_TEXT = 2**16  # characters of a body, where bodies are asked for


def signature(secret: bytes, chain: str, sequence: int, digest: str) -> str:
    """What proves that this server wrote a head."""
    text = f"head {chain} {sequence} {digest}"
    return hmac.new(hashlib.sha256(b"audit" + secret).digest(), text.encode(), hashlib.sha256).hexdigest()


def line_hash(line: bytes) -> str:
    """The hash by which the next record knows this one: of its line, without the line's end."""
    return hashlib.sha256(line).hexdigest()


class Chain:
    """The records of one process. Its methods may be called in any thread."""

    def __init__(self, folder: Path, name: str, secret: bytes, clock: Callable[[], float] = time.time):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.folder, self._secret, self._clock = folder, secret, clock
        self._lock = threading.Lock()
        self._kept: deque[dict] = deque()
        self.lost = 0  # records that there was neither room on the disk nor in memory for, since the last one written
        self._head, self.name = _own(folder, name)
        self._number, self.sequence, self.hash = last_record(folder, self.name)
        head = read_head(folder, self.name, secret)
        if head and head[0] >= self.sequence:  # where the end was cut or altered, the gap stays to be seen
            self.sequence, self.hash = head
        self._file = self._open()
        self._dirty = False
        if not self.sequence and not os.fstat(self._head).st_size:
            with contextlib.suppress(OSError):
                self._write_head()  # so that a chain without a record is one that nothing was cut from

    def _open(self) -> int:
        path = self.folder / f"{self.name}.{self._number:06}.jsonl"
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._size = os.fstat(file).st_size
        return file

    def head(self) -> tuple[str, int, str]:
        """(its name among all folders' chains, number and hash of its last record)."""
        with self._lock:
            return f"{folder_id(self.folder)}/{self.name}", self.sequence, self.hash

    def write(self, record: dict, *, sync: bool = False) -> None:
        """Adds a record, on the disk when this returns if `sync`. Raises OSError where it cannot be written."""
        with self._lock:
            self._write_kept()
            self._append(record)
            if sync:
                os.fsync(self._file)

    def note(self, record: dict) -> bool:
        """Adds a record, or keeps it for later where it cannot be written now; whether it is written."""
        with self._lock:
            try:
                self._write_kept()
                self._append(record)
                return True
            except OSError:
                if len(self._kept) < MOST_KEPT:
                    self._kept.append({**record, "time": self._clock()})
                else:
                    self.lost += 1
                return False

    def flush(self) -> None:
        """Writes what was kept, and brings all to the disk. Raises OSError where there is still no room."""
        with self._lock:
            self._write_kept()
            if self._dirty:
                os.fsync(self._file)
                self._dirty = False

    def _write_kept(self) -> None:
        while self._kept:
            self._append(self._kept[0])
            self._kept.popleft()

    def _append(self, record: dict) -> None:
        if self._size > LARGEST:
            self._rotate()
        known = {"sequence": self.sequence + 1, "time": record.get("time", self._clock()), "chain": self.name}
        lost = {"lost": self.lost} if self.lost else {}
        fields = {name: _bounded(name, value) for name, value in record.items() if name != "time"}
        text = json.dumps({**known, **fields, **lost, "before": self.hash}, ensure_ascii=True, separators=(",", ":"))
        line = text.encode()
        _write_whole(self._file, line + b"\n", self._size)
        self._size += len(line) + 1
        self.sequence, self.hash, self._dirty, self.lost = self.sequence + 1, line_hash(line), True, 0
        self._write_head()

    def _write_head(self) -> None:
        proof = signature(self._secret, self.name, self.sequence, self.hash)
        os.pwrite(self._head, f"{self.sequence:020} {self.hash} {proof}\n".encode(), 0)

    def _rotate(self) -> None:
        os.fsync(self._file)
        number, file = self._number, self._file
        try:
            self._number += 1
            self._file = self._open()
        except OSError:
            self._number = number
            raise
        os.close(file)

    def close(self) -> None:
        """Writes what can be written, and lets another process have the chain."""
        with contextlib.suppress(OSError):
            self.flush()
        os.close(self._file)
        os.close(self._head)


def folder_id(folder: Path) -> str:
    """What tells this folder's chains from those of other machines, in a database that they share."""
    path = folder / "id"
    if not path.exists():
        secrets.make_once(path, os.urandom(8).hex())
    return path.read_text().strip()


def _own(folder: Path, name: str) -> tuple[int, str]:
    """The head of a chain that no other process writes, locked for this one, and the chain's name."""
    for number in range(CHAINS):
        chain = f"{name}-{number}"
        file = os.open(folder / f"{chain}.head", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            with open(file, closefd=False) as head:
                locks.acquire(head)
            return file, chain
        except locks.Locked:
            os.close(file)
    raise OSError(f"{folder}: {CHAINS} processes write an audit here already")


def last_record(folder: Path, chain: str) -> tuple[int, int, str]:
    """Where a chain goes on: (number of its file, sequence, hash of the last record). After half a line: a new file."""
    files = files_of(folder, chain)
    number = _number(files[-1]) if files else 0
    for path in reversed(files):
        whole, _, rest = path.read_bytes().rpartition(b"\n")
        number += bool(rest) and path == files[-1]
        if whole:
            line = whole.rpartition(b"\n")[2]
            return number, _field(line, "sequence", 0), line_hash(line)
    return number, 0, START


def read_head(folder: Path, chain: str, secret: bytes) -> tuple[int, str] | None:
    """(sequence, hash) of the last record as its head tells; None where there is none or it is not signed by us."""
    path = folder / f"{chain}.head"
    words = path.read_text(errors="replace").split() if path.exists() else []
    if len(words) != 3 or not words[0].isdecimal():
        return None
    right = hmac.compare_digest(words[2].encode(), signature(secret, chain, int(words[0]), words[1]).encode())
    return (int(words[0]), words[1]) if right else None


def files_of(folder: Path, chain: str) -> list[Path]:
    """The files of a chain, oldest first."""
    return sorted(folder.glob(f"{chain}.[0-9]*.jsonl"), key=_number)


def _number(path: Path) -> int:
    return int(path.name.split(".")[-2])


def _write_whole(file: int, data: bytes, size: int) -> None:
    """Writes all or nothing: half a line of a full disk is taken back."""
    try:
        if os.write(file, data) != len(data):
            raise OSError("the disk is full")
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(file, size)
        raise


def _bounded(name: str, value):
    longest = LONGEST_TEXT if name == "text" else LONGEST_FIELD
    return value[:longest] if isinstance(value, str) else value


def _field(line: bytes, name: str, default):
    try:
        return json.loads(line).get(name, default)
    except (ValueError, AttributeError):
        return default
