"""Intervals for every parameter and derived number: profiles of the objective, with thresholds from a bootstrap.

A profile is the least objective when one quantity is held at a value. Its rise over the minimum, times (runs -
parameters) over the minimum, is F: for squares and normal noise it follows an F distribution whatever the law's
curvature, because it does not depend on how the law is parametrised. An interval is where F stays below a threshold.
For other objectives and errors the threshold is not known in closed form, so it is measured: new data are drawn as
scaling.fit.resampling says, the law is fitted to each with and without the quantity held at its fitted value, and the
quantile of F over these draws is the threshold. Percentiles of a bootstrap are not used: with 20 to 60 runs they miss
the truth too often.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import stdtrit

from scaling.fit.law_fit import Fit
from scaling.fit.resampling import Draws, chosen_kind, draw, widened
from scaling.fit.solver import Problem, quantities, solve

LEVELS = (0.95, 0.8)
CALIBRATION = 1000  # draws that thresholds are measured on: their own error is then 0.7% of coverage
FEW = 8  # degrees of freedom below which no threshold is under the F distribution's for squares
LADDER = (0.5, 1, 1.5, 2, 2.5, 3, 4, 6, 10, 20, 50, 200, 1000)  # steps along a profile, in bootstrap deviations
FARTHEST = 40.0  # along the log of a quantity: 17 powers of ten are as good as 0 or infinity
CLOSER = 4  # rounds that narrow a crossing down
CURVE = (0.3, 0.6, 1, 1.5, 2, 2.5, 3, 4, 6, 10)
PULL = 1e4
STILL = 1e-12  # a quantity that moves by less in every draw follows from what is fixed or tied,
GIVEN = 1e-16  # which this spread stands for: its interval is its value


@dataclass(frozen=True)
class Uncertainty:
    """Intervals of a fit, in the order of `fit.names`. An open end is 0 or inf where the quantity is positive."""

    draws: np.ndarray  # [draws, quantities], logs of the positive ones, from refits
    thetas: np.ndarray  # [draws, parameters], of the same refits
    intervals: dict[float, np.ndarray]  # level -> [quantities, 2]
    thresholds: dict[float, np.ndarray]  # level -> [quantities], of F
    failed: int  # draws whose fit did not converge
    noise: float  # size of the residuals' noise, as a share of the loss
    kind: str  # what was drawn: residuals, cases or runs
    independent: int  # how many of them


def bootstrap(
    fit: Fit, draws: int, seed: int = 0, kind: str | None = None, runs: np.ndarray | None = None
) -> Uncertainty:
    """Intervals from `draws` refits; deterministic in `seed`. `kind` is one of resampling.KINDS, by the table's form
    unless said; `runs` labels the run that each row is a point of. Raises ValueError for fewer than 100 draws.
    """
    if draws < 100:
        raise ValueError(f"{draws} bootstrap draws cannot tell a 95% interval; use 100 or more, 4000 for publication")
    drawn = draw(fit, draws, seed, kind or chosen_kind(fit, runs), runs)
    free = solve(fit.law, fit.runs, Problem(fit.theta, drawn.log_losses, fit.objective.width, weights=drawn.weights))
    spread = _spread(free.scores, fit.scores)
    held = min(draws, CALIBRATION)
    statistic = _held_statistic(fit, drawn, free.value[:held], free.scores[:held], spread)
    thresholds = {level: _thresholds(statistic, level, _least_threshold(fit, drawn, level)) for level in LEVELS}
    if drawn.kind != "residuals":
        wider = {level: widened(level, drawn.independent, len(fit.theta)) for level in LEVELS}
        thresholds = {level: threshold * wider[level] for level, threshold in thresholds.items()}
    intervals = profile_intervals(fit, spread, thresholds)
    failed = int(np.sum(~free.converged))
    return Uncertainty(
        free.scores, free.theta, intervals, thresholds, failed, drawn.size, drawn.kind, drawn.independent
    )


def _least_threshold(fit: Fit, drawn: Draws, level: float) -> float:
    """The F distribution's, where squares or few degrees of freedom make it the better guide; else 0."""
    if fit.objective.kind == "mse" or fit.degrees_of_freedom < FEW:
        return float(stdtrit(max(fit.degrees_of_freedom, 1), (1 + level) / 2) ** 2)
    return 0.0


