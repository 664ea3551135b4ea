"""Whole analyses: nothing sees what is held out, columns stand at one budget, words agree with intervals."""

from dataclasses import replace

import numpy as np
import pytest

from scaling.fit.analysis import FitRequest, analyse
from scaling.fit.diagnostics import warnings
from scaling.fit.law_fit import fit
from scaling.fit.laws import HOFFMANN, MUENNIGHOFF, predict
from scaling.fit.prediction import predictions
from scaling.fit.runs_table import read_table
from scaling.fit.solver import Objective
from scaling.fit.uncertainty import Uncertainty, bootstrap

NAMES = {"N": "N", "D": "D", "loss": "loss"}
TRUTH = {"E": 1.8, "A": 480.0, "B": 2100.0, "alpha": 0.35, "beta": 0.37}


def written(path, rows, head="N,D,loss"):
    path.write_text(head + "\n" + "".join(",".join(str(one) for one in row) + "\n" for row in rows))
    return path


def grid(wiggle=0.002):
    """Five sizes at three ratios: losses a little above and below the law by turns."""
    rows = []
    for i, n in enumerate((1e7, 3e7, 1e8, 3e8, 1e9)):
        for j, ratio in enumerate((5, 20, 80)):
            d = float(n * ratio)
            rows.append((float(n), d, (1.8 + 480 / n**0.35 + 2100 / d**0.37) * (1 + wiggle * (-1) ** (i + j))))
    return rows


def test_nothing_that_is_fitted_sees_what_is_held_out(tmp_path):
    """The second run above is 14% off, which a screening of the whole table would hide."""
    path = written(tmp_path / "runs.csv", [*grid(), (1e10, 2e11, 2.086), (3e10, 6e11, 2.35)])
    held = analyse(read_table(path, NAMES), FitRequest(HOFFMANN, draws=0, holdout_above=1e21))["holdout"]
    assert [len(held["runs"]), held["fitted_runs"]] == [2, 15]
    assert held["largest_absolute_error"] == pytest.approx(0.1439, abs=5e-5)
    assert held["median_absolute_error"] == pytest.approx((0.1439 + 0.0081) / 2, abs=1e-4)


def test_what_is_held_out_changes_nothing_below(tmp_path):
    """Other losses above, absurd ones too: the same parameters, the same screening, outliers and predictions. The run
    that diverged below is screened for the held-out fit, too."""
    low = grid()
    low[7] = (*low[7][:2], low[7][2] * 1.7)
    found = []
    for place, losses in enumerate(((2.086, 2.05), (2.2, 9.0), (0.1, 2.05))):
        rows = [*low, *((n, 20 * n, y) for n, y in zip((1e10, 3e10), losses, strict=True))]
        path = written(tmp_path / f"{place}.csv", rows)
        found.append(analyse(read_table(path, NAMES), FitRequest(HOFFMANN, draws=0, holdout_above=1e21))["holdout"])
    for key in ("parameters", "fitted_runs", "screened", "outliers"):
        assert found[0][key] == found[1][key] == found[2][key]
    assert [found[0]["fitted_runs"], found[0]["screened"]] == [14, 1]
    assert [[row["predicted"] for row in one["runs"]] for one in found[1:]] == [
        [row["predicted"] for row in found[0]["runs"]]
    ] * 2


def test_columns_stand_at_one_budget(tmp_path):
    """The outlier is the largest run: without it the table's largest budget is another."""
    rng = np.random.default_rng(0)
    n, d = 10 ** rng.uniform(7, 9, 24), 10 ** rng.uniform(9, 10.5, 24)
    n, d = np.append(n, 1e9), np.append(d, 1e12)
    loss = predict(HOFFMANN, TRUTH, {"N": n, "D": d}) * np.exp(0.002 * rng.standard_normal(25))
    loss[-1] *= 1.1
    result = analyse(
        read_table(written(tmp_path / "runs.csv", zip(n, d, loss, strict=True)), NAMES), FitRequest(HOFFMANN, draws=0)
    )
    assert [one["line"] for one in result["outliers"]] == [26]
    for found in (result["fit"], result["without_outliers"]):
        quantities = found["quantities"]
        product = 6 * quantities["N at budget"]["value"] * quantities["D at budget"]["value"]
        assert product == pytest.approx(result["budget"], rel=1e-9)


