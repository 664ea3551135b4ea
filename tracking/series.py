"""One metric over the steps of a run, in bounded memory: long runs are thinned to the extremes of buckets of steps."""

import numpy as np

BUCKETS = 2000  # at most this many; a chart is about 1,200 pixels wide
CHUNK = 20_000  # points that are gathered before they are thinned together


class Series:
    """Points (step, value) of one metric. Up to BUCKETS steps all are kept; beyond, each bucket of steps keeps some.

    A bucket is `width` steps wide, a power of two that grows with the run. It keeps its least and its greatest finite
    value at the steps where they were, and its first value that is not finite: no spike is lost, and every point
    kept is one that was measured. Since wider buckets are made of whole narrower ones, it does not matter in which
    pieces a run was read. The mean of each bucket is kept beside, for smoothing.
    """

    def __init__(self, buckets: int = BUCKETS):
        self.buckets, self.width = buckets, 1
        self._new: tuple[list[int], list[float]] = ([], [])
        self._steps, self._values = np.empty(0, np.int64), np.empty(0)
        # of each bucket: its last step, and the sum and the number of its finite values
        self._ends, self._sums, self._counts = np.empty(0, np.int64), np.empty(0), np.empty(0)

    def add(self, step: int, value: float) -> None:
        """Takes one point, in any order of steps; the value may be NaN or infinite."""
        self._new[0].append(step)
        self._new[1].append(value)
        if len(self._new[0]) >= CHUNK:
            self.fold()

    def points(self, since: int = 0) -> dict[str, list]:
        """`step` and `value` of the points kept, by step; where thinned, `mean_step` and `mean` of the buckets, too.

        Only from the step `since` on, which should be a bucket's first, see `bucket_start`.
        """
        self.fold()
        kept = self._steps >= since
        found = {"step": self._steps[kept].tolist(), "value": self._values[kept].tolist()}
        if self.width > 1:
            kept = (self._ends >= since) & (self._counts > 0)
            means = self._sums[kept] / self._counts[kept]
            found |= {"mean_step": self._ends[kept].tolist(), "mean": [float(f"{mean:.7g}") for mean in means]}
        return found

    def bucket_start(self, step: int) -> int:
        """The first step of the bucket that holds `step`."""
        return step // self.width * self.width

    def fold(self) -> None:
        """Takes in the points added since, and widens the buckets until they are few enough."""
        if not self._new[0]:
            return
        steps, values = np.array(self._new[0], np.int64), np.array(self._new[1], float)
        self._new = ([], [])
        finite = np.isfinite(values)
        ends = np.concatenate([self._ends, steps])
        sums = np.concatenate([self._sums, np.where(finite, values, 0)])
        counts = np.concatenate([self._counts, finite])
        order = np.argsort(ends, kind="stable")
        ends, sums, counts = ends[order], sums[order], counts[order]
        while len(first := _group_starts(ends // self.width)) > self.buckets:
            self.width *= 2
        self._ends = np.maximum.reduceat(ends, first)
        with np.errstate(over="ignore", invalid="ignore"):  # the sum of huge values may be infinite
            self._sums = np.add.reduceat(sums, first)
        self._counts = np.add.reduceat(counts, first)

        steps, values = np.concatenate([self._steps, steps]), np.concatenate([self._values, values])
        order = np.argsort(steps, kind="stable")
        steps, values = steps[order], values[order]
        kept = _extremes(steps // self.width, values)
        self._steps, self._values = steps[kept], values[kept]


def _group_starts(groups: np.ndarray) -> np.ndarray:
    """Where each run of equal numbers begins in an ascending array."""
    return np.flatnonzero(np.append(True, groups[1:] != groups[:-1]))


def _extremes(groups: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Ascending places of each group's least and greatest finite value and of its first that is not finite."""
    finite = np.flatnonzero(np.isfinite(values))
    odd = np.flatnonzero(~np.isfinite(values))
    kept = [odd[_group_starts(groups[odd])]] if len(odd) else []
    if len(finite):
        order = finite[np.lexsort((values[finite], groups[finite]))]
        first = _group_starts(groups[order])
        last = np.append(first[1:], len(order)) - 1
        kept += [order[first], order[last]]
    return np.unique(np.concatenate(kept))
