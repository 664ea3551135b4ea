"""Fixed and tied parameters, own laws, linear residuals: each against the fit that it must equal."""

import numpy as np
import pytest
from scipy.optimize import minimize

from scaling.fit.constraints import constrained, numbers, pairs
from scaling.fit.law_fit import fit
from scaling.fit.laws import HOFFMANN, KAPLAN, predict
from scaling.fit.own_law import own_law
from scaling.fit.solver import Objective
from scaling.fit.uncertainty import bootstrap

pytestmark = pytest.mark.long

TRUTH = {"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658}


@pytest.fixture(scope="module")
def runs():
    rng = np.random.default_rng(0)
    sizes = {"N": 10 ** rng.uniform(7, 10, 32), "D": 10 ** rng.uniform(9, 11, 32)}
    return sizes, predict(HOFFMANN, TRUTH, sizes) * np.exp(0.003 * rng.standard_normal(32))


def test_a_parameter_fixed_at_its_optimum_changes_nothing(runs):
    whole = fit(HOFFMANN, *runs)
    for names in (("A",), ("B", "beta")):
        rest = fit(constrained(HOFFMANN, {name: whole.parameters[name] for name in names}, {}), *runs)
        assert rest.value == pytest.approx(whole.value, rel=1e-9)
        assert rest.quantities == pytest.approx({k: v for k, v in whole.quantities.items() if k not in names}, rel=1e-4)
        assert rest.degrees_of_freedom == whole.degrees_of_freedom + len(names)


def test_tied_exponents_are_the_law_with_one(runs):
    tied = fit(constrained(HOFFMANN, {}, {"beta": "alpha"}), *runs)
    written = fit(own_law("L = E + A*N^(-a) + B*D^(-a)"), *runs)
    assert tied.value == pytest.approx(written.value, rel=1e-9)
    assert tied.parameters["alpha"] == pytest.approx(written.parameters["a"], rel=1e-5)
    assert tied.quantities["N exponent"] == pytest.approx(0.5)
    low, high = bootstrap(tied, 100).intervals[0.95][tied.names.index("N exponent")]
    assert low == pytest.approx(0.5) == high  # it follows from the tie: nothing to be unsure of


@pytest.mark.parametrize(
    ("law", "parameters", "fixed"),
    [
        (KAPLAN, {"N_c": 8.8e13, "D_c": 5.4e13, "alpha_N": 0.076, "alpha_D": 0.095}, "N_c"),
    ],
)
def test_other_laws_can_be_fixed_too(runs, law, parameters, fixed):
    sizes, _ = runs
    found = fit(constrained(law, {fixed: parameters[fixed]}, {}), sizes, predict(law, parameters, sizes))
    assert found.parameters == pytest.approx({k: v for k, v in parameters.items() if k != fixed}, rel=1e-5)


@pytest.mark.parametrize(
    ("text", "law"),
    [
        ("E + A / N^alpha + B / D^beta", HOFFMANN),
        ("L = ((N_c / N)^(alpha_N / alpha_D) + D_c / D)^alpha_D", KAPLAN),
    ],
)
def test_an_own_law_is_the_law_it_writes(runs, text, law):
    named, own = fit(law, *runs), fit(own_law(text), *runs)
    assert own.value == pytest.approx(named.value, rel=1e-8)
    assert own.parameters == pytest.approx(named.parameters, rel=1e-3)
    assert own.predict({"N": np.array([1e11]), "D": np.array([2e12])}) == pytest.approx(
        named.predict({"N": np.array([1e11]), "D": np.array([2e12])}), rel=1e-4
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("N / D", "has 0 parameters"),
        ("E + A", "reads sizes none"),
        ("E < N", "compares"),
        ("E + A.b / N", "Attribute is not allowed"),
        ("E + + / N", "is not an expression"),
    ],
)
def test_what_is_no_law(text, message):
    with pytest.raises(ValueError, match=message):
        own_law(text)


def test_linear_residuals_are_least_squares_of_the_loss(runs):
    sizes, loss = runs
    found = fit(HOFFMANN, sizes, loss, Objective("mse", linear=True))
    value = lambda p: np.sum((predict(HOFFMANN, dict(zip(TRUTH, p, strict=True)), sizes) - loss) ** 2)
    point = np.array(list(found.parameters.values()))
    assert found.value == pytest.approx(value(point), rel=1e-9)
    start = point * (1 + 0.003 * np.random.default_rng(0).standard_normal(5))
    searched = minimize(value, start, method="Nelder-Mead", options={"maxfev": 600, "xatol": 1e-9, "fatol": 1e-15})
    assert searched.fun >= found.value * (1 - 1e-9)
    assert found.parameters["E"] != pytest.approx(
        fit(HOFFMANN, sizes, loss, Objective("mse")).parameters["E"], rel=1e-9
    )


@pytest.mark.parametrize(
    ("fixed", "tied", "message"),
    [
        ({"gamma": 1}, {}, "--fix gamma: the law hoffmann has E, A, B"),
        ({"E": -1}, {}, "--fix E=-1 must be above 0"),
        ({}, {"alpha": "E"}, "one is a coefficient"),
        ({"alpha": 0.3}, {"beta": "alpha"}, "both must be free"),
        (dict.fromkeys(TRUTH, 1.0), {}, "nothing is left to fit"),
    ],
)
def test_mistakes(fixed, tied, message):
    with pytest.raises(ValueError, match=message):
        constrained(HOFFMANN, fixed, tied)


def test_pairs_of_options():
    assert numbers(["N=2.8B,D=1.4T"], "--at") == {"N": 2.8e9, "D": 1.4e12}
    for text, message in (("alpha", "must be NAME=VALUE"), ("a=1,a=2", "a twice"), ("a=x", "x is not a number")):
        with pytest.raises(ValueError, match=message):
            numbers([text], "--fix")
    assert pairs(["a=b"], "--tie") == {"a": "b"}
