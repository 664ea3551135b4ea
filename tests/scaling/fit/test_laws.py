"""Laws: published coefficients give published losses; each law is found again from its own noiseless surface."""

import math

import numpy as np
import pytest

from scaling.fit.law_fit import fit
from scaling.fit.laws import ANNEALING, GADRE, HOFFMANN, KAPLAN, LAWS, MUENNIGHOFF, STEP_TIME, annealing_areas, predict
from scaling.fit.solver import Objective

TRUTH = {
    HOFFMANN: {"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658},
    KAPLAN: {"N_c": 8.8e13, "D_c": 5.4e13, "alpha_N": 0.076, "alpha_D": 0.095},
    MUENNIGHOFF: {"E": 1.87, "A": 521, "B": 1488, "alpha": 0.353, "beta": 0.36, "R_N*": 5.3, "R_D*": 15.4},
    GADRE: {"E": 1.5, "a": 180.0, "b": 240.0, "eta": 0.15},
    ANNEALING: {"L0": 2.6, "A": 0.6, "alpha": 0.5, "C": 0.002},
    STEP_TIME: {"fixed": 0.02, "rate": 2e14, "bandwidth": 1e11},
}


def sizes_of(law, runs=32, seed=0):
    rng = np.random.default_rng(seed)
    if law is ANNEALING:
        steps = np.arange(1, 401) / 400
        areas = [annealing_areas(np.minimum(1, (1 - steps) / share)) for share in (0.1, 0.3, 0.6, 1.0)]
        kept = slice(40, None, 45)
        return {name: np.concatenate([pair[which][kept] for pair in areas]) for which, name in enumerate(("S1", "S2"))}
    if law is STEP_TIME:
        devices = rng.choice([8.0, 16, 64, 256], runs)
        return {"F": 10 ** rng.uniform(15, 18, runs), "P": devices, "V": 10 ** rng.uniform(8, 11, runs)}
    n, d = 10 ** rng.uniform(7, 10, runs), 10 ** rng.uniform(9, 11, runs)
    return {"N": n, "D": d, "U": d / rng.choice([1, 1, 4, 20, 60], runs)}


def test_muennighoff_golden_value():
    """The published coefficients, to the last digit of the reference implementation in float64."""
    logs = {"E": 0.6254804, "A": 6.255414, "B": 7.3049974}
    parameters = {name: math.exp(log) for name, log in logs.items()}
    parameters |= {"alpha": 0.3526596, "beta": 0.3526596, "R_N*": 5.309743, "R_D*": 15.387756}
    loss = predict(MUENNIGHOFF, parameters, {"N": 6.34e9, "D": 242e9, "U": 25e9})
    assert loss == pytest.approx(2.2256440889984477, rel=1e-15)


def test_formulas_written_out():
    n, d = 3e8, 2e10
    assert predict(HOFFMANN, TRUTH[HOFFMANN], {"N": n, "D": d}) == pytest.approx(
        1.8172 + 482.01 / n**0.3478 + 2085.43 / d**0.3658, rel=1e-13
    )
    assert predict(KAPLAN, TRUTH[KAPLAN], {"N": n, "D": d}) == pytest.approx(
        ((8.8e13 / n) ** (0.076 / 0.095) + 5.4e13 / d) ** 0.095, rel=1e-13
    )
    c, m = 6 * n * d, d / n
    assert predict(GADRE, TRUTH[GADRE], {"N": n, "D": d}) == pytest.approx(
        1.5 + (180 * m**0.15 + 240 / m**0.15) / c**0.15, rel=1e-13
    )
    assert predict(ANNEALING, TRUTH[ANNEALING], {"S1": 7.0, "S2": 3.0}) == pytest.approx(2.6 + 0.6 / 7**0.5 - 0.006)
    seconds = 0.02 + 1e17 / (64 * 2e14) + 3e9 / 1e11
    assert predict(STEP_TIME, TRUTH[STEP_TIME], {"F": 1e17, "P": 64, "V": 3e9}) == pytest.approx(seconds, rel=1e-13)


def test_annealing_areas_by_definition():
    rates, decay = np.array([0.1, 0.5, 1.0, 1.0, 0.6, 0.3]), 0.9
    s1, s2 = annealing_areas(rates, decay)
    falls = [rates[k - 1] - rates[k] for k in range(1, 6)]
    expected = sum(fall * decay ** (i - k) for i in range(6) for k, fall in enumerate(falls, start=1) if k <= i)
    assert s1[-1] == pytest.approx(3.5)
    assert s2[-1] == pytest.approx(expected)


@pytest.mark.long
@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_noiseless_surface_is_found(law):
    sizes = sizes_of(law)
    for kind in ("huber", "mse"):
        fitted = fit(law, sizes, predict(law, TRUTH[law], sizes), Objective(kind))
        assert fitted.parameters == pytest.approx(TRUTH[law], rel=1e-6)
        assert fitted.reached >= fitted.starts // 3


@pytest.mark.parametrize("law", [HOFFMANN, KAPLAN, GADRE], ids=lambda law: law.name)
def test_optimum_is_the_least_loss_of_its_budget(law):
    budget = 1e21
    sizes = sizes_of(law)
    best = fit(law, sizes, predict(law, TRUTH[law], sizes), budget=budget).quantities
    n = best["N at budget"] * np.array([0.9, 0.99, 1, 1.01, 1.1])
    losses = predict(law, TRUTH[law], {"N": n, "D": budget / (6 * n)})
    assert np.argmin(losses) == 2
    assert losses[2] == pytest.approx(best["loss at budget"], rel=1e-6)
    assert 6 * best["N at budget"] * best["D at budget"] == pytest.approx(budget, rel=1e-9)
