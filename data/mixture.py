"""Which source of a mixture each sequence of a run comes from, and which of that source's sequences it is.

Sequence i of a stage lies at frac(i / golden ratio) on a line that the sources share by their weights. These points are
spread so evenly that after any number of sequences every source has its share to within a few. How many of the first n
lie in an interval is a sum that Euclid's algorithm finds in O(log n), so nothing is counted on the way: the source of
any sequence, and its number within that source, follow from its number in the run.
"""

import bisect
import decimal
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

CIRCLE = 1 << 64
# 2^64 over the golden ratio, up to 2^-43: the nearest found whose continued fraction over 2^64 has no term above 4, so
# that the points are spread evenly however many there are
GOLDEN = 0x9E3779B97F503AF3
FAR = 1 << 62  # sequences: farther than any run goes


@dataclass(frozen=True)
class MixtureSource:
    """One source of a mixture."""

    source: str = "text"  # where its text comes from, as data.source
    path: str | None = None  # its files, as data.path
    field: str = "text"  # as data.field
    replicas: tuple[str, ...] = ()  # as data.replicas
    # its share before they are made to add up to 1, or from which step on it has which: {0: 3, 2000: 1};
    # null: as many as it has training tokens
    weight: float | dict | None = None
    epochs: float | None = None  # read at most so often, then the others share its part; null: no limit
    tokens: float | None = None  # at most so many of its tokens are read; null: no limit

    def check(self, key: str) -> None:
        """Raises ValueError for what cannot be; key: what the source is called in messages."""
        if isinstance(self.weight, dict) and not self.weight:
            raise ValueError(
                f"{key}.weight={{}} names no step: give a number, or weights by step as in {{0: 3, 2000: 1}}"
            )
        for step, weight in self.weights.items():
            whole = isinstance(step, int) and not isinstance(step, bool) and step >= 0
            number = isinstance(weight, int | float) and not isinstance(weight, bool)
            if not whole or not number or not 0 <= weight < float("inf"):
                wanted = "a number of 0 or more, or such numbers by steps of 0 or more, as in {0: 3, 2000: 1}"
                raise ValueError(f"{key}.weight={self.weight} should be {wanted}")
        for name in ("epochs", "tokens"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{key}.{name}={value} must be above 0; null: no limit")

    @property
    def weights(self) -> dict[int, float]:
        """The weight from each step on; empty where the source has that of its size."""
        if self.weight is None:
            return {}
        return self.weight if isinstance(self.weight, dict) else {0: self.weight}

    def weight_at(self, step: int, size: int) -> float:
        """Its weight at a step; size: its training tokens."""
        if self.weight is None:
            return size
        earlier = [since for since in self.weights if since <= step]
        return self.weights[max(earlier)] if earlier else 0


@dataclass(frozen=True)
class Stage:
    """A stretch of a run in which no weight changes."""

    first: int  # the sequence of the run that it begins with
    before: tuple[int, ...]  # sequences of each source before it
    borders: tuple[int, ...]  # where on the circle the part of each source begins, and CIRCLE

    def counts(self, n: int) -> tuple[int, ...]:
        """Sequences of each source before sequence `n` of the run, which is not before this stage."""
        inside = [points_below(n - self.first, border) for border in self.borders]
        return tuple(b + high - low for b, low, high in zip(self.before, inside, inside[1:], strict=False))

    def sources(self, numbers: np.ndarray) -> np.ndarray:
        """The source of each of these sequences (n,) of the run, all of this stage: its place in `before`."""
        points = (numbers - self.first).astype(np.uint64) * np.uint64(GOLDEN)  # modulo 2^64
        inner = [border for border in self.borders[1:-1] if border < CIRCLE]
        return np.searchsorted(np.array(inner, np.uint64), points, side="right")

    @property
    def shares(self) -> list[float]:
        """The share of each source."""
        return [(high - low) / CIRCLE for low, high in zip(self.borders, self.borders[1:], strict=False)]


def points_below(n: int, border: int) -> int:
    """How many of the points i GOLDEN mod CIRCLE with i < n lie below `border`, a number up to CIRCLE."""
    # x mod m < c exactly where floor((x + m - c) / m) is not above floor(x / m)
    return n + floor_sum(n, CIRCLE, GOLDEN, 0) - floor_sum(n, CIRCLE, GOLDEN, CIRCLE - border)


def floor_sum(n: int, m: int, a: int, b: int) -> int:
    """The sum of floor((a i + b) / m) over i < n, in O(log m); none of them negative. (As Euclid's algorithm; see
    Graham, Knuth and Patashnik, Concrete Mathematics, section 3.5.)"""
    total = 0
    while n:
        total += n * (n - 1) // 2 * (a // m) + n * (b // m)
        a, b = a % m, b % m
        last = a * n + b
        if last < m:
            break
        n, b, m, a = last // m, last % m, a, m
    return total


def shares(weights: list[float], temperature: float) -> list[Fraction]:
    """What the weights are after w^(1 / temperature), adding up to 1: exact, and hence the same on every machine."""
    if temperature == 1:
        powers = [Fraction(weight) for weight in weights]
    else:
        with decimal.localcontext(prec=40):
            power = 1 / decimal.Decimal(temperature)
            powers = [Fraction(decimal.Decimal(w) ** power) if w else Fraction(0) for w in weights]
    return [power / sum(powers) for power in powers]


class Plan:
    """The sources of all sequences of a run.

    sources: by name, in whatever order. rows: how many each has an epoch; sizes: its training tokens. A source that has
    reached its cap leaves its part to the others, in proportion to their weights.
    """

    def __init__(
        self,
        sources: dict[str, MixtureSource],
        rows: dict[str, int],
        sizes: dict[str, int],
        *,
        temperature: float,
        batch_size: int,
        seq_len: int,
    ):
        sources = dict(sorted(sources.items()))
        self.names, self.rows, self.batch_size = list(sources), [rows[name] for name in sources], batch_size
        self.caps = [_cap(source, rows[name], seq_len) for name, source in sources.items()]
        steps = sorted({0, *(step for source in sources.values() for step in source.weights)})
        self.stages: list[Stage] = []
        self.end = FAR  # sequences: from there on there is nothing left to read
        for step, after in zip(steps, [*steps[1:], FAR // batch_size], strict=True):
            weights = [source.weight_at(step, sizes[name]) for name, source in sources.items()]
            if not self._add(weights, temperature, step * batch_size, after * batch_size):
                break
        self._firsts = [stage.first for stage in self.stages]

    def _add(self, weights: list[float], temperature: float, first: int, after: int) -> bool:
        """Adds the stages in [first, after) with these weights; whether there is something to read until the end."""
        counts = self.stages[-1].counts(first) if self.stages else (0,) * len(weights)
        while first < after:
            left = [w if cap is None or n < cap else 0 for w, cap, n in zip(weights, self.caps, counts, strict=True)]
            if not any(left):
                self.end = first
                return False
            total, borders = Fraction(0), [0]
            for share in shares(left, temperature):
                total += share
                borders.append(int(total * CIRCLE))
            stage = Stage(first, counts, tuple(borders))
            self.stages.append(stage)
            first = min([after, *(self._reached(stage, k, after) for k, w in enumerate(left) if w)])
            counts = stage.counts(first)
        return True

    def _reached(self, stage: Stage, source: int, after: int) -> int:
        """The first sequence before which a source has all of its cap, if this stage went on for ever."""
        if self.caps[source] is None:
            return after
        return stage.first + bisect.bisect_left(
            range(after - stage.first), self.caps[source], key=lambda n: stage.counts(stage.first + n)[source]
        )

    def counts(self, n: int) -> tuple[int, ...]:
        """How many of the first n sequences of the run are of each source."""
        return self.stages[bisect.bisect_right(self._firsts, n) - 1].counts(n)

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """The source of each sequence of a step (int32, as in `names`), and its number among those of that source.

        Both are of (batch_size,). Raises ValueError where the sources have reached their caps before the step's end.
        """
        first, after = step * self.batch_size, (step + 1) * self.batch_size
        if after > self.end:
            raise ValueError(self.too_short(step + 1))
        sources = np.empty(self.batch_size, np.int32)
        numbers = np.arange(first, after)
        for stage, next_first in zip(self.stages, [*self._firsts[1:], FAR], strict=True):
            inside = slice(*(min(max(n - first, 0), self.batch_size) for n in (stage.first, next_first)))
            sources[inside] = stage.sources(numbers[inside])
        within = np.empty(self.batch_size, np.int64)
        for source, before in enumerate(self.counts(first)):
            of_it = np.flatnonzero(sources == source)
            within[of_it] = before + np.arange(len(of_it))
        return sources, within

    def too_short(self, steps: int) -> str:
        """The message for a run of so many steps where the caps leave it less."""
        capped = ", ".join(name for name, cap in zip(self.names, self.caps, strict=True) if cap is not None)
        return (
            f"{steps:,} steps x {self.batch_size} = {steps * self.batch_size:,} sequences, but the caps and weights of "
            f"data.mixture leave {self.end:,}: set train.steps={self.end // self.batch_size} or less"
            + (f", or raise epochs or tokens of {capped}" if capped else "")
        )


def _cap(source: MixtureSource, rows: int, seq_len: int) -> int | None:
    """How many sequences of a source are read at most."""
    caps = [] if source.epochs is None else [int(Fraction(source.epochs) * rows)]
    caps += [] if source.tokens is None else [int(source.tokens // seq_len)]
    return min(caps, default=None)
