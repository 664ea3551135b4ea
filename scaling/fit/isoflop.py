"""Hoffmann et al.'s first two approaches: the envelope of training curves, and parabolas over runs of one budget.

Both give the optimal N as a power of C without a law for the loss; D follows from C = 6 N D. They stand beside the
parametric fit, which shares their data but not their assumptions: where they disagree, one of these is wrong.
"""

from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from scaling.fit.laws import FLOPS_PER_TOKEN_AND_PARAMETER

ENVELOPE_POINTS = 200  # budgets, evenly spaced in log C, at which the best run is looked for
LEVEL = 0.95
NARROWER = 0.85  # the next window where the runs in one bend as no parabola does
NARROWEST = 0.5  # half of the last window, in log N
BENT = 2.0  # t of a cubic term, in the middle slice, from which on they do
FEWEST = 5  # sizes in a window, where there are as many
ROUNDS = 20  # that a window is moved to its parabola's minimum


@dataclass(frozen=True)
class PowerLaw:
    """N_opt, or the loss there, = coefficient C^exponent, over the table's budgets; the exponent's 95% interval."""

    exponent: float
    interval: tuple[float, float]
    log_coefficient: float
    budgets: int

    def at(self, budget: float) -> float:
        """The law's value at a budget in FLOPs."""
        return float(np.exp(self.log_coefficient + self.exponent * np.log(budget)))

    def optimum(self, budget: float) -> dict[str, float]:
        """Parameters N and tokens D of a law of N_opt at a budget C in FLOPs: D = C / 6N."""
        n = self.at(budget)
        return {"N": n, "D": budget / (FLOPS_PER_TOKEN_AND_PARAMETER * n)}


@dataclass(frozen=True)
class Slice:
    """One budget's runs; `refused` says why it has no optimum, or is None."""

    name: str
    runs: int
    log_c: float
    log_n: float  # of the parabola's minimum
    loss: float  # there
    curvature: float  # loss = loss at the minimum + curvature (log N - log_n)^2
    refused: str | None


def slices(n: np.ndarray, c: np.ndarray, loss: np.ndarray, groups: np.ndarray) -> list[Slice]:
    """A parabola of loss in log N for each group's runs, in order of C; without an interior minimum it is refused.

    n, c, loss, groups: of (runs,); parameters, FLOPs, nats a token, and which budget a run is of.
    A parabola goes through the runs in a window around its minimum. It is as wide as the runs allow, for each run
    counts, and the same for all budgets, so that what a parabola misses shifts every minimum alike and leaves the
    exponent alone.
    """
    parts = [(str(group), *(values[groups == group] for values in (n, c, loss))) for group in set(groups)]
    reach = window([(size, y) for _, size, _, y in parts])
    return sorted((_slice(*part, reach) for part in parts), key=lambda one: one.log_c)


