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
NEIGHBOURS = 2  # sizes on each side of a slice's best that its parabola goes through: farther off it is none


@dataclass(frozen=True)
class PowerLaw:
    """N_opt, or the loss there, = coefficient C^exponent, over the table's budgets; the exponent's 95% interval."""

    exponent: float
    interval: tuple[float, float]
    log_coefficient: float
    budgets: int

    def at(self, budget: float) -> float:
        return float(np.exp(self.log_coefficient + self.exponent * np.log(budget)))

    def optimum(self, budget: float) -> dict[str, float]:
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
    """A parabola of loss in log N for each group's runs, in order of C; without an interior minimum it is refused."""
    found = [_slice(str(group), n[groups == group], c[groups == group], loss[groups == group]) for group in set(groups)]
    return sorted(found, key=lambda one: one.log_c)


def _slice(name: str, n: np.ndarray, c: np.ndarray, loss: np.ndarray) -> Slice:
    log_c, sizes = float(np.log(c).mean()), np.unique(n)
    refuse = lambda why: Slice(name, len(n), log_c, np.nan, np.nan, np.nan, why)
    if len(sizes) < 4:
        return refuse(f"{len(sizes)} model sizes; a parabola and one degree of freedom need 4")
    best = int(np.argmin([loss[n == size].mean() for size in sizes]))
    outside = lambda end: refuse(
        f"no interior minimum: the loss is least at the {end} model, so the optimum lies outside"
    )
    if best in (0, len(sizes) - 1):
        return outside("smallest" if best == 0 else "largest")
    near = sizes[max(0, best - NEIGHBOURS) : best + NEIGHBOURS + 1]
    near = near if len(near) >= 4 else sizes[:4] if best == 1 else sizes[-4:]
    around = np.isin(n, near)
    middle = np.log(near).mean()
    curve, slope, height = np.polyfit(np.log(n[around]) - middle, loss[around], 2)
    if curve <= 0:
        return refuse("the parabola has no minimum")
    vertex = middle - slope / (2 * curve)
    if not np.log(near[0]) < vertex < np.log(near[-1]):
        return outside("smallest" if vertex <= np.log(near[0]) else "largest")
    return Slice(name, len(n), log_c, float(vertex), float(height - slope**2 / (4 * curve)), float(curve), None)


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
