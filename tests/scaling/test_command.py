"""python -m scaling fit: numbers, diagnostics and JSON from a table; mistakes in one line with code 2."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from scaling.fit.analysis import FitRequest, analyse
from scaling.fit.isoflop import envelope, least_losses, parabolas, slices
from scaling.fit.laws import HOFFMANN, predict
from scaling.fit.runs_table import read_table

ROOT = Path(__file__).parents[2]
TRUTH = {"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658}
EXPONENT = 0.3658 / (0.3478 + 0.3658)


def isoflop_table(path, budgets=(1e18, 3e18, 1e19, 3e19, 1e20), noise=0.002):
    """Six sizes around each budget's optimum; the last budget has only sizes below its own. One run is far off."""
    rng, lines = np.random.default_rng(0), ["N,tokens,C,nats"]
    for place, c in enumerate(budgets):
        best = (0.3478 * 482.01 / (0.3658 * 2085.43) * (c / 6) ** 0.3658) ** (1 / (0.3478 + 0.3658))
        shift = 0.02 if place == len(budgets) - 1 else 1
        for factor in (0.25, 0.5, 0.8, 1.3, 2, 4):
            n = best * factor * shift
            loss = predict(HOFFMANN, TRUTH, {"N": n, "D": c / 6 / n}) * np.exp(noise * rng.standard_normal())
            lines.append(f"{n!r},{c / 6 / n!r},{c!r},{float(loss)!r}")
    fields = lines[4].split(",")
    lines[4] = ",".join([*fields[:3], repr(float(fields[3]) * 1.06)])
    path.write_text("\n".join(lines) + "\n")
    return path


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "scaling", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=100
    )


