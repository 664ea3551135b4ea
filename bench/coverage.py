"""How often intervals hold the truth: python bench/coverage.py [trials] [draws] [words].

Fits Hoffmann's law to surfaces with known parameters, for several forms of tables, objectives and bootstraps, and
prints the share of trials in which each parameter lies inside its stated 95% interval. Words choose designs by their
names. The error of a share over 200 trials is 1.5%, over 40 trials 3.4%.

even: errors are normal, independent and of one size. uneven: they are larger in small runs than in large ones, 11 times
over three decades of C. points: eight points along each training curve, with one error of 0.5% for the curve and 0.1%
for a point.
"""

import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np

from scaling.fit.law_fit import fit
from scaling.fit.laws import HOFFMANN, predict
from scaling.fit.solver import Objective
from scaling.fit.uncertainty import bootstrap

LAW = replace(HOFFMANN, optimum=None)  # parameters only: derived quantities would double the time
TRUTH = {"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658}
POINTS = 8
# form, runs, noise, objective, bootstrap
DESIGNS = (
    *(("even", 20, 0.001, "mse", "residuals"), ("even", 40, 0.01, "mse", "residuals")),
    *(("even", 60, 0.02, "mse", "residuals"), ("even", 20, 0.001, "huber", "residuals")),
    *(("even", 40, 0.005, "huber", kind) for kind in ("residuals", "cases")),
    *(("even", 120, 0.005, "huber", "cases"), ("even", 40, 0.005, "l1", "residuals")),
    *(("uneven", runs, 0.005, "huber", kind) for runs in (40, 120) for kind in ("residuals", "cases")),
    *(("points", 20, 0.005, "huber", kind) for kind in ("residuals", "runs")),
    ("points", 8, 0.005, "huber", "runs"),
)


def surface(form: str, runs: int, noise: float, rng: np.random.Generator) -> tuple[dict, np.ndarray, np.ndarray]:
    """Sizes, losses and the run of each row: three decades of C, a factor of 16 of D / N on both sides of 20."""
    c, ratio = 10 ** rng.uniform(18, 21, runs), 20 * 4 ** rng.uniform(-2, 2, runs)
    n, labels = np.sqrt(c / 6 / ratio), np.arange(runs)
    d, error = n * ratio, noise * rng.standard_normal(runs)
    if form == "uneven":
        error *= 4 * np.exp(-0.8 * (np.log10(c) - 18))
    if form == "points":
        n, labels, error = (np.repeat(values, POINTS) for values in (n, labels, error))
        d = (d[:, None] * np.geomspace(1 / POINTS, 1, POINTS)).ravel()
        error = error + 0.2 * noise * rng.standard_normal(len(error))
    return {"N": n, "D": d}, predict(LAW, TRUTH, {"N": n, "D": d}) * np.exp(error), labels


def coverage(design: tuple, trials: int, draws: int) -> np.ndarray:
    """[parameters]: the share of trials whose 95% interval holds the truth."""
    form, runs, noise, objective, kind = design
    inside = np.zeros(len(LAW.parameters))
    truth = np.array([TRUTH[name] for name in LAW.parameters])
    for trial in range(trials):
        sizes, loss, labels = surface(form, runs, noise, np.random.default_rng(trial))
        found = bootstrap(fit(LAW, sizes, loss, Objective(objective)), draws, trial, kind, labels)
        low, high = found.intervals[0.95].T
        inside += (low <= truth) & (truth <= high)
    return inside / trials


if __name__ == "__main__":
    TRIALS, DRAWS = (int(argument) for argument in sys.argv[1:3] or ("200", "300"))
    print(f"{'table':28}", *(f"{name:>6}" for name in LAW.parameters), "    s")
    for DESIGN in DESIGNS:
        NAME = " ".join(map(str, DESIGN))
        if sys.argv[3:] and not all(word in NAME.split() for word in sys.argv[3:]):
            continue
        began = time.perf_counter()
        shares = coverage(DESIGN, TRIALS, DRAWS)
        took = time.perf_counter() - began
        print(f"{NAME:28}", *(f"{share:6.1%}" for share in shares), f"{took:5.0f}", flush=True)