@dataclass(frozen=True)
class Points:
    """Points of several profiles: the quantity's value reached, F there, and the theta."""

    reached: np.ndarray
    statistic: np.ndarray
    theta: np.ndarray


def profile(fit: Fit, which: np.ndarray, targets: np.ndarray, spread: np.ndarray, theta: np.ndarray) -> Points:
    """One point of each profile, arrays of one length; `which` indexes `fit.names`, `theta` is where to start.

    The pull towards a target is finite, so the value reached is a little off; the point is on the profile exactly.
    Start from a neighbour: far from it another optimum waits, where a flat term takes the floor's place.
    """
    least = _least(fit)
    pull = PULL * least / fit.degrees_of_freedom / spread**2
    found = solve(fit.law, fit.runs, Problem(theta, fit.log_loss, fit.objective.width, which, targets, pull))
    statistic = _statistic(found.value, least, fit.degrees_of_freedom)
    return Points(found.scores[np.arange(len(which)), which], statistic, found.theta)


def profile_curve(fit: Fit, row: int, spread: float) -> tuple[np.ndarray, np.ndarray]:
    """A whole profile, from low to high: values of the quantity and F, at the steps of `CURVE` on both sides."""
    which, signs = np.array([row, row]), np.array([-1.0, 1.0])
    theta, sides = np.tile(fit.theta, (2, 1)), [(np.full(2, fit.scores[row]), np.zeros(2))]
    for step in CURVE:
        point = profile(fit, which, fit.scores[row] + signs * step * spread, np.full(2, spread), theta)
        theta = point.theta
        sides.append((point.reached, point.statistic))
    value, statistic = (np.array(part) for part in zip(*sides, strict=True))
    join = lambda part: np.concatenate([part[:0:-1, 0], part[:, 1]])
    return join(value), join(statistic)


def profile_intervals(fit: Fit, spread: np.ndarray, thresholds: dict[float, np.ndarray]) -> dict[float, np.ndarray]:
    """Level -> [quantities, 2]: where each profile crosses its threshold, below and above; open where it never does.

    Walks outwards along `LADDER`, each point from the one before, until every profile has crossed; then closes in.
    """
    count, levels = len(fit.names), len(thresholds)
    which = np.tile(np.repeat(np.arange(count), 2), levels)
    signs = np.tile([-1.0, 1.0], count * levels)
    bound = np.sqrt(np.concatenate([np.repeat(threshold, 2) for threshold in thresholds.values()]))
    scores, steps = fit.scores[which], spread[which]
    most = np.where(fit.logged[which], FARTHEST, np.inf)
    near, near_height, theta = np.zeros(len(which)), np.zeros(len(which)), np.tile(fit.theta, (len(which), 1))
    far, far_height = np.full(len(which), np.inf), np.full(len(which), np.inf)

    def advance(gone: np.ndarray) -> None:
        """Takes points at distances `gone`: below the bound they are the new near ends, above it the far ends."""
        point = profile(fit, which, scores + signs * gone, steps, theta)
        distance, height = signs * (point.reached - scores), np.sqrt(point.statistic)
        over = (height >= bound) & (distance > near) & (distance < far)
        under = (height < bound) & (distance > near) & (distance < far)
        far[over], far_height[over] = distance[over], height[over]
        near[under], near_height[under], theta[under] = distance[under], height[under], point.theta[under]

    def crossing() -> np.ndarray:
        share = (bound - near_height) / np.maximum(far_height - near_height, 1e-300)
        return near + np.clip(np.where(np.isfinite(far), share, 0), 0, 1) * np.where(np.isfinite(far), far - near, 0)

    for reach in LADDER:
        if np.all(np.isfinite(far) | _given(fit, steps, which)):
            break
        advance(np.where(np.isfinite(far), crossing(), np.minimum(reach * steps, most)))
    for _ in range(CLOSER):
        gap = np.where(np.isfinite(far), far - near, 0)
        advance(np.clip(crossing(), near + 0.1 * gap, near + 0.9 * gap))
    given = _given(fit, steps, which)
    gone = np.where(given, 0, np.where(np.isfinite(far), crossing(), np.inf))
    ends = (scores + signs * gone).reshape(levels, count, 2)
    ends = np.where(fit.logged[:, None], np.exp(np.where(fit.logged[:, None], ends, 0)), ends)
    return dict(zip(thresholds, ends, strict=True))