def test_everything_of_one_table(tmp_path):
    table, out = isoflop_table(tmp_path / "runs.csv"), tmp_path / "out.json"
    columns = ("--n", "N", "--d", "tokens", "--c", "C", "--loss", "nats", "--group", "C")
    done = command(
        *("fit", table, "--law", "hoffmann", *columns, "--huber", "1e-3", "--bootstrap", "200", "--seed", "1"),
        *("--budget", "1e21", "--holdout-above", "5e19", "--json", out),
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    quantities = result["fit"]["quantities"]
    for name in ("E", "alpha", "beta"):
        low, high = quantities[name]["interval95"]
        assert low < quantities[name]["value"] < high
    assert quantities["N at budget"]["interval80"][0] < quantities["N at budget"]["value"]
    assert result["fit"]["starts_reaching_best"] > result["fit"]["starts"] / 2
    # The planted outlier stays in the fit, is named, and a second fit stands beside.
    assert [one["line"] for one in result["outliers"]] == [5]
    assert result["without_outliers"]["quantities"]["E"]["value"] != quantities["E"]["value"]
    # The slice without an interior minimum is refused by name; the others carry the parabolas.
    refused = [cut for cut in result["approaches"]["isoflop"]["slices"] if cut["refused"]]
    assert [float(cut["name"]) for cut in refused] == [1e20]
    assert "largest model" in refused[0]["refused"]
    assert result["approaches"]["isoflop"]["exponent"] == pytest.approx(EXPONENT, abs=0.1)
    assert result["holdout"]["median_absolute_error"] < 0.02
    assert len(result["holdout"]["runs"]) == 6
    inside = result["holdout"]["runs"][0]["run95"]
    assert inside[0] < result["holdout"]["runs"][0]["predicted"] < inside[1]
    assert f"{inside[0]:.4g} to {inside[1]:.4g}" in done.stdout
    for words in ("starts reach it", "1e+21 FLOPs", "held out above", "slice 1e+20 refused", "outlier line 5"):
        assert words in done.stdout


FIT = ("fit", "TABLE", "--n", "N", "--d", "tokens", "--loss", "nats")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "required: COMMAND"),
        (("fit", "TABLE", "--n", "N", "--loss", "nats"), "needs --d"),
        (("fit", "TABLE", "--n", "N", "--d", "D", "--loss", "nats"), "no column D"),
        (("fit", "TABLE", "--n", "N", "--d", "tokens", "--loss", "nats", "--huber", "0"), "delta 0.0 must be above 0"),
        (("fit", "nowhere.csv", "--n", "N", "--d", "D", "--loss", "nats"), "nowhere.csv is not a file"),
        (("fit", "TABLE", "--law", "kepler", "--loss", "nats"), "invalid choice: 'kepler'"),
        (("fit", "TABLE", "--law", "E + A / N.a", "--loss", "nats"), "Attribute is not allowed"),
        ((*FIT, "--where", "N >"), "'N >' is not an expression"),
        ((*FIT, "--where", "__import__('os')"), "Call is not allowed"),
        ((*FIT, "--fix", "gamma=1"), "the law hoffmann has E, A, B, alpha, beta"),
        ((*FIT, "--tie", "beta"), "--tie beta must be NAME=VALUE"),
        ((*FIT, "--resample", "runs", "--bootstrap", "100"), "needs --run"),
        ((*FIT, "--bootstrap", "50"), "50 bootstrap draws cannot tell"),
        (("predict", *FIT[1:]), "required: --at"),
        (("predict", *FIT[1:], "--at", "N=1e9"), "a prediction at N=1e+09 needs D too"),
        (("predict", *FIT[1:], "--at", "N=1e9,D=0"), "--at D=0 must be above 0"),
        (("predict", *FIT[1:], "--at", "N=1e9,D=x"), "x is not a number"),
    ],
)
def test_mistakes(tmp_path, arguments, message, capsys, monkeypatch):
    """In this process, for speed: what the entry point does with arguments."""
    from runpy import run_module

    table = str(isoflop_table(tmp_path / "runs.csv"))
    monkeypatch.setattr(sys, "argv", ["scaling", *(table if one == "TABLE" else one for one in arguments)])
    with pytest.raises(SystemExit) as ended:
        run_module("scaling", run_name="__main__")
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.long
def test_somebodys_table_and_a_prediction(tmp_path):
    """Expressions, a filter, a law of one's own with a fixed parameter, two files of which one is packed: the JSON and
    the terminal agree, and the interval holds the law's loss."""
    header, *lines = isoflop_table(tmp_path / "runs.csv", noise=0.001).read_text().splitlines()
    lines = [line for line in lines if "1e+20" not in line]
    (tmp_path / "a.csv").write_text("# by hand\n" + "\n".join([header, *lines[:12]]) + "\n")
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(("\n".join([header, *lines[12:]]) + "\n").encode()))
    out = tmp_path / "out.json"
    done = command(
        *(
            "predict",
            tmp_path / "a.csv",
            tmp_path / "b.csv.gz",
            "--law",
            "E + A / N^a + B / D^b",
            "--fix",
            "E=1.8172",
            "--objective",
            "mse",
        ),
        *("--n", "N*1", "--d", "tokens", "--loss", "nats", "--where", "nats > 0", "--bootstrap", "100", "--json", out),
        *("--at", "N=10B,C=1.2e22"),
    )
    assert done.returncode == 0, done.stderr
    (one,) = json.loads(out.read_text())["predictions"]
    truth = float(predict(HOFFMANN, TRUTH, {"N": 1e10, "D": 2e11}))
    assert [one["N"], one["D"]] == [1e10, 2e11]
    assert one["interval95"][0] < truth < one["interval95"][1]
    assert one["run95"][0] < one["interval95"][0] < one["interval80"][0] < one["loss"]
    for words in ("E = 1.8172", f"{one['loss']:.5g}", f"{one['run95'][0]:.4g} to {one['run95'][1]:.4g}"):
        assert words in done.stdout


def test_envelope_of_training_curves():
    """Whole curves of seven sizes on the true surface: the envelope's exponent is the law's."""
    rows = []
    for run, n in enumerate(np.geomspace(1e7, 1e9, 9)):
        tokens = np.geomspace(2 * n, 200 * n, 40)
        loss = predict(HOFFMANN, TRUTH, {"N": np.full(40, n), "D": tokens})
        rows += [(n, 6 * n * d, y, str(run)) for d, y in zip(tokens, loss, strict=True)]
    n, c, loss, runs = map(np.array, zip(*rows, strict=True))
    law = envelope(n, c, loss, runs)
    assert law.exponent == pytest.approx(EXPONENT, abs=0.05)
    assert law.interval[0] < EXPONENT < law.interval[1]


