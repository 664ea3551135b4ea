"""Which rows share a batch, and to what shape it is padded: few shapes, so few compiles, and little padding."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Shape:
    """The shape of one compiled program: (rows, tokens), and how many places of a row it scores."""

    rows: int
    tokens: int  # that a row is padded to
    places: int  # scored in a row, at most

    def batches(self, members: np.ndarray) -> Iterator[np.ndarray]:
        """The members cut into batches; the last may be short."""
        return (members[first : first + self.rows] for first in range(0, len(members), self.rows))


@dataclass(frozen=True)
class Costs:
    """What the choice of shapes weighs, in the time that one token takes in the model's layers."""

    place: float  # of the output table, for one scored place
    shape: float  # of compiling one more program


@dataclass(frozen=True)
class Limits:
    """What a mesh and a model ask of a shape."""

    tokens_multiple: int  # padded lengths divide by this
    rows_multiple: int  # rows of a batch divide by this
    batch_tokens: int  # of a batch, at most, as long as a row for each device is less
    longest: int  # what a row is never padded beyond


def padded(length: int, limits: Limits) -> int:
    """The next of about eight lengths an octave that the mesh divides."""
    step = max(8, 1 << max(0, (length - 1).bit_length() - 4))
    step = -(-step // limits.tokens_multiple) * limits.tokens_multiple
    return min(-(-length // step) * step, limits.longest)


def choose_shapes(
    lengths: np.ndarray, places: np.ndarray, limits: Limits, costs: Costs
) -> list[tuple[Shape, np.ndarray]]:
    """Shapes with the rows (their numbers) that go into each: the cheapest cut of the rows, sorted by size.

    lengths: tokens of each row; places: how many of them are scored. Exact for that order (dynamic programming).
    """
    if not len(lengths):
        return []
    sizes = np.array([padded(int(length), limits) for length in lengths])
    scored = np.array([1 << int(count - 1).bit_length() for count in np.maximum(places, 1)])
    kinds, kind, counts = np.unique(np.stack([sizes, scored], 1), axis=0, return_inverse=True, return_counts=True)
    best, cut = np.full(len(kinds) + 1, np.inf), np.zeros(len(kinds) + 1, int)
    best[0] = 0
    for stop in range(1, len(kinds) + 1):
        widest = np.maximum.accumulate(kinds[:stop, 1][::-1])[::-1]  # of the kinds from each start on
        held = np.cumsum(counts[:stop][::-1])[::-1]
        cost = best[:stop] + costs.shape + held * (kinds[stop - 1, 0] + costs.place * widest)
        cut[stop] = int(np.argmin(cost))
        best[stop] = cost[cut[stop]]
    found, stop, kind = [], len(kinds), kind.reshape(-1)
    while stop:
        start = int(cut[stop])
        members = np.flatnonzero((kind >= start) & (kind < stop))
        members = members[np.argsort(lengths[members], kind="stable")]
        tokens, width = int(kinds[stop - 1, 0]), int(kinds[start:stop, 1].max())
        found.append((Shape(_rows(len(members), tokens, limits), tokens, min(width, tokens)), members))
        stop = start
    return found[::-1]


def _rows(members: int, tokens: int, limits: Limits) -> int:
    """Rows of a batch: as many as the limit allows, spread evenly over as few batches as they need."""
    most = max(1, limits.batch_tokens // tokens)
    even = -(-members // -(-members // most))
    return -(-even // limits.rows_multiple) * limits.rows_multiple
