"""The card of a prepared corpus: what is in it, counted, as JSON and as a text with a picture."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np

from data.corpus import EMPTY, DataConfig
from runtime.files import replace_text

LENGTHS = 48  # bins of a document's length in tokens: bin i is 2^i to 2^(i+1) - 1
SAMPLES = 20  # of what was skipped, that a card shows
BAR = 40  # characters
BLOCKS = " ▏▎▍▌▋▊▉█"


def category(reason: str) -> str:
    """Under which words a reason is counted: without numbers, and without what a parser says beside."""
    return re.sub(r"(?<![\w-])\d[\d,]*", "N", re.split(r"[:;(]| at ", reason)[0]).strip()[:60]


def write_card(folder: Path, index: dict, lines: list[dict], data: DataConfig) -> None:
    """Writes card.json and card.md. lines: those of the journal."""
    card = make_card(index, lines, data)
    replace_text(folder / "card.json", json.dumps(card, indent=1, ensure_ascii=False))
    replace_text(folder / "card.md", card_text(card))


def make_card(index: dict, lines: list[dict], data: DataConfig) -> dict:
    """The card as a dict of what JSON can hold."""
    skipped = Counter()
    for line in lines:
        skipped.update(line["skipped"])
    lengths = sum((np.array(line["lengths"]) for line in lines), np.zeros((2, LENGTHS), np.int64)).sum(axis=0)
    splits = index["splits"]
    counts = {key: sum(split[key] for split in splits.values()) for key in ("documents", "tokens", "bytes")}
    return {
        "digest": index["digest"],
        **counts,
        "bytes_a_token": round(counts["bytes"] / max(1, counts["tokens"] - counts["documents"]), 4),
        "splits": splits,
        "shards": len(index["shards"]),
        "lengths": [
            {"from": 1 << i, "to": (2 << i) - 1, "documents": int(n)}
            for i, n in enumerate(lengths)
            if lengths[i:].any()
        ],
        "skipped": dict(skipped.most_common()),
        "samples": [sample for line in lines for sample in line["samples"]][:SAMPLES],
        "source": {"source": data.source, "path": data.path, "field": data.field, "heldout": data.heldout},
        "tokenizer": {
            "kind": index["tokenizer"],
            "vocab_size": index["vocab_size"],
            "digest": index["tokenizer_digest"],
        },
    }


def card_text(card: dict) -> str:
    """The card in Markdown."""
    rows = [("train", card["splits"]["train"]), ("held out", card["splits"]["heldout"]), ("both", card)]
    table = "\n".join(f"| {name} | {r['documents']:,} | {r['tokens']:,} | {r['bytes']:,} |" for name, r in rows)
    source, tokenizer = card["source"], card["tokenizer"]
    parts = [
        f"# Corpus {card['digest'][:12]}",
        f"From `data.source={source['source']}`" + (f", `data.path={source['path']}`" if source["path"] else "") + ".",
        f"Tokenizer: {tokenizer['kind']}, {tokenizer['vocab_size']:,} ids, digest {tokenizer['digest'][:12]}. "
        f"{card['shards']} shards, {card['bytes_a_token']:.3f} bytes a token.",
        f"| | documents | tokens | bytes of text |\n|---|---|---|---|\n{table}",
        "Documents by their length in tokens:\n\n```\n" + picture(card["lengths"]) + "\n```",
        _skipped_text(card),
    ]
    return "\n\n".join(parts) + "\n"


def picture(lengths: list[dict]) -> str:
    """A histogram of text blocks, a line a bin; empty bins at its beginning are left out."""
    first = next((i for i, one in enumerate(lengths) if one["documents"]), 0)
    shown, most = lengths[first:], max((one["documents"] for one in lengths), default=0)
    names = [f"{one['from']:,} to {one['to']:,}" for one in shown]
    width = max(map(len, names), default=0)
    return "\n".join(
        f"{name:>{width}} {_bar(one['documents'] / most)} {one['documents']:,}"
        for name, one in zip(names, shown, strict=True)
    )


def _bar(share: float) -> str:
    eighths = max(round(share * BAR * 8), int(share > 0))
    return "█" * (eighths // 8) + BLOCKS[eighths % 8].strip()


def _skipped_text(card: dict) -> str:
    if not card["skipped"]:
        return "Nothing of the source was left out."
    counts = [f"{n:,} {'empty documents' if reason == EMPTY else reason}" for reason, n in card["skipped"].items()]
    text = f"Left out: {'; '.join(counts)}."
    return text + "".join(f"\n- {_plain(sample)}" for sample in card["samples"])


def _plain(text: str) -> str:
    return "".join(c if c.isprintable() else "�" for c in text)