def test_order_of_rows_and_kept_rows(tmp_path):
    """Another order gives the same digits, draws included; a run that looks diverged is fitted only if asked."""
    path = isoflop_table(tmp_path / "runs.csv")
    header, *lines = path.read_text().splitlines()
    fields = lines[10].split(",")
    lines[10] = ",".join([*fields[:3], repr(float(fields[3]) * 1.8)])
    found = []
    for order in (lines, lines[::-1]):
        path.write_text("\n".join([header, *order]) + "\n")
        table = read_table(path, {"N": "N", "D": "tokens", "loss": "nats"})
        found.append(analyse(table, FitRequest(HOFFMANN, draws=100))["fit"])
    assert found[0] == found[1]
    kept = analyse(table, FitRequest(HOFFMANN, draws=0, keep_all=True))
    assert [len(table), kept["table"]["used"], len(found[0]["quantities"])] == [30, 30, 10]
    assert kept["outliers"][0]["line"] == 21  # line 12 before the reversal
    refused = analyse(table, FitRequest(HOFFMANN, draws=0))["refused"]
    assert [(row["line"], "diverged" in row["reason"]) for row in refused] == [(21, True)]


def test_slices_are_refused_with_reasons():
    n = np.array([1e7, 2e7, 4e7, 8e7] * 2)
    groups, c = np.repeat(["falls", "three"], 4), np.full(8, 1e18)
    loss = np.array([4.0, 3.6, 3.3, 3.1, 3.3, 3.0, 3.1, 3.0])
    n[7] = n[5]
    found = {one.name: one.refused for one in slices(n, c, loss, groups)}
    assert "largest model" in found["falls"]
    assert "3 model sizes" in found["three"]
    assert parabolas(slices(n, c, loss, groups)) is None


def test_parabolas_go_through_the_sizes_around_the_best():
    """Sizes far too large for a budget are on no parabola: they change nothing."""
    budgets, made = (1e18, 1e19, 1e20), {}
    for factors in ((0.3, 0.6, 1.1, 2, 4), (0.3, 0.6, 1.1, 2, 4, 30, 300)):
        rows = []
        for c in budgets:
            best = (0.3478 * 482.01 / (0.3658 * 2085.43) * (c / 6) ** 0.3658) ** (1 / (0.3478 + 0.3658))
            rows += [(best * factor, c, str(c)) for factor in factors]
        n, c, groups = map(np.array, zip(*rows, strict=True))
        made[len(factors)] = slices(n, c, predict(HOFFMANN, TRUTH, {"N": n, "D": c / 6 / n}), groups)
    near, wide = ([(one.log_n, one.loss, one.curvature) for one in made[count]] for count in (5, 7))
    assert near == wide
    assert parabolas(made[7]).exponent == pytest.approx(EXPONENT, abs=0.01)
    floorless = slices(n, c, predict(HOFFMANN, TRUTH | {"E": 1e-9}, {"N": n, "D": c / 6 / n}), groups)
    assert least_losses(floorless).exponent == pytest.approx(-0.3478 * EXPONENT, rel=1e-3)
    assert least_losses(floorless).at(1e19) == pytest.approx(floorless[1].loss, rel=1e-3)


def test_hardly_trained_runs_can_be_left_out(tmp_path):
    rng = np.random.default_rng(0)
    n, ratio = (np.exp(rng.uniform(*np.log(ends), 40)) for ends in ((1e7, 1e9), (6, 100)))
    ratio[::4] = 2
    loss = predict(HOFFMANN, TRUTH, {"N": n, "D": ratio * n}) * np.exp(0.002 * rng.standard_normal(40))
    loss[::4] *= 1.1
    table = tmp_path / "runs.csv"
    table.write_text("N,D,loss\n" + "".join(f"{a},{a * r},{y}\n" for a, r, y in zip(n, ratio, loss, strict=True)))
    read = read_table(table, {"N": "N", "D": "D", "loss": "loss"})
    found = analyse(read, FitRequest(HOFFMANN, draws=0, min_ratio=5))
    assert [row["reason"] for row in found["refused"]] == ["D / N = 2 is below --min-ratio 5"] * 10
    alone = analyse(read.without(dict.fromkeys(range(0, 40, 4), "")), FitRequest(HOFFMANN, draws=0))
    assert found["fit"] == alone["fit"]
    with pytest.raises(ValueError, match="leaves no run: D / N is 2 to"):
        analyse(read, FitRequest(HOFFMANN, draws=0, min_ratio=1e3))
