"""Studies: what is asked and told, by whom, after a kill; and that modelling beats chance."""

import dataclasses
import math
import os
import signal
import statistics
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from config.compose import load
from scaling.commands.search import numbered
from scaling.search.loop import read_search, run
from scaling.search.report import front, importances, rows
from scaling.search.space import parse_space
from scaling.search.study import REJECTIONS, Outcome, Search, SearchConfig, outcome

ROOT = Path(__file__).parents[3]
SPACE = {"x": "interval(-3, 3)", "y": "interval(-3, 3)", "kind": "choice(a, b, c)"}
CONFIG = SearchConfig(SPACE, trials=12)


def bowl(trial, overrides, directory) -> Outcome:
    x, y, kind = trial.params["x"], trial.params["y"], trial.params["kind"]
    return Outcome("complete", ((x - 1) ** 2 + 0.1 * y**2 + {"a": 0, "b": 1, "c": 2}[kind],))


def opened(config: SearchConfig, folder: Path, evaluate=bowl, **options) -> Search:
    search = Search(config, folder)
    run(search, evaluate, **options)
    search.close()
    return search


def points(search: Search) -> list[tuple]:
    return [(outcome(trial), tuple(trial.params.items()), trial.values) for trial in search.trials()]


def test_goes_on_as_if_it_had_never_stopped(tmp_path):
    whole = opened(CONFIG, tmp_path / "whole")
    opened(dataclasses.replace(CONFIG, trials=5, startup=3), tmp_path / "parts")
    parts = opened(CONFIG, tmp_path / "parts")
    assert points(parts) == points(whole)
    assert len(points(whole)) == 12
    assert points(opened(CONFIG, tmp_path / "whole", evaluate=None)) == points(whole)  # nothing is left to do


def test_starting_points_come_first_and_may_be_partial(tmp_path):
    start = ({"x": 1.0, "y": 0, "kind": "a"}, {"kind": "c"})
    search = opened(dataclasses.replace(CONFIG, start=start, trials=4), tmp_path)
    assert search.trials()[0].params == start[0]
    assert search.trials()[1].params["kind"] == "c"
    assert [trial.number for trial in front(search)] == [0]


def test_tpe_beats_random_at_the_same_budget(tmp_path):
    best = {}
    for sampler in ("tpe", "random"):
        config = dataclasses.replace(CONFIG, sampler=sampler, trials=30)
        found = [opened(dataclasses.replace(config, seed=s), tmp_path / f"{sampler}{s}") for s in range(5)]
        best[sampler] = statistics.median(min(trial.value for trial in search.trials()) for search in found)
    assert best["tpe"] < 0.5 * best["random"]


def test_importance_is_that_of_the_surface(tmp_path):
    search = opened(dataclasses.replace(CONFIG, sampler="random", trials=60), tmp_path)
    shares = importances(search)["eval/loss"]
    assert shares["x"] > 3 * shares["y"]
    assert sum(shares.values()) == pytest.approx(1)


def test_workers_share_the_budget(tmp_path):
    here = threading.Barrier(3)

    def together(trial, overrides, directory):
        here.wait(20)  # passes only if three are at work at once
        return bowl(trial, overrides, directory)

    search = opened(CONFIG, tmp_path, together, workers=3)
    assert [outcome(trial) for trial in search.trials()] == ["complete"] * 12
    assert len({tuple(trial.params.items()) for trial in search.trials()}) == 12


def test_outcomes_count_as_they_should(tmp_path):
    kinds = iter(["rejected", "diverged", "failed", "pruned", *["complete"] * 8])

    def evaluate(trial, overrides, directory):
        kind = next(kinds)
        return bowl(trial, overrides, directory) if kind == "complete" else Outcome(kind, reason="so it was")

    search = opened(dataclasses.replace(CONFIG, trials=8), tmp_path, evaluate)
    assert [row["outcome"] for row in rows(search)] == ["rejected", "diverged", "failed", "pruned", *["complete"] * 5]
    assert rows(search)[1]["reason"] == "so it was"
    assert rows(search)[1]["values"] == {}


def test_a_space_in_which_nothing_fits_ends(tmp_path):
    with pytest.raises(ValueError, match=f"{REJECTIONS} trials in a row were rejected; the last: too large"):
        opened(CONFIG, tmp_path, lambda *_: Outcome("rejected", reason="too large"))


def test_the_same_point_is_not_run_twice(tmp_path):
    ran = []

    def evaluate(trial, overrides, directory):
        ran.append(overrides)
        return Outcome("complete", (len(ran),))

    search = opened(SearchConfig({"kind": "choice(a, b)"}, trials=6), tmp_path, evaluate)
    assert sorted(ran) == [["kind=a"], ["kind=b"]]
    assert len(rows(search)) == 6


def test_a_fault_of_a_worker_is_told_and_its_trial_comes_back(tmp_path):
    def broken(trial, overrides, directory):
        raise RuntimeError("no such thing")

    search = Search(CONFIG, tmp_path)
    with pytest.raises(RuntimeError, match="no such thing"):
        run(search, broken)
    search.close()
    again = opened(CONFIG, tmp_path)
    assert [outcome(trial) for trial in again.trials()] == ["lost", *["complete"] * 12]
    assert again.trials()[1].params == again.trials()[0].params


