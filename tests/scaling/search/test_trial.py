"""Trials as processes: what is read of their metrics, when they are stopped, and what their end means.

A stand-in for train.py keeps its contract (metrics.jsonl, SIGTERM, exit codes) without its seconds of imports; the last
test runs the real one.
"""

import dataclasses
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import runs

from config import compose
from performance.memory import needed
from scaling.search.loop import run
from scaling.search.report import draw, rows
from scaling.search.study import Search, SearchConfig, outcome
from scaling.search.trial import Metrics, Runner

TRAIN = """
import json, os, pathlib, signal, sys, time
said = dict(word.split("=", 1) for word in sys.argv[1:])
run, mode, x = pathlib.Path(said["run.dir"]), said.get("mode", "well"), float(said["x"])
run.mkdir(parents=True, exist_ok=True)
if mode == "mistake":
    sys.exit(print("error: x does not divide", file=sys.stderr) or 2)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
with open(run / "metrics.jsonl", "a") as file:
    for step in range(10, 50, 10):
        loss = "NaN" if mode == "nan" and step == 30 else x + 10 / step
        print(json.dumps({"step": step, "perf/step_ms": step, "eval/loss": loss}), file=file, flush=True)
        if mode == "nan" and step == 30:
            sys.exit(3)
        time.sleep(float(said.get("pause", 0)))
sys.exit({"crash": 9}.get(mode, 0))
"""
MEMORY = """
import json, sys
said = dict(word.split("=", 1) for word in sys.argv[1:])
print(json.dumps({"total": int(1e6 * float(said["x"]))}))
"""
CONFIG = SearchConfig({"x": "choice(1, 2, 3, 4, 5, 6)"}, trials=1)


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A folder with the stand-ins."""
    (tmp_path / "performance").mkdir()
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "performance" / "memory.py").write_text(MEMORY)
    return tmp_path


def searched(checkout: Path, *train: str, check=lambda overrides: None, **changes) -> Search:
    settings = dataclasses.replace(CONFIG, train=train, **changes)
    search = Search(settings, checkout / "study")
    run(search, Runner(settings, checkout, check))
    search.close()
    return search


def test_objectives_are_the_last_loss_and_the_median_speed(checkout):
    both = (("eval/loss", "minimize"), ("perf/step_ms", "minimize"))
    search = searched(checkout, objectives=both, start=({"x": 2},))
    assert rows(search)[0]["values"] == {"eval/loss": 2.25, "perf/step_ms": 25}
    assert rows(search)[0]["seconds"] > 0


@pytest.mark.parametrize(
    ("mode", "kind", "reason"),
    [("nan", "diverged", "not finite"), ("crash", "failed", "exit code 9"), ("well", "complete", "")],
)
def test_what_an_end_means(mode, kind, reason, checkout):
    search = searched(checkout, f"mode={mode}")
    assert [row["outcome"] for row in rows(search)] == [kind]
    assert reason in rows(search)[0]["reason"]


def test_mistakes_of_a_point_are_rejections(checkout):
    def check(overrides):
        if "x=2" in overrides:
            raise ValueError("x=2 is even")

    with pytest.raises(ValueError, match="30 trials in a row were rejected; the last: as trial"):
        searched(checkout, "mode=mistake", check=check, start=({"x": 1}, {"x": 2}, {"x": 3}))
    search = Search(dataclasses.replace(CONFIG, train=("mode=mistake",)), checkout / "study")
    assert [row["reason"] for row in rows(search)[:2]] == ["x does not divide", "x=2 is even"]
    search.close()


def test_what_does_not_fit_is_never_run(checkout):
    search = searched(checkout, memory_limit=3e6, trials=2, start=({"x": 5}, {"x": 2}, {"x": 4}, {"x": 3}))
    assert [(row["params"]["x"], row["outcome"]) for row in rows(search)] == [
        *(("5", "rejected"), ("2", "complete"), ("4", "rejected"), ("3", "complete"))
    ]
    assert "needs 5e+06 bytes a device of 3e+06" in rows(search)[0]["reason"]
    assert {path.name for path in (checkout / "study" / "trials").iterdir() if path.is_dir()} == {
        row["run"] for row in rows(search) if row["outcome"] == "complete"
    }


@pytest.mark.long
@pytest.mark.parametrize("pruner", ["median", "halving"])
def test_bad_trials_are_stopped_while_they_run(pruner, checkout):
    start = tuple({"x": x} for x in (1, 2, 3, 4, 6))
    search = searched(checkout, "pause=0.3", pruner=pruner, trials=5, start=start)
    kinds = [row["outcome"] for row in rows(search)]
    assert kinds[0] == "complete"
    assert kinds[-1] == "pruned"
    steps = [
        len((checkout / "study" / "trials" / row["run"] / "metrics.jsonl").read_text().splitlines())
        for row in rows(search)
    ]
    assert steps[0] == 4
    assert steps[-1] < 4
    assert "evaluations" in rows(search)[-1]["reason"]
    draw(search, checkout / "search.png")
    assert (checkout / "search.png").read_bytes()[1:4] == b"PNG"


def test_a_stop_ends_the_process_and_the_trial_comes_back(checkout):
    settings = dataclasses.replace(CONFIG, train=("pause=30",))
    search, runner = Search(settings, checkout / "study"), Runner(settings, checkout, lambda overrides: None)
    threading.Timer(1.0, runner.stop.set).start()
    began = time.monotonic()
    assert not run(search, runner, stop=runner.stop)
    assert time.monotonic() - began < 10
    search.close()
    again = Search(settings, checkout / "study")
    again.ask()
    assert outcome(again.trials()[0]) == "lost"
    assert again.trials()[1].params == again.trials()[0].params
    again.close()


def test_metrics_of_a_run_that_was_cut_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path)
    metrics.read()
    assert metrics.final("eval/loss") is None
    path.write_text(
        '{"step": 1, "eval/loss": 3, "perf/peak": "a name"}\n{"step": 2, "eval/loss": 2.5}\n{"step": 3, "ev'
    )
    metrics.read()
    assert metrics.values == {"eval/loss": {1: 3.0, 2: 2.5}}
    path.write_text('{"step": 1, "eval/loss": 3}\n')
    metrics.read()
    with open(path, "a") as file:
        file.write('{"step": 2, "eval/loss": "NaN"}\n')
    metrics.read()
    assert metrics.diverged()
    assert metrics.values["eval/loss"][1] == 3


def test_memory_is_what_the_compiled_step_needs():
    tiny = [word for word in runs.TINY if not word.startswith("data")]
    sizes = [
        needed(compose.load([*tiny, "runtime.cpu_devices=8", *more]))
        for more in (["mesh.data=8"], ["mesh.fsdp=8"], ["mesh.data=8", "train.batch_size=64"])
    ]
    assert all(found["total"] == found["arguments"] + found["temporary"] for found in sizes)
    assert sizes[1]["arguments"] < 0.5 * sizes[0]["arguments"]
    assert sizes[2]["temporary"] > 2 * sizes[0]["temporary"]


@pytest.mark.long
def test_the_command_on_real_runs(tmp_path):
    text = runs.corpus(tmp_path / "text")
    train = [word for word in runs.overrides(text, tmp_path / "x", "train.steps=8") if not word.startswith("run.dir")]
    (tmp_path / "search.yaml").write_text(
        json.dumps({"trials": 1, "train": train, "space": {"optimizer.lr": "tag(log, interval(1e-4, 1))"}})
    )
    command = [sys.executable, "-m", "scaling", "search", str(tmp_path / "search.yaml"), "--workers", "2"]
    command += ["--dir", str(tmp_path / "study")]
    ended = subprocess.run(command, cwd=runs.ROOT, env=runs.environment(), capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr
    found = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["outcome"] for row in found] == ["complete"]
    assert found[0]["values"]["eval/loss"] == runs.evaluations(tmp_path / "study" / "trials" / found[0]["run"])[8]
    assert (tmp_path / "search.png").exists()
    assert "best: python train.py" in ended.stdout
    wrong = subprocess.run([*command, "modell.width=1,2"], cwd=runs.ROOT, capture_output=True, text=True, timeout=60)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: space: unknown modell.width")
    assert wrong.stderr.count("\n") == 1


def test_hydras_door_leads_to_the_search():
    command = [sys.executable, "train.py", "-m", "hydra/sweeper=search", "hydra.sweeper.workers=2"]
    command += ["hydra.sweeper.trials=0", "optimizer.lr=interval(0,1)", "seed=1"]
    ended = subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (2, "error: trials: 0 must be 1 or more\n")