def window(parts: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """Half the width, in log N, of the windows of slices (N, loss): the widest in which the middle slice's cubic term
    is no larger than its noise."""
    logs = [(np.log(n), loss) for n, loss in parts if len(np.unique(n)) > FEWEST]
    reach = max((float(np.ptp(log_n)) for log_n, _ in logs), default=np.inf)
    while logs and reach > NARROWEST:
        if np.median([_parabola(log_n, loss, reach).bent for log_n, loss in logs]) < BENT:
            break
        reach *= NARROWER
    return reach


def _slice(name: str, n: np.ndarray, c: np.ndarray, loss: np.ndarray, reach: float) -> Slice:
    log_c, sizes = float(np.log(c).mean()), np.unique(n)
    refuse = lambda why: Slice(name, len(n), log_c, np.nan, np.nan, np.nan, why)
    if len(sizes) < 4:
        return refuse(f"{len(sizes)} model sizes; a parabola and one degree of freedom need 4")
    best = int(np.argmin([loss[n == size].mean() for size in sizes]))
    outside = lambda end: refuse(
        f"no interior minimum: the loss is least at the {end} model, so the optimum lies outside"
    )
    at_end = best in (0, len(sizes) - 1)
    fitted = _parabola(np.log(n), loss, reach)
    if fitted.curvature <= 0:
        end = "smallest" if best < len(sizes) / 2 else "largest"
        return outside(end) if at_end else refuse("the parabola has no minimum")
    below, above = np.sum(np.log(sizes) < fitted.log_n), np.sum(np.log(sizes) > fitted.log_n)
    # Among many noisy sizes the least loss may be an end's by chance: then more than one size must lie on either side.
    if min(below, above) < (2 if at_end else 1):
        return outside("smallest" if below < above else "largest")
    if fitted.loss <= 0:
        return refuse(f"its parabola's least loss is {fitted.loss:.3g}: no parabola describes these losses")
    return Slice(name, len(n), log_c, fitted.log_n, fitted.loss, fitted.curvature, None)


@dataclass(frozen=True)
class Parabola:
    """loss = loss + curvature (log N - log_n)^2; NaN where it has no minimum. `bent`: the cubic term's t."""

    curvature: float
    log_n: float
    loss: float
    bent: float


def _parabola(log_n: np.ndarray, loss: np.ndarray, reach: float) -> Parabola:
    """Through the runs within `reach` of its own minimum, which is looked for from the size of the least loss."""
    sizes = np.unique(log_n)
    means = np.array([loss[log_n == size].mean() for size in sizes])
    beside = (len(sizes) - 1) // 6  # of many sizes, the least mean of neighbours: the least loss alone may be noise
    centre = sizes[beside + np.argmin(np.convolve(means, np.ones(2 * beside + 1), "valid"))]
    before = None
    for _ in range(ROUNDS):
        near = _window(sizes, centre, reach)
        if before is not None and np.array_equal(near, before):
            break
        inside, middle, before = np.isin(log_n, near), near.mean(), near
        curve, slope, height = np.polyfit(log_n[inside] - middle, loss[inside], 2)
        if curve <= 0:
            return Parabola(float(curve), np.nan, np.nan, _cubic(log_n[inside], loss[inside]))
        centre = float(np.clip(middle - slope / (2 * curve), sizes[0], sizes[-1]))
    vertex, least = middle - slope / (2 * curve), height - slope**2 / (4 * curve)
    return Parabola(float(curve), float(vertex), float(least), _cubic(log_n[inside], loss[inside]))


def _window(sizes: np.ndarray, centre: float, reach: float) -> np.ndarray:
    """The sizes within `reach` of the centre, but `FEWEST` at least: the nearest, then."""
    near = sizes[np.abs(sizes - centre) <= reach]
    if len(near) >= min(FEWEST, len(sizes)):
        return near
    return np.sort(sizes[np.argsort(np.abs(sizes - centre), kind="stable")[:FEWEST]])


def _cubic(x: np.ndarray, loss: np.ndarray) -> float:
    """Size of the t value of a cubic term; 0 where no degree of freedom is left to tell."""
    if len(x) < FEWEST + 1:
        return 0.0
    powers = np.vander((x - x.mean()) / np.ptp(x), 4)
    found, *_ = np.linalg.lstsq(powers, loss, rcond=None)
    rest = loss - powers @ found
    spread = np.linalg.pinv(powers.T @ powers)[0, 0] * (rest @ rest) / (len(x) - 4)
    return float(abs(found[0]) / np.sqrt(max(spread, 1e-300)))


def parabolas(found: list[Slice]) -> PowerLaw | None:
    """The power law through the minima of the slices that have one; None below 3 budgets."""
    kept = [one for one in found if one.refused is None]
    return _line(np.array([one.log_c for one in kept]), np.array([one.log_n for one in kept]), len(kept))


def least_losses(found: list[Slice]) -> PowerLaw | None:
    """The least loss as a power of C, through the same minima. It has no floor: far beyond the data it is too low."""
    kept = [one for one in found if one.refused is None]
    return _line(np.array([one.log_c for one in kept]), np.log([one.loss for one in kept]), len(kept))


def envelope(n: np.ndarray, c: np.ndarray, loss: np.ndarray, runs: np.ndarray) -> PowerLaw | None:
    """The power law through the best run at each budget, from several points of each run's training curve.

    n, c, loss, runs: of (points,); `runs` says which run a point is of.
    Points of a run count only if its learning rate allows it: those of an unfinished cosine are too high. The runs on
    the envelope are what is independent, so the interval's degrees of freedom are theirs. None below 3 of them.
    """
    curves = []
    for run in sorted(set(runs)):
        mine = np.argsort(c[runs == run], kind="stable")
        points = [values[runs == run][mine] for values in (c, loss, n)]
        if len(mine) > 1:
            curves.append((np.log(points[0]), points[1], float(np.log(points[2][0]))))
    if len(curves) < 3:
        return None
    grid = np.linspace(min(x[0] for x, *_ in curves), max(x[-1] for x, *_ in curves), ENVELOPE_POINTS)
    losses = np.array([np.interp(grid, x, y, left=np.inf, right=np.inf) for x, y, _ in curves])
    best = np.argmin(losses, axis=0)
    # Where the smallest or largest run is best, a run beyond the table might be better: no optimum there.
    sizes = np.array([size for *_, size in curves])
    inside = np.isfinite(losses.min(0)) & (sizes[best] > sizes.min()) & (sizes[best] < sizes.max())
    return _line(grid[inside], sizes[best][inside], len(set(best[inside])))


def _line(x: np.ndarray, y: np.ndarray, independent: int) -> PowerLaw | None:
    if independent < 3 or np.ptp(x) == 0:
        return None
    slope, height = np.polyfit(x - x.mean(), y, 1)
    rest = y - height - slope * (x - x.mean())
    degrees = independent - 2
    error = np.sqrt(
        np.sum(rest**2) / len(x) * independent / degrees / (np.sum((x - x.mean()) ** 2) * independent / len(x))
    )
    reach = stdtrit(degrees, (1 + LEVEL) / 2) * error
    return PowerLaw(
        float(slope), (float(slope - reach), float(slope + reach)), float(height - slope * x.mean()), independent
    )
