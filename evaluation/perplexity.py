"""Perplexity and bits per byte of documents, by a sliding window: every token is scored once.

A document is read alone, behind one end-of-document token (or whatever the model wants before a text), so its first
token is scored too. Ends of documents are read and not scored: no text stands for them, and published models disagree
about them. Joined, documents are one stream, as where training packs them without segments: then a window reaches back
into the documents before.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from evaluation.results import Metric, Outcome, ratio
from evaluation.scoring import Progress, Row, Scorer


class Stream(Protocol):
    """Tokens of documents, each ended by the end of a document: data.token_files.Tokens, or what looks like it."""

    ends_N: np.ndarray  # where each document ends in the stream, one past its end-of-document token

    def slice(self, start: int, stop: int) -> np.ndarray:
        """The tokens [start, stop)."""


@dataclass(frozen=True)
class Window:
    """How far a token sees, and how many tokens a window scores. Raises ValueError for a stride above length."""

    length: int  # tokens that the model reads at once
    stride: int  # tokens between two windows: each scored token sees more than length - stride before it

    def __post_init__(self):
        if not 1 <= self.stride <= self.length:
            raise ValueError(f"--stride {self.stride} must be 1 to --window {self.length}")


@dataclass(frozen=True)
class Cuts:
    """The windows of one text of `count` tokens behind `before` others that are read and not scored."""

    start_W: np.ndarray  # where each begins, counted from the first token that is read
    stop_W: np.ndarray  # one past the last token that it reads, which is the last target's place
    first_W: np.ndarray  # the place of the first target


def cut(before: int, count: int, window: Window) -> Cuts:
    """The windows that score tokens before .. before + count - 1 of a text, each once, from what stands before it.

    The first has as many targets as it can; the others `stride`, behind as much context as fits.
    """
    total = before + count
    first_end = min(total, max(window.length + 1, before + 1))  # one past the last target
    ends = np.append(np.arange(first_end, total, window.stride), total) if total > before else np.empty(0, int)
    firsts = np.concatenate([[before], ends[:-1]]) if len(ends) else ends
    starts = np.maximum(0, ends - 1 - window.length)
    return Cuts(starts, ends - 1, firsts)


def perplexity(
    scorer: Scorer,
    stream: Stream,
    window: Window,
    *,
    eos_id: int,
    begin: Sequence[int] = (),
    token_bytes_V: np.ndarray,
    joined: bool = False,
    limit: int | None = None,
    progress: Progress = lambda done, total: None,
) -> Outcome:
    """Loss in nats a token, perplexity, bits a byte of text and accuracy, with standard errors over documents.

    begin: what stands before a text, by default `eos_id`. limit: documents, from the first. Raises ValueError where
    nothing can be scored.
    """
    prefix = np.asarray(begin or (eos_id,), np.int32)
    ends_N = np.asarray(stream.ends_N, np.int64)[:limit]
    starts_N = np.concatenate([[0], ends_N[:-1]]) if len(ends_N) else ends_N
    if len(prefix) > window.length:
        raise ValueError(f"--window {window.length} is shorter than the {len(prefix)} tokens before every text")
    texts = [(0, int(ends_N[-1]) - 1)] if joined and len(ends_N) else list(zip(starts_N, ends_N - 1, strict=True))
    cuts = [cut(len(prefix), int(stop - start), window) for start, stop in texts]
    text_of_W = np.repeat(np.arange(len(cuts)), [len(one.start_W) for one in cuts])
    if not len(text_of_W):
        raise ValueError("there is no token to score")
    start_W, stop_W, first_W = (np.concatenate([getattr(c, name) for c in cuts]) for name in Cuts.__annotations__)

    def row(number: int) -> Row:
        origin = int(texts[text_of_W[number]][0]) - len(prefix)  # of the text's first place in the stream
        start, stop, first = int(start_W[number]), int(stop_W[number]), int(first_W[number])
        tokens = stream.slice(origin + max(start, len(prefix)), origin + stop + 1).astype(np.int32)
        tokens = np.concatenate([prefix[start:], tokens])
        targets = tokens[first - start :]
        places = np.flatnonzero(targets != eos_id)
        return Row(tokens[:-1], (places + first - 1 - start).astype(np.int32), targets[places])

    sums = {name: np.zeros(len(ends_N)) for name in ("nats", "tokens", "bytes", "correct")}
    for number, asked, scores in scorer.scores(stop_W - start_W, stop_W - first_W + 1, row, progress):
        origin = int(texts[text_of_W[number]][0]) - len(prefix) + int(start_W[number])
        document_C = np.searchsorted(ends_N, origin + asked.places_C + 1, side="right")
        add = lambda name, values: np.add.at(sums[name], document_C, values)  # noqa: B023 (called at once)
        add("nats", scores.nll_C.astype(np.float64))
        add("tokens", 1)
        add("bytes", token_bytes_V[asked.targets_C])
        add("correct", scores.correct_C)
    return outcome(sums)


def outcome(sums: dict[str, np.ndarray]) -> Outcome:
    """The metrics of documents' sums: nats, tokens, bytes of text, and tokens that the model finds likeliest.

    Raises ValueError where no token was scored.
    """
    kept = sums["tokens"] > 0
    sums = {name: values[kept] for name, values in sums.items()}
    if not kept.any():
        raise ValueError("there is no token to score")
    loss = ratio(sums, "nats", "tokens")
    perplexity = math.exp(min(loss.value, 700))
    metrics = {
        "loss": loss,
        "perplexity": Metric(perplexity, loss.stderr and perplexity * loss.stderr, higher_is_better=False),
        "accuracy": ratio(sums, "correct", "tokens", higher_is_better=True),
    }
    if sums["bytes"].sum() > 0:
        metrics["bits_per_byte"] = ratio(sums, "nats", "bytes", scale=1 / math.log(2))
    return Outcome(metrics, items=sums, ids=[str(number) for number in np.flatnonzero(kept)])


class Texts:
    """Documents in memory as a `Stream`."""

    def __init__(self, documents: Sequence[np.ndarray], eos_id: int):
        self._tokens = np.concatenate([np.append(ids, eos_id) for ids in documents]) if documents else np.empty(0, int)
        self.ends_N = np.cumsum([len(ids) + 1 for ids in documents])

    def slice(self, start: int, stop: int) -> np.ndarray:
        """The tokens [start, stop)."""
        return self._tokens[start:stop]
