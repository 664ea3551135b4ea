"""Results keep what they are told, overwrite nothing else, and are compared item by item."""

import math
from dataclasses import astuple, replace

import numpy as np
import pytest
from rich.console import Console

from evaluation.compare import compare, difference
from evaluation.options import parse
from evaluation.results import Metric, Outcome, Result, keep_result, ratio, read_result, require_room

IDS = [f"item {number}" for number in range(50)]


def outcome(right, ids=IDS, digest="tasks"):
    items = {"acc": np.asarray(right, float)}
    return Outcome({"acc": ratio(items, "acc", higher_is_better=True)}, items, ids, digest)


def result(task: Outcome, step=3, **settings):
    model = {"path": "somewhere", "step": step, "config": "c", "weights": f"w{step}", "parameters": 7}
    return Result(model, {"window": 64} | settings, {"quiz": task}, {"jax": "0"}, 1.5)


@pytest.fixture(scope="module")
def pair():
    """Two models that agree on most items: each knows about 60%, the second a little more."""
    draw = np.random.default_rng(0)
    first = draw.random(50) < 0.6
    second = np.where(draw.random(50) < 0.1, True, first)
    return outcome(first), outcome(second)


def test_a_file_gives_back_what_was_written(tmp_path, pair):
    written = result(pair[0])
    assert keep_result(tmp_path / "deep" / "a.json", written) == (tmp_path / "deep" / "a.json", True)
    read = read_result(tmp_path / "deep" / "a.json")
    assert read.identity() == written.identity()
    assert read.tasks["quiz"].metrics == pair[0].metrics
    assert read.tasks["quiz"].items["acc"].tolist() == pair[0].items["acc"].tolist()
    assert (read.model, read.seconds, read.versions) == (written.model, 1.5, {"jax": "0"})


def test_the_same_evaluation_is_replaced_and_another_one_never(tmp_path, pair):
    file = tmp_path / "a.json"
    assert keep_result(file, result(pair[0])) == (file, True)
    assert keep_result(file, replace(result(pair[0]), seconds=9.0)) == (file, False)
    assert read_result(file).seconds == 9.0
    before = file.read_bytes()
    others = [result(pair[0], step=4), result(pair[0], window=32), result(replace(pair[0], digest="others"))]
    kept = [keep_result(file, other) for other in others]
    assert len({path for path, new in kept if new} | {file}) == 4
    assert [read_result(path).identity() for path, _ in kept] == [other.identity() for other in others]
    (tmp_path / "b.json").write_text("notes")
    assert keep_result(tmp_path / "b.json", result(pair[0]))[0].name.startswith("b-")
    assert (file.read_bytes(), (tmp_path / "b.json").read_text()) == (before, "notes")


def test_a_file_of_other_tasks_is_refused_before_anything_is_measured(tmp_path, pair):
    file, _ = keep_result(tmp_path / "a.json", result(pair[0]))
    require_room(file, ["quiz"])
    require_room(tmp_path / "new.json", ["other"])
    with pytest.raises(ValueError, match="a.json holds another evaluation, of quiz"):
        require_room(file, ["other"])
    (tmp_path / "b.json").write_text("notes")
    with pytest.raises(ValueError, match="b.json is no result of an evaluation"):
        require_room(tmp_path / "b.json", ["quiz"])


def test_paired_differences_are_those_of_the_items(pair):
    first, second = pair
    found = difference(second, first, "acc")
    apart = second.items["acc"] - first.items["acc"]
    assert found.pairs == 50
    assert found.value == pytest.approx(apart.mean())
    assert found.stderr == pytest.approx(apart.std(ddof=1) / math.sqrt(50))
    assert found.stderr < math.hypot(first.metrics["acc"].stderr, second.metrics["acc"].stderr) / 2


def test_items_are_paired_by_name_whatever_their_order(pair):
    first, second = pair
    order = np.random.default_rng(1).permutation(50)
    shuffled = outcome(second.items["acc"][order], [IDS[place] for place in order])
    assert astuple(difference(shuffled, first, "acc")) == pytest.approx(astuple(difference(second, first, "acc")))


