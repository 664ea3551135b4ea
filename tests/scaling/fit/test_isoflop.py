"""Parabolas: more sizes give a smaller error, real slices are not refused, a sick one is, and never NaN."""

import numpy as np
import pytest

from bench.parabolas import EXPONENT, one
from scaling.fit.isoflop import least_losses, parabolas, slices
from scaling.fit.laws import HOFFMANN, predict


def deviation(sizes, trials=60):
    """Of the exponent, with the window and through all points: noise 0.2%, sizes within a factor 4 of the optimum."""
    rng = np.random.default_rng(0)
    return np.sqrt(np.mean([np.square(one(sizes, 4, 0.002, rng)) for _ in range(trials)], axis=0))


def test_error_falls_with_the_number_of_sizes():
    window, every = np.array([deviation(sizes) for sizes in (5, 9, 15, 25)]).T
    assert np.all(np.diff(window) < 0)
    assert np.all(window <= 1.15 * every)
    assert window[-1] < 0.0035


@pytest.mark.parametrize("count", [10, 13, 16])
def test_slices_of_many_noisy_sizes_have_a_minimum(count):
    """Close sizes, noise of 1%: the least loss may be anywhere, the parabola through all is sure."""
    rng = np.random.default_rng(count)
    n, c = 1e8 * np.geomspace(1 / 6, 6, count), np.full(count, 1e19)
    loss = (2.5 + 0.05 * np.log(n / 1e8) ** 2) * np.exp(0.01 * rng.standard_normal(count))
    (cut,) = slices(n, c, loss, np.full(count, "a"))
    assert cut.refused is None
    assert cut.log_n == pytest.approx(np.log(1e8), abs=0.4)


def test_the_least_loss_may_be_at_an_end_by_chance_only():
    """Among many close and noisy sizes one low value at an end is noise; a slope that never turns is no minimum."""
    n, c, found = 1e8 * np.geomspace(1 / 4, 4, 31), np.full(31, 1e19), []
    for seed in range(20):
        loss = 2.5 + 0.005 * np.log(n / 1e8) ** 2 + 0.004 * np.random.default_rng(seed).standard_normal(31)
        loss[-1] = loss.min() - 0.001
        found.append(slices(n, c, loss, np.full(31, "a"))[0])
    assert sum(cut.refused is None for cut in found) >= 18
    assert np.median([cut.log_n for cut in found if not cut.refused]) == pytest.approx(np.log(1e8), abs=0.3)
    assert "largest model" in slices(n, c, 2.5 - 0.01 * np.log(n), np.full(31, "a"))[0].refused


def test_unlike_branches_leave_the_exponent_alone():
    """alpha and beta far apart bend the slices; the window narrows alike for all, and the exponent is the law's."""
    truth, rows = {"E": 1.7, "A": 60.0, "B": 9e4, "alpha": 0.22, "beta": 0.55}, []
    for c in np.geomspace(1e18, 1e21, 5):
        grid = np.geomspace(1e5, 1e12, 4000)
        best = grid[np.argmin(predict(HOFFMANN, truth, {"N": grid, "D": c / 6 / grid}))]
        rows += [(n, c) for n in best * np.geomspace(1 / 12, 12, 25)]
    n, c = np.array(rows).T
    loss = predict(HOFFMANN, truth, {"N": n, "D": c / 6 / n})
    assert parabolas(slices(n, c, loss, c)).exponent == pytest.approx(0.55 / 0.77, abs=0.01)
    assert pytest.approx(0.3658 / (0.3478 + 0.3658)) == EXPONENT


def test_a_minimum_below_zero_is_no_minimum():
    n, c = 1e8 * 2.0 ** np.arange(5), np.full(5, 1e19)
    loss = np.array([9, 1, 0.9, 1.02, 9])
    found = [cut for k in range(4) for cut in slices(n, c * 10**k, loss, np.full(5, str(k)))]
    assert all("least loss is -" in cut.refused for cut in found)
    assert least_losses(found) is None
