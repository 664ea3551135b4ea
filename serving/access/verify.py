"""Reads an audit back: whether every record is there, in its order, as it was written."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from serving.access.audit import START, files_of, line_hash, read_head


@dataclass(frozen=True)
class Line:
    """A line of a chain, and where it stands."""

    where: str  # FILE:LINE
    record: dict | None  # None: it is no record
    hash: str

    @property
    def sequence(self) -> int | None:
        number = self.record and self.record.get("sequence")
        return number if isinstance(number, int) else None


@dataclass(frozen=True)
class Verdict:
    """What is said of a chain."""

    chain: str
    records: int
    fault: str | None = None  # the first line that is not as it was written
    archived: int = 0  # records before the first one that is here


def chains(folder: Path) -> list[str]:
    """The names of all chains in a folder."""
    return sorted({path.name.split(".")[0] for kind in ("*.jsonl", "*.head") for path in folder.glob(kind)})


def lines(folder: Path, chain: str) -> Iterator[Line]:
    """The lines of a chain, oldest first."""
    for path in files_of(folder, chain):
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                text = raw.removesuffix(b"\n")
                try:
                    record = json.loads(text)
                except ValueError:
                    record = None
                whole = isinstance(record, dict) and raw.endswith(b"\n")
                yield Line(f"{path}:{number}", record if whole else None, line_hash(text))


def verify(folder: Path, chain: str, secret: bytes, copied: Mapping[str, tuple[int, str]]) -> Verdict:
    """Follows a chain from its first record to its head, and to the copy of the head in the database.

    May run beside the server that writes it: the head is read before and after.
    """
    heads = [
        ("the copy of its head in the database", copied.get(chain)),
        ("its head", read_head(folder, chain, secret)),
    ]
    found, before, count, first = {}, None, 0, None
    wanted = {head[0] for _, head in heads if head}
    for line in lines(folder, chain):
        fault = _fault(before, line, chain)
        if fault:
            blamed = before if fault == "altered" and before and _vouched(folder, chain, line, secret) else line
            return Verdict(chain, count, f"{blamed.where}: {_words(fault)}")
        first = line.sequence if first is None else first
        before, count = line, count + 1
        if line.sequence in wanted:
            found[line.sequence] = line
    last = before.sequence if before else 0
    for what, head in heads:
        fault = _end_fault(what, head, last, found, before)
        if fault:
            return Verdict(chain, count, f"{before.where if before else folder / chain}: {fault}")
    after = read_head(folder, chain, secret)
    if after is None:
        return Verdict(
            chain, count, f"{folder / chain}.head: no head that this server signed; what was cut is not known"
        )
    if last > after[0] + 1:
        return Verdict(chain, count, f"{before.where}: {last - after[0]} records more than its head knows of")
    return Verdict(chain, count, archived=(first or 1) - 1)


def _fault(before: Line | None, line: Line, chain: str) -> str | None:
    if line.record is None or line.sequence is None or line.record.get("chain") != chain:
        return "not a record"
    if before is None:
        return None if line.sequence > 1 or line.record.get("before") == START else "altered"
    linked = line.record.get("before") == before.hash
    follows = line.sequence == before.sequence + 1
    if linked and follows:
        return None
    if linked or follows:
        return "altered"
    return f"{before.sequence}>{line.sequence}"


def _vouched(folder: Path, chain: str, line: Line, secret: bytes) -> bool:
    """Whether what comes after this line, or the head, knows it: then it was the line before that was altered."""
    found = False
    for other in lines(folder, chain):
        if found:
            return other.record is not None and other.record.get("before") == line.hash
        found = other.where == line.where
    head = read_head(folder, chain, secret)
    return head is not None and head[1] == line.hash


def _words(fault: str) -> str:
    if ">" not in fault:
        return fault
    before, this = map(int, fault.split(">"))
    if this > before + 1:
        return f"record {this} follows record {before}: {this - before - 1} were cut, or moved"
    return f"record {this} follows record {before}: reordered or repeated"


def _end_fault(what: str, head: tuple[int, str] | None, last: int, found: dict[int, Line], before: Line | None):
    if head is None:
        return None
    if head[0] > last:
        return f"cut after this line: record {last} is the last here, {what} tells of record {head[0]}"
    line = found.get(head[0])
    if line is not None and line.hash != head[1]:
        return f"record {head[0]} is altered: {what} knows another"
    return None
