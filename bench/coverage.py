"""How often intervals hold the truth: python bench/coverage.py [trials] [draws].

Fits Hoffmann's law to surfaces with known parameters and normal noise in log loss, for several designs and
objectives, and prints the share of trials in which each parameter lies inside its stated 95% interval. The error of a
share over 200 trials is 1.5%.
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
# runs, noise, objective
DESIGNS = (
    *((20, 0.001, "mse"), (40, 0.01, "mse"), (60, 0.02, "mse")),
    *((20, 0.001, "huber"), (40, 0.005, "huber"), (60, 0.02, "huber"), (40, 0.005, "l1")),
)


def surface(runs: int, noise: float, rng: np.random.Generator) -> tuple[dict, np.ndarray]:
    """Runs over three decades of C and a factor of 16 of D / N on both sides of 20."""
    c, ratio = 10 ** rng.uniform(18, 21, runs), 20 * 4 ** rng.uniform(-2, 2, runs)
    n = np.sqrt(c / 6 / ratio)
    sizes = {"N": n, "D": n * ratio}
    return sizes, predict(LAW, TRUTH, sizes) * np.exp(noise * rng.standard_normal(runs))


def coverage(runs: int, noise: float, kind: str, trials: int, draws: int) -> np.ndarray:
    """[parameters]: the share of trials whose 95% interval holds the truth."""
    inside = np.zeros(len(LAW.parameters))
    truth = np.array([TRUTH[name] for name in LAW.parameters])
    for trial in range(trials):
        sizes, loss = surface(runs, noise, np.random.default_rng(trial))
        low, high = bootstrap(fit(LAW, sizes, loss, Objective(kind)), draws, seed=trial).intervals[0.95].T
        inside += (low <= truth) & (truth <= high)
    return inside / trials


if __name__ == "__main__":
    TRIALS, DRAWS = (int(argument) for argument in sys.argv[1:3] or ("200", "300"))
    print(f"{'runs':>5} {'noise':>6} {'loss':>6}", *(f"{name:>6}" for name in LAW.parameters), "    s")
    for RUNS, NOISE, KIND in DESIGNS:
        began = time.perf_counter()
        shares = coverage(RUNS, NOISE, KIND, TRIALS, DRAWS)
        took = time.perf_counter() - began
        print(f"{RUNS:5} {NOISE:6} {KIND:>6}", *(f"{share:6.1%}" for share in shares), f"{took:5.0f}", flush=True)
