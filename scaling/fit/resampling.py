"""What a bootstrap draws: new losses around the surface, or new weights of rows or of whole runs.

Which is right depends on the table. Drawn residuals suppose that errors are independent and of one size everywhere,
and are the best for few rows. Weights of rows (a case bootstrap) let errors be larger in one corner than in another.
Weights of whole runs (a cluster bootstrap) let the points of one training curve share their error.

Weights are exponential with mean 1, not counts of a draw with replacement (Rubin's Bayesian bootstrap): every row keeps
some weight, so no draw loses the only small model of the table.
"""

from dataclasses import dataclass, replace

import numpy as np
from scipy.special import ndtri, stdtrit

from scaling.fit.law_fit import Fit
from scaling.fit.solver import Problem, solve

KINDS = ("residuals", "cases", "runs")
CASES_FROM = 8  # rows a parameter, from which weights of rows are taken: for fewer, residuals hold the truth more often
EFFICIENT = 1.345  # Huber's delta over the residuals' size: 95% efficient for normal noise
SMOOTHING = 0.5  # the normal kernel's width over the residuals' size
FEWEST = 1e-6  # a loss drawn below 0, which only linear residuals can give, is this


@dataclass(frozen=True)
class Draws:
    """Of a bootstrap: log losses and weights, [draws, runs] each or one row for all."""

    kind: str  # of KINDS
    log_losses: np.ndarray
    weights: np.ndarray
    independent: int  # what is drawn: rows, or runs
    size: float  # of the residuals' noise, as a share of the loss


def robust_size(residuals: np.ndarray, spent: int) -> float:
    """Standard deviation by the median of absolute residuals, widened for `spent` parameters."""
    n = len(residuals)
    return float(1.4826 * np.median(np.abs(residuals)) * np.sqrt(n / max(n - spent, 1)))


def noise_residuals(fit: Fit) -> np.ndarray:
    """Residuals, (runs,), that stand for the noise: of a robust fit nearly as efficient as squares, widened."""
    scale = np.exp(fit.log_loss.mean()) if fit.objective.linear else 1.0
    size = max(robust_size(fit.residuals, len(fit.theta)), 1e-12) * scale
    theta = solve(fit.law, fit.runs, Problem(fit.theta, fit.log_loss, EFFICIENT * size)).theta[0]
    residuals = replace(fit, theta=theta).log_surface - fit.log_loss
    return residuals * np.sqrt(len(residuals) / max(fit.degrees_of_freedom, 1))


def chosen_kind(fit: Fit, runs: np.ndarray | None) -> str:
    """The bootstrap that a table's form asks for: `runs` where rows share them, `cases` for many rows."""
    if runs is not None and len(set(runs)) < len(runs):
        return "runs"
    return "cases" if len(fit.log_loss) >= CASES_FROM * len(fit.theta) else "residuals"


def draw(fit: Fit, draws: int, seed: int, kind: str, runs: np.ndarray | None) -> Draws:
    """The draws; deterministic in `seed`. Raises ValueError for `runs` without a column of them, or with one run."""
    rng, noise, rows = np.random.default_rng(seed), noise_residuals(fit), len(fit.log_loss)
    size = float(np.sqrt(np.mean(noise**2)))
    if kind == "residuals":
        picked = rng.choice(noise, (draws, rows))
        drawn = (picked + SMOOTHING * size * rng.standard_normal(picked.shape)) / np.sqrt(1 + SMOOTHING**2)
        surface = fit.log_loss + fit.residuals
        if fit.objective.linear:  # errors are of one size in the loss
            scale = np.exp(surface.mean())
            return Draws(kind, np.log(np.maximum(np.exp(surface) + scale * drawn, FEWEST)), np.ones(()), rows, size)
        return Draws(kind, surface + drawn, np.ones(()), rows, size)
    labels = np.arange(rows) if kind == "cases" else runs
    if labels is None:
        raise ValueError("a bootstrap of runs needs --run: the column that says which run a row is a point of")
    names, which = np.unique(labels, return_inverse=True)
    if len(names) < 3:
        raise ValueError(f"a bootstrap of {kind} needs 3 or more of them; the table has {len(names)}")
    weights = rng.standard_exponential((draws, len(names)))
    return Draws(kind, fit.log_loss, (weights / weights.mean(1, keepdims=True))[:, which], len(names), size)


def widened(level: float, independent: int, spent: int) -> float:
    """By how much a threshold of F rises for few drawn things, as Student's t exceeds the normal distribution."""
    degrees = max(independent - spent, 2)
    return float((stdtrit(degrees, (1 + level) / 2) / ndtri((1 + level) / 2)) ** 2)