KILLED = """
import os, signal, sys
from pathlib import Path
from scaling.search.study import Outcome, Search, SearchConfig
from scaling.search.loop import run
from tests.scaling.search.test_search import CONFIG, bowl
asked = 0
def evaluate(trial, overrides, directory):
    global asked
    asked += 1
    if asked == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return bowl(trial, overrides, directory)
run(Search(CONFIG, Path(sys.argv[1])), evaluate)
"""


def test_kills_and_a_torn_journal_lose_nothing(tmp_path):
    for _ in range(2):
        ended = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, env=os.environ, timeout=60)
        assert ended.returncode == -signal.SIGKILL
        with open(tmp_path / "journal.log", "ab") as journal:
            journal.write(b'{"op_code": 5, "wor')
    search = opened(CONFIG, tmp_path)
    lost = [trial for trial in search.trials() if outcome(trial) == "lost"]
    kept = [trial for trial in search.trials() if outcome(trial) == "complete"]
    assert (len(lost), len(kept)) == (2, 12)
    assert all(trial.params in [other.params for other in kept] for trial in lost)


def test_two_objectives_keep_what_no_other_beats(tmp_path):
    def evaluate(trial, overrides, directory):
        x = trial.params["x"]
        return Outcome("complete", ((x - 1) ** 2, math.exp(x)))

    objectives = (("eval/loss", "minimize"), ("perf/tokens_per_s", "maximize"))
    search = opened(dataclasses.replace(CONFIG, objectives=objectives, trials=20), tmp_path, evaluate)
    kept = front(search)
    assert len(kept) > 1
    assert all(trial.params["x"] >= 0.5 for trial in kept)
    assert [t.values for t in kept] == sorted([t.values for t in kept], key=lambda v: (v[0], -v[1]))
    assert importances(search).keys() == {"eval/loss", "perf/tokens_per_s"}


def test_another_space_in_the_same_folder_is_refused(tmp_path):
    opened(dataclasses.replace(CONFIG, trials=1), tmp_path)
    with pytest.raises(ValueError, match="holds a search of another space"):
        Search(dataclasses.replace(CONFIG, space={"x": "interval(0, 1)"}), tmp_path)


def test_yaml_and_words(tmp_path):
    file = tmp_path / "search.yaml"
    file.write_text("trials: 7\nmemory_limit: 16e9\ntrain: [seed=3]\nspace:\n  seed: range(0, 9)\n  model: [a, b]\n")
    words = ["search.pruner=median", "hydra.sweeper.trials=9", "model=nano", "optimizer.lr=interval(0,1)", "x=1,2"]
    config = read_search(file, words)
    assert (config.trials, config.pruner, config.memory_limit) == (9, "median", 16e9)
    assert config.train == ("seed=3", "model=nano")
    assert config.space == {"seed": "range(0, 9)", "optimizer.lr": "interval(0,1)", "x": "1,2"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("trails: 3", ["unknown trails", "trials"]),
        ("trials: many", ["trials='many' is str, but should be int"]),
        ("trials: 0.5", ["trials=0.5 is float, but should be int"]),
        ("sampler: grid", ["sampler: grid is unknown", "tpe, random"]),
        ("objectives: {eval/loss: less}", ["eval/loss: less", "minimize, maximize"]),
        ("objectives: [eval/loss]", ["objectives should be a mapping"]),
        ("pruner: median\nobjectives: {perf/step_ms: minimize}", ["pruner: median follows eval/loss alone"]),
        ("start: [1]", ["start[0]=1 is int, but should be a mapping"]),
        ("- 3", ["should hold keys"]),
        ("a: [", ["cannot read"]),
    ],
)
def test_mistakes_in_the_file(text, words, tmp_path):
    file = tmp_path / "search.yaml"
    file.write_text(text + "\n")
    with pytest.raises(ValueError) as told:
        read_search(file)
    assert all(word in str(told.value) for word in words), told.value
    assert "\n" not in str(told.value)


def test_a_search_may_start_at_published_laws():
    space = {"optimizer.lr": "tag(log,interval(1e-5,1))", "optimizer.weight_decay": "tag(log,interval(1e-3,10))"}
    train = ("optimizer=adamw", "train.steps=1000")
    points = ({"optimizer.lr": "step_law", "optimizer.weight_decay": "power_lines"}, {"optimizer.lr": 0.5})
    settings = numbered(SearchConfig(space=space, train=train, start=points))
    asked = load([*train, "optimizer.lr=step_law", "optimizer.weight_decay=power_lines"]).optimizer
    assert settings.start[0] == {"optimizer.lr": asked.lr, "optimizer.weight_decay": asked.weight_decay}
    assert settings.start[1] == points[1]
    assert parse_space(space).point(settings.start[0]) == settings.start[0]
