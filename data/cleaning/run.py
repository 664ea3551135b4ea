"""Cleaning, from a source's documents to a folder: one pass, in the order of the documents.

    documents.jsonl   what is kept: {"id": file and line, "text": ...}
    removed.jsonl     what is not: {"reason": ..., "id": ..., what was found ..., "text": ...}
    report.json, report.md   counts and samples of each step

Other processes look at documents on their own; this one compares them, keeps the first of those that are alike, and
writes. What is written depends on the documents and the steps alone, not on the number of processes.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data.cleaning.contamination import Evaluation
from data.cleaning.files import Kept, compress, digest, end, json_line
from data.cleaning.near import NearIndex
from data.cleaning.report import Report, page
from data.cleaning.steps import Examiner, Finding, Steps
from data.corpus import Document, Item
from data.processes import in_order
from runtime.files import naming

DOCUMENTS, REMOVED, NUMBERS, PAGE = "documents.jsonl", "removed.jsonl", "report.json", "report.md"
CHUNK = 1 << 20  # characters of text that a process is given at a time


@dataclass(frozen=True)
class Cleaning:
    """What is cleaned, and how."""

    told: str  # the source, for the report
    steps: Steps
    against: Evaluation | None = None
    skip_bad: bool = False  # what cannot be read is counted, not refused
    compressed: bool = False  # the two .jsonl files, as .zst
    workers: int = 1


def clean(items: Iterable[Item], folder: Path, cleaning: Cleaning, progress: Callable[[int], None]) -> dict:
    """Cleans documents into an empty folder; returns the report.

    progress: called with the bytes of the source that were read. Raises ValueError for a document that cannot be read.
    """
    Examiner(cleaning.steps, cleaning.against)  # what is missing is told before any work
    report = Report(cleaning.steps)
    kept = Kept(folder / DOCUMENTS)
    with naming(folder), (folder / REMOVED).open("wb") as removed:
        writer = _Writer(kept, removed, report, cleaning.steps)
        chunks = in_order(_chunks(items), cleaning.workers, _make, cleaning.steps, cleaning.against)
        for chunk, findings in chunks:
            for item, finding in zip(chunk, _with_unread(chunk, findings, cleaning.skip_bad), strict=True):
                writer.take(item, finding)
            progress(chunk[-1].read)
        kept.close()
        end(removed)
        facts = report.facts(cleaning, writer.near, digest(folder / DOCUMENTS))
        if cleaning.compressed:
            compress(folder / DOCUMENTS), compress(folder / REMOVED)
        (folder / NUMBERS).write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        (folder / PAGE).write_text(page(facts), encoding="utf-8")
    return facts


def _make(steps: Steps, against: Evaluation | None) -> Callable[[list[Item]], list[Finding]]:
    """What a process does with a chunk: the findings of its documents."""
    examine = Examiner(steps, against)
    return lambda chunk: examine([item.text for item in chunk if isinstance(item, Document)])


def _with_unread(chunk: list[Item], findings: list[Finding], skip_bad: bool) -> Iterator[Finding]:
    found = iter(findings)
    for item in chunk:
        if isinstance(item, Document):
            yield next(found)
        elif item.bad and not skip_bad:
            raise ValueError(f"{item.name}: {item.reason}; --skip-bad counts such documents and goes on")
        else:
            yield Finding("unreadable" if item.bad else "empty", {"error": item.reason} if item.bad else {})


def _chunks(items: Iterable[Item]) -> Iterator[list[Item]]:
    chunk, size = [], 0
    for item in items:
        if isinstance(item, Document) and not isinstance(item.text, str):
            raise ValueError(f"{item.name} holds tokens, and texts are cleaned")
        chunk.append(item)
        size += len(item.text) if isinstance(item, Document) else 0
        if size >= CHUNK or len(chunk) >= CHUNK // 100:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


class _Writer:
    """Compares each document with those kept before it, and writes it to where it belongs."""

    def __init__(self, kept: Kept, removed, report: Report, steps: Steps):
        self._kept, self._removed, self._report = kept, removed, report
        self._exact: dict[bytes, int] = {}
        self.near = NearIndex(steps.near, lambda i: kept.read(i)["text"]) if steps.near is not None else None

    def take(self, item: Item, finding: Finding) -> None:
        text = item.text if isinstance(item, Document) else ""
        reason, detail, other = finding.reason, finding.detail, None
        if reason is None and finding.digest in self._exact:
            reason, other = "duplicate", self._exact[finding.digest]
        elif reason is None and finding.sketch is not None and (found := self.near.find(finding.sketch, text)):
            reason, other, detail = "near_duplicate", found[0], {"similarity": round(found[1], 4)}
        if reason is None:
            self._keep(item, finding)
            return
        of = self._kept.read(other) if other is not None else None
        detail = detail | ({"of": of["id"]} if of else {})
        record = {"reason": reason, "id": item.name, **detail, "text": text}
        self._removed.write(json_line(record))
        self._report.removed(record, of["text"] if of else None)

    def _keep(self, item: Document, finding: Finding) -> None:
        number = len(self._kept)
        self._kept.add(item.name, item.text)
        self._report.kept(item.text)
        if finding.digest is not None:
            self._exact[finding.digest] = number
        if finding.sketch is not None:
            self.near.add(number, finding.sketch)