def repeated(noise=0.0):
    """Five sizes, one set of 1e9 unique tokens, one to sixteen epochs of it."""
    truth = {"E": 1.8, "A": 480.0, "B": 2100.0, "alpha": 0.35, "beta": 0.37, "R_N*": 5.3, "R_D*": 15.4}
    n, epochs = map(np.ravel, np.meshgrid(np.geomspace(1e7, 3e9, 5), [1, 2, 4, 8, 16]))
    sizes = {"N": n, "D": 1e9 * epochs, "U": np.full(25, 1e9)}
    return (
        truth,
        sizes,
        predict(MUENNIGHOFF, truth, sizes) * np.exp(noise * np.random.default_rng(0).standard_normal(25)),
    )


def test_repetition_identifies_muennighoffs_law_with_one_set_of_tokens():
    truth, sizes, loss = repeated()
    assert fit(MUENNIGHOFF, sizes, loss, Objective("mse")).parameters == pytest.approx(truth, rel=1e-4)
    with pytest.raises(ValueError, match="D is 1e\\+09 and U is 1e\\+09 in every run"):
        fit(MUENNIGHOFF, {**sizes, "D": sizes["U"]}, loss)
    with pytest.raises(ValueError, match="N is 1e\\+07 in every run"):
        fit(MUENNIGHOFF, {**sizes, "N": np.full(25, 1e7)}, loss)


@pytest.fixture(scope="module")
def one_set(tmp_path_factory):
    """The table of `repeated`, and Muennighoff's law fitted to it."""
    _, sizes, loss = repeated()
    path = written(tmp_path_factory.mktemp("one") / "runs.csv", zip(*sizes.values(), loss, strict=True), "N,D,U,loss")
    table = read_table(path, {**NAMES, "U": "U"})
    return table, fit(MUENNIGHOFF, table.columns, table.columns["loss"])


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        ((0, np.inf), "any value fits as well"),
        ((166.8, np.inf), "unidentified from above: so is all over 166.8"),
        ((0, 166.8), "unidentified from below"),
    ],
)
def test_words_do_not_contradict_intervals(one_set, ends, said):
    """No run depends on R_N* at the optimum: "any value fits" only where the interval has no end at all."""
    table, fitted = one_set
    fitted = replace(fitted, unseen=("R_N*",))
    intervals = {0.95: np.tile([1.0, 2.0], (7, 1))}
    intervals[0.95][5] = ends
    certain = Uncertainty(np.zeros((1, 7)), fitted.theta[None], intervals, {}, 0, 0.01, "cases", 25)
    found = [words for words in warnings(fitted, table, certain) if words.startswith("R_N*")]
    assert said in found[0]
    assert any("any value fits" in words for words in found) == (ends == (0, np.inf))


def test_predictions_hold_new_runs():
    """Of new runs within and a little beyond the sizes fitted, 95% intervals hold most; the curve's are narrower."""
    inside = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        draw = lambda count, rng=rng: {"N": 10 ** rng.uniform(7.5, 9.7, count), "D": 10 ** rng.uniform(9, 11.2, count)}
        noisy = lambda sizes, rng=rng: (
            predict(HOFFMANN, TRUTH, sizes) * np.exp(0.005 * rng.standard_normal(len(sizes["N"])))
        )
        sizes, new = draw(40), draw(20)
        fitted = fit(HOFFMANN, sizes, noisy(sizes))
        for one, measured in zip(predictions(fitted, bootstrap(fitted, 100), new), noisy(new), strict=True):
            low, curve_low, curve_high, high = *one["run95"][:1], *one["interval95"], *one["run95"][1:]
            assert low < curve_low < one["loss"] < curve_high < high
            inside.append(low < measured < high)
    assert np.mean(inside) >= 0.87


def test_residuals_that_cluster_by_a_column_are_told(tmp_path):
    rng = np.random.default_rng(0)
    rows = []
    for row in range(40):
        n, d, data = 10 ** rng.uniform(7, 9), 10 ** rng.uniform(9, 11), ("web", "code")[row % 2]
        floor = {"web": 1.8, "code": 2.6}[data]
        loss = (floor + 480 / n**0.35 + 2100 / d**0.37) * np.exp(0.003 * rng.standard_normal())
        rows.append((n, d, loss, data, row % 3))
    table = read_table(written(tmp_path / "runs.csv", rows, "N,D,loss,data,seed"), NAMES)
    (said,) = [words for words in analyse(table, FitRequest(HOFFMANN, draws=0))["warnings"] if "cluster" in words]
    assert "by data (code +" in said
    alike = [(n, d, loss + (0.8 if data == "web" else 0), data, seed) for n, d, loss, data, seed in rows]
    table = read_table(written(tmp_path / "alike.csv", alike, "N,D,loss,data,seed"), NAMES)
    assert not [words for words in analyse(table, FitRequest(HOFFMANN, draws=0))["warnings"] if "cluster" in words]
