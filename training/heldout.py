"""The loss on held-out text, and how long ago it was best."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import jax


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found: the loss, and what else it measured."""

    loss: float  # nats a token, of all sources together
    bits_per_byte: float | None = None  # of text
    by_source: dict[str, float] = field(default_factory=dict)  # nats a token of each source of a mixture
    metrics: dict[str, float] = field(default_factory=dict)  # of a task
    watched: float | None = None  # what is lowest in the best model; None: the loss

    @property
    def rank(self) -> float:
        """The lower, the better the model."""
        return self.loss if self.watched is None else self.watched


@dataclass(frozen=True)
class HeldOut:
    """Evaluates parameters on the same batches each time."""

    step: Callable  # (params, batch, token_bytes_V) -> sums, as training.step.make_eval_step makes it
    batches: Callable[[], Iterable[tuple[str, Mapping[str, jax.Array]]]]  # each with the name of its source
    token_bytes_V: jax.Array
    watched: ClassVar[str] = "eval/loss"

    def evaluate(self, params: dict) -> Evaluation:
        """Runs the step on every batch and adds up what it found: nats a token, bits a byte, nats by source.

        All processes of the mesh must call it together.
        """
        sums: dict[str, list] = {}
        for name, batch in self.batches():
            sums.setdefault(name, []).append(self.step(params, batch, self.token_bytes_V))
        totals = {name: _added(parts) for name, parts in sums.items()}
        whole = _added(totals.values())
        by_source = {name: one["nats"] / one["tokens"] for name, one in totals.items()} if len(totals) > 1 else {}
        return Evaluation(whole["nats"] / whole["tokens"], whole["nats"] / math.log(2) / whole["bytes"], by_source)


def _added(sums: Iterable[Mapping]) -> dict[str, float]:
    sums = list(sums)
    return {name: sum(float(one[name]) for one in sums) for name in ("nats", "tokens", "bytes")}


@dataclass
class Progress:
    """The best evaluation of a run, the one with the lowest loss or rank; its checkpoints hold it."""

    best: float | None = None
    since_best: int = 0  # evaluations

    def take(self, rank: float) -> bool:
        """Notes an evaluation; whether it is the best so far."""
        better = math.isfinite(rank) and (self.best is None or rank < self.best)
        self.best, self.since_best = (rank, 0) if better else (self.best, self.since_best + 1)
        return better