def test_only_common_items_are_paired_and_none_are_independent(pair):
    first, second = pair
    part = outcome(second.items["acc"][20:], IDS[20:])
    found = difference(part, first, "acc")
    assert found.pairs == 30
    assert found.value == pytest.approx((second.items["acc"] - first.items["acc"])[20:].mean())
    strangers = outcome(second.items["acc"], [f"other {one}" for one in IDS])
    found = difference(strangers, first, "acc")
    assert found.pairs == 0
    assert found.stderr == pytest.approx(math.hypot(first.metrics["acc"].stderr, strangers.metrics["acc"].stderr))


def test_ratios_are_paired_too():
    """Bits a byte of two models on one corpus: long documents are hard for both."""
    draw = np.random.default_rng(2)
    sizes = draw.integers(10, 200, 80)
    hard = draw.gamma(9, 1 / 9, 80)
    made = []
    for better in (1.0, 0.97):
        items = {"nats": sizes * hard * better * draw.normal(1, 0.01, 80), "bytes": 4 * sizes}
        metrics = {"bits_per_byte": ratio(items, "nats", "bytes", scale=1 / math.log(2))}
        made.append(Outcome(metrics, items, [str(n) for n in range(80)], "corpus"))
    found = difference(made[1], made[0], "bits_per_byte")
    assert found.value == pytest.approx(made[1].metrics["bits_per_byte"].value - made[0].metrics["bits_per_byte"].value)
    assert found.value < -5 * found.stderr
    assert found.stderr < made[0].metrics["bits_per_byte"].stderr / 5


@pytest.fixture
def runs(tmp_path, pair):
    for name, task in zip(("small", "large"), pair, strict=True):
        for step in (3, 10):  # the newest counts
            at = task if step == 10 else outcome(np.zeros(50))
            keep_result(tmp_path / name / "evaluation" / f"quiz-{step}.json", result(at, step))
    return tmp_path


def test_the_table_and_the_picture(runs, pair, capsys, monkeypatch):
    monkeypatch.setattr("evaluation.compare.Console", lambda: Console(width=200))
    compare([runs / "small", runs / "large"], runs / "picture.png")
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if "quiz" in line]
    for task in pair:
        assert f"{task.metrics['acc'].value:.4f} ± {task.metrics['acc'].stderr:.4f}" in line
    assert "large − small" in out
    assert "note" not in out
    assert (runs / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_not_alike_is_told(runs, tmp_path, pair, capsys):
    keep_result(tmp_path / "c.json", result(replace(pair[0], digest="others"), window=32))
    compare([runs / "small", tmp_path / "c.json"])
    out = " ".join(capsys.readouterr().out.split())
    assert "note: quiz of small and c differs in window 64 and 32; the task or its items" in out


def test_nothing_to_compare(runs, tmp_path, pair):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty has no results"):
        compare([runs / "small", tmp_path / "empty"])
    keep_result(tmp_path / "d.json", replace(result(pair[0]), tasks={"other": pair[0]}))
    with pytest.raises(ValueError, match="no task has been measured in all of them"):
        compare([runs / "small", tmp_path / "d.json"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: MODEL"),
        (["run", "capitals", "capitals"], "a task is given twice"),
        (["run", "humaneval"], "give --run-code"),
        (["run", "capitals", "train.steps=3"], "train.steps=3 is no setting of evaluation"),
        (["run", "capitals", "--limit", "0"], "0 is no number of 1 or more"),
        (["run", "perplexity:heldout", "--window", "8", "--stride", "9"], "--stride 9 must be 1 to --window 8"),
        (["compare"], "the following arguments are required: RESULT"),
    ],
)
def test_mistakes_in_the_options(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        parse(arguments)
    out, err = capsys.readouterr()
    assert (exit_.value.code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_a_mean_of_one_item_has_no_standard_error():
    assert ratio({"x": np.ones(1)}, "x") == Metric(1.0, None, False, "x")
