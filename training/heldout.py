"""The loss on held-out text, and how long ago it was best."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import jax


@dataclass(frozen=True)
class HeldOut:
    """Evaluates parameters on the same batches each time."""

    step: Callable  # (params, batch, token_bytes_V) -> sums, as training.step.make_eval_step makes it
    batches: Callable[[], Iterable[Mapping[str, jax.Array]]]
    token_bytes_V: jax.Array

    def losses(self, params: dict) -> tuple[float, float]:
        """Nats a token, and bits a byte of text."""
        sums = [self.step(params, batch, self.token_bytes_V) for batch in self.batches()]
        nats, tokens, size = (sum(float(one[name]) for one in sums) for name in ("nats", "tokens", "bytes"))
        return nats / tokens, nats / math.log(2) / size


@dataclass
class Progress:
    """The best held-out loss of a run; its checkpoints hold it."""

    best: float | None = None
    since_best: int = 0  # evaluations

    def take(self, loss: float) -> bool:
        """Notes an evaluation; whether it is the best so far."""
        better = math.isfinite(loss) and (self.best is None or loss < self.best)
        self.best, self.since_best = (loss, 0) if better else (self.best, self.since_best + 1)
        return better
