"""How a model did on its task, as one HTML page for a person: nothing is fetched from elsewhere, no script runs."""

from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from finetune.task import Judged, Judgement

WORST = 25  # examples
CHARACTERS = 600  # of an example's text
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #777 }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: .5rem 0 2rem }
caption { text-align: left; white-space: nowrap; color: var(--soft) }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top }
th:first-child, td:first-child, .words { text-align: left }
td.words { overflow-wrap: anywhere }
.scroll { overflow-x: auto }
"""


def page(title: str, facts: Mapping[str, str], judgement: Judgement, labels: Sequence[str]) -> str:
    """The page. Texts of the data are escaped."""
    parts = [
        f"<h1>{escape(title)}</h1>",
        _table("", ["", ""], [[name, value] for name, value in facts.items()], words=(1,)),
        "<h2>Metrics</h2>",
        _table("", ["metric", "value"], [[name, f"{value:.4f}"] for name, value in judgement.metrics.items()]),
    ]
    if judgement.by_label:
        kinds = list(next(iter(judgement.by_label.values())))
        rows = [[label, *(_number(one[kind]) for kind in kinds)] for label, one in judgement.by_label.items()]
        parts += ["<h2>By label</h2>", _table("", ["label", *kinds], rows)]
    if judgement.confusion is not None:
        parts += ["<h2>Confusion</h2>", _confusion(judgement.confusion, labels)]
    wrong = sorted((one for one in judgement.judged if one.truth != one.answer), key=lambda one: -one.loss)
    if wrong:
        heads, rows = ["row", "loss", "right", "answered", "text"], [_line(one) for one in wrong[:WORST]]
        told = f"The {len(rows)} answers with the highest loss of {len(wrong):,} that are wrong"
        parts += ["<h2>Worst examples</h2>", _table(told, heads, rows, words=(0, 2, 3, 4))]
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<style>{STYLE}</style></head>\n<body>{''.join(parts)}</body></html>\n"
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) and abs(value) > 1 else f"{value:.4f}"


def _line(one: Judged) -> list[str]:
    text = one.text if len(one.text) <= CHARACTERS else f"{one.text[:CHARACTERS]} ..."
    return [one.name.rpartition("/")[2], f"{one.loss:.3f}", one.truth, one.answer, text]


def _table(caption: str, heads: list[str], rows: list[list[str]], words: tuple[int, ...] = ()) -> str:
    kind = lambda column: ' class="words"' if column in words else ""
    body = "".join(
        f"<tr>{''.join(f'<td{kind(i)}>{escape(cell)}</td>' for i, cell in enumerate(row))}</tr>" for row in rows
    )
    top = "".join(f"<th{kind(i)}>{escape(head)}</th>" for i, head in enumerate(heads)) if any(heads) else ""
    told = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f'<div class="scroll"><table>{told}<tr>{top}</tr>{body}</table></div>'


def _confusion(counts_CC: np.ndarray, labels: Sequence[str]) -> str:
    """A row for each right label, a column for each answer; the darker, the larger the share of the row."""
    shares_CC = counts_CC / np.maximum(counts_CC.sum(1, keepdims=True), 1)
    cell = lambda count, share: f'<td style="background:rgb(60 120 220 / {share:.2f})">{count:,}</td>'
    rows = "".join(
        f"<tr><th>{escape(label)}</th>{''.join(map(cell, counts.tolist(), shares.tolist()))}</tr>"
        for label, counts, shares in zip(labels, counts_CC, shares_CC, strict=True)
    )
    heads = "".join(f"<th>{escape(label)}</th>" for label in labels)
    caption = "<caption>Rows: what is right. Columns: what was answered.</caption>"
    return f'<div class="scroll"><table>{caption}<tr><th></th>{heads}</tr>{rows}</table></div>'
