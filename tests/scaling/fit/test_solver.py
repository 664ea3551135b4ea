"""The optimiser against scipy on noisy surfaces, for each objective; nothing of the caller's settings changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linprog, minimize

from scaling.fit.law_fit import fit
from scaling.fit.laws import HOFFMANN, predict
from scaling.fit.solver import Objective

TRUTH = {"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658}


def surface(runs=30, noise=0.01, seed=0):
    rng = np.random.default_rng(seed)
    sizes = {"N": 10 ** rng.uniform(7.5, 9.5, runs), "D": 10 ** rng.uniform(9, 11, runs)}
    return sizes, predict(HOFFMANN, TRUTH, sizes) * np.exp(noise * rng.standard_normal(runs))


def residuals(point, sizes, loss):
    a, b, e, alpha, beta = point
    terms = [a - alpha * np.log(sizes["N"]), b - beta * np.log(sizes["D"]), np.full(len(loss), e)]
    return np.logaddexp.reduce(terms) - np.log(loss)


@pytest.mark.parametrize("kind", ["huber", "mse"])
@pytest.mark.parametrize("noise", [0.001, 0.02])
def test_no_search_finds_less(kind, noise):
    sizes, loss = surface(noise=noise)
    objective = Objective(kind)
    fitted = fit(HOFFMANN, sizes, loss, objective)
    p = fitted.parameters
    point = np.array([np.log(p["A"]), np.log(p["B"]), np.log(p["E"]), p["alpha"], p["beta"]])
    value = lambda point: float(objective.value(residuals(point, sizes, loss)))
    assert value(point) == pytest.approx(fitted.value, rel=1e-9)
    for seed in range(2):
        start = point + 0.003 * np.random.default_rng(seed).standard_normal(5)
        found = minimize(value, start, method="Nelder-Mead", options={"maxfev": 1500, "xatol": 1e-9, "fatol": 1e-15})
        assert found.fun >= fitted.value * (1 - 1e-9)


def test_l1_is_a_vertex_that_linear_programming_confirms():
    """At an L1 optimum no small step lowers the sum: the linear programme of the linearised residuals agrees."""
    sizes, loss = surface(runs=24)
    fitted = fit(HOFFMANN, sizes, loss, Objective("l1"))
    with jax.enable_x64(True):
        predicted = lambda theta: HOFFMANN.log_loss(theta, fitted.features, fitted.centre)
        jacobian = np.asarray(jax.jacfwd(predicted)(jnp.asarray(fitted.theta)))
    runs, count = jacobian.shape
    cost = np.concatenate([np.zeros(count), np.ones(runs)])
    above = np.block([[jacobian, -np.eye(runs)], [-jacobian, -np.eye(runs)]])
    bound = np.concatenate([-fitted.residuals, fitted.residuals])
    step = linprog(cost, above, bound, bounds=[(-0.01, 0.01)] * count + [(0, None)] * runs)
    assert step.fun >= fitted.value * (1 - 1e-5)
    assert np.sum(np.abs(fitted.residuals) < 1e-7) == count


def test_deterministic_and_the_setting_stays():
    sizes, loss = surface()
    first, second = fit(HOFFMANN, sizes, loss), fit(HOFFMANN, sizes, loss)
    assert np.array_equal(first.theta, second.theta)
    assert jnp.zeros(1).dtype == jnp.float32


def test_sum_and_mean_and_order_of_runs_do_not_matter():
    sizes, loss = surface()
    twice = {letter: np.tile(values, 2) for letter, values in sizes.items()}
    assert fit(HOFFMANN, twice, np.tile(loss, 2)).parameters == pytest.approx(
        fit(HOFFMANN, sizes, loss).parameters, rel=1e-6
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda sizes, loss: ({name: x[:5] for name, x in sizes.items()}, loss[:5]), "needs 6 runs or more; got 5"),
        (lambda sizes, loss: (sizes, loss * np.nan), "loss: 30 finite positive numbers"),
        (lambda sizes, loss: ({**sizes, "D": np.full(30, 1e9)}, loss), "D is 1e\\+09 in every run"),
    ],
)
def test_mistakes_are_told(change, message):
    with pytest.raises(ValueError, match=message):
        fit(HOFFMANN, *change(*surface()))