def intervals_at(fit: Fit, certain: Uncertainty, budget: float) -> dict[float, np.ndarray]:
    """Level -> [quantities, 2]: the intervals for another budget, in FLOPs, than the bootstrap was made for.

    Profiles of their own; the thresholds stay, as F does not depend on units and hardly on the budget.
    """
    other = replace(fit, log_budget=float(np.log(budget)))
    return profile_intervals(other, _spread(_scores(other, certain.thetas), other.scores), certain.thresholds)


def _scores(fit: Fit, thetas: np.ndarray) -> np.ndarray:
    """[thetas, quantities] at the fit's budget."""
    with jax.enable_x64(True):
        one = lambda theta: quantities(fit.law, theta, fit.centre, jnp.float64(fit.log_budget))
        return np.asarray(jax.vmap(one)(jnp.asarray(thetas)))


def _spread(scores: np.ndarray, fitted: np.ndarray) -> np.ndarray:
    """Robust standard deviation of each quantity over draws; `GIVEN` for one that never moves."""
    moved = np.abs(scores - fitted)
    spread = np.maximum(1.4826 * np.nanmedian(moved, axis=0), 10 * GIVEN)
    return np.where(np.nanmax(moved, axis=0) <= STILL, GIVEN, spread)


def _given(fit: Fit, steps: np.ndarray, which: np.ndarray) -> np.ndarray:
    """Derived quantities that never move. A parameter that does not is one that no run depends on: it is open."""
    return (steps <= GIVEN) & (which >= len(fit.law.parameters))


def _least(fit: Fit) -> float:
    """The solver's objective at the fit."""
    return max(float(solve(fit.law, fit.runs, Problem(fit.theta, fit.log_loss, fit.objective.width)).value[0]), 1e-300)


def _thresholds(statistic: np.ndarray, level: float, least: float) -> np.ndarray:
    """Quantiles for each quantity, no less than their median or `least`.

    A floor fitted near 0 can move one way only, so its own F is too small.
    """
    own = np.nanquantile(statistic, level, axis=0)
    return np.maximum(own, max(float(np.median(own)), least))


def _statistic(held, free, degrees: int) -> np.ndarray:
    return np.maximum(held - free, 0) / np.maximum(free, 1e-300) * degrees


def _miss(fitted: np.ndarray, free: np.ndarray, reached: np.ndarray) -> np.ndarray:
    """The pull leaves the quantity a little short of its fitted value; F grows as the square of the distance gone."""
    gone, whole = reached - free, fitted - free
    return np.where(gone == 0, 1, (whole / np.where(gone == 0, 1, gone)) ** 2).clip(0.25, 4)


def _held_statistic(fit: Fit, drawn: Draws, free_value, free_scores, spread) -> np.ndarray:
    """[draws, quantities]: F of each draw's fit with the quantity held at its fitted value."""
    draws, count = free_scores.shape
    which = np.tile(np.arange(count), draws)
    pull = PULL * _least(fit) / fit.degrees_of_freedom / spread**2
    repeat = lambda values, dims: np.repeat(values[:draws], count, axis=0) if np.ndim(values) > dims else values
    log_losses, weights = repeat(drawn.log_losses, 1), repeat(drawn.weights, 1)
    held = (which, fit.scores[which], pull[which], weights)
    found = solve(fit.law, fit.runs, Problem(fit.theta, log_losses, fit.objective.width, *held))
    reached = found.scores[np.arange(len(which)), which].reshape(draws, count)
    statistic = _statistic(found.value.reshape(draws, count), free_value[:, None], fit.degrees_of_freedom)
    return statistic * _miss(fit.scores, free_scores, reached)
