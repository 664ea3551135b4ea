"""Error of the isoFLOP exponent against the number of sizes: python bench/parabolas.py [trials].

Five budgets, sizes evenly spaced in log N within a factor of 4 of each optimum, noise of 0.2%, Hoffmann's law. Prints
the root mean square error of the exponent of the optimal N, with the window that the fit takes and through all points.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np

from scaling.fit.isoflop import parabolas, slices
from scaling.fit.laws import HOFFMANN, predict

TRUTH = {"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658}
EXPONENT = TRUTH["beta"] / (TRUTH["alpha"] + TRUTH["beta"])
BUDGETS = np.geomspace(1e18, 1e21, 5)


def best_n(c: np.ndarray) -> np.ndarray:
    e, a, b, alpha, beta = TRUTH.values()
    return (alpha * a / (beta * b) * (c / 6) ** beta) ** (1 / (alpha + beta))


def one(sizes: int, factor: float, noise: float, rng: np.random.Generator) -> tuple[float, float]:
    """The exponent's error with the window, and through all points."""
    c = np.repeat(BUDGETS, sizes)
    n = best_n(c) * np.tile(np.geomspace(1 / factor, factor, sizes), len(BUDGETS))
    loss = predict(HOFFMANN, TRUTH, {"N": n, "D": c / 6 / n}) * np.exp(noise * rng.standard_normal(len(n)))
    law = parabolas(slices(n, c, loss, c))
    whole = []
    for budget in BUDGETS:
        curve, slope, _ = np.polyfit(np.log(n[c == budget]), loss[c == budget], 2)
        whole.append(-slope / (2 * curve))
    every = np.polyfit(np.log(BUDGETS), whole, 1)[0]
    return (np.nan if law is None else law.exponent) - EXPONENT, every - EXPONENT


if __name__ == "__main__":
    TRIALS = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    print(f"{'factor':>6} {'sizes':>5} {'window':>8} {'all':>8}")
    for FACTOR in (4, 16):
        for SIZES in (5, 7, 15, 25, 50):
            rng = np.random.default_rng(0)
            errors = np.array([one(SIZES, FACTOR, 0.002, rng) for _ in range(TRIALS)])
            mean = np.sqrt(np.mean(errors**2, axis=0))
            print(f"{FACTOR:6} {SIZES:5}", *(f"{error:8.4f}" for error in mean), flush=True)
