"""A run that was stopped, killed, moved to another mesh or damaged goes on as if nothing had happened, or says why not.

One run that is never stopped is the measure of all others.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import runs
from every import few_of

import train
from checkpoint.leaves import by_path
from config import compose
from data.loader import Loader
from data.shards import prepare
from tracking.metrics_file import last_value
from training import feed

DONE, MISTAKE, PREEMPTED = 0, 2, 75
SEED = 7  # of the moments at which runs are killed


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return runs.corpus(tmp_path_factory.mktemp("resume") / "text")


@pytest.fixture(scope="module")
def undisturbed(text) -> Path:
    directory = text.parent / "undisturbed"
    assert runs.run(runs.overrides(text, directory)) == DONE
    return directory


@pytest.fixture(autouse=True)
def at_home(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # whatever a run writes by mistake lands here


def copy(run: Path, to: Path, last: int) -> Path:
    """The run as it was after step `last`, with its checkpoints up to there."""
    shutil.copytree(run, to)
    for step in runs.steps(to):
        if step > last:
            shutil.rmtree(to / "checkpoints" / f"{step:08d}")
    return to


def during_step(step: int, number: signal.Signals):
    """Within it the signal comes while the loop asks for that step's batch."""
    batch = feed.Feed.batch

    def interrupted(self, cursor):
        if cursor == step - 1:
            signal.raise_signal(number)
        return batch(self, cursor)

    return mock.patch.object(feed.Feed, "batch", interrupted)


def assert_equal_runs(ours: Path, theirs: Path) -> None:
    """The same steps, losses, evaluations and final state, to the last bit."""
    assert runs.losses(ours) == runs.losses(theirs)
    assert runs.evaluations(ours) == runs.evaluations(theirs)
    assert list(runs.losses(ours)) == list(range(1, runs.STEPS + 1))
    runs.assert_same_arrays(runs.checkpoint(ours, runs.STEPS), runs.checkpoint(theirs, runs.STEPS))
    assert runs.record(ours, runs.STEPS)["progress"] == runs.record(theirs, runs.STEPS)["progress"]


# ------------------------------------------------------------------------------------------------ stopped, and killed


@pytest.mark.parametrize(("step", "number"), [(6, signal.SIGTERM), (12, signal.SIGINT)], ids=["SIGTERM", "Ctrl-C"])
def test_stopped_run_goes_on_bitwise(text, undisturbed, tmp_path, step, number):
    arguments = runs.overrides(text, tmp_path / "run")
    with during_step(step, number):
        assert runs.run(arguments) == PREEMPTED
    assert runs.steps(tmp_path / "run")[-1] == step == max(runs.losses(tmp_path / "run"))
    log = (tmp_path / "run" / "run.log").read_text()
    assert f"stopping after step {step}" in log
    assert "to go on: python train.py" in log
    assert runs.run(arguments) == DONE
    assert_equal_runs(tmp_path / "run", undisturbed)


def start_and_wait(arguments: list[str], directory: Path, line: int) -> subprocess.Popen:
    """A run in a process of its own, once metrics.jsonl has `line` lines."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(runs.command(arguments), cwd=runs.ROOT, env=runs.environment(), **pipes)
    metrics, deadline = directory / "metrics.jsonl", time.monotonic() + 120
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < line:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.001)
    return process


def test_run_goes_on_bitwise_however_its_process_ended(text, undisturbed, tmp_path):
    draw, directory = random.Random(SEED), tmp_path / "run"
    arguments = runs.overrides(text, directory, "checkpoint.every=3")  # one save waits for the one before: slow steps
    # before the first checkpoint, then wherever it falls: in a step, in an evaluation, in a save
    lives = [
        (signal.SIGKILL, 2),
        (signal.SIGTERM, draw.randint(4, 8)),
        (signal.SIGKILL, draw.randint(10, 18)),
    ]
    walls = []  # seconds of all lives that each one found
    for number, line in lives:
        process = start_and_wait(arguments, directory, line)
        time.sleep(delay := draw.uniform(0, 0.05))
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
        reached = runs.lines(directory)[-1]["step"]
        walls.append(last_value(directory / "metrics.jsonl", "perf/wall_s"))
        print(f"{number.name} {delay:.3f} s after line {line}: step {reached}, checkpoints {runs.steps(directory)}")
        if number == signal.SIGTERM:
            assert process.returncode == PREEMPTED, output
            assert f"SIGTERM: stopping after step {reached}" in output
            assert runs.steps(directory)[-1] == reached
        else:
            assert process.returncode == -signal.SIGKILL, output
    assert runs.run(arguments) == DONE
    assert_equal_runs(directory, undisturbed)
    assert not list((directory / "checkpoints").glob("*.partial"))
    assert_honest_goodput(runs.lines(directory), walls)


def assert_honest_goodput(lines: list[dict], walls: list[float]) -> None:
    """Wall time goes on from life to life, lost steps included; productive are the steps that were kept, alone."""
    begun = [line for line in lines if "perf/startup_s" in line]
    assert 1 <= len(begun) <= 3  # the first life had no checkpoint, so its lines are not here
    assert walls == sorted(walls)
    assert begun[-1]["perf/wall_s"] >= walls[-1] + begun[-1]["perf/startup_s"]
    last = [line for line in lines if "perf/goodput" in line][-1]
    kept = sum(line["perf/step_ms"] for line in lines if "perf/step_ms" in line) / 1e3
    assert last["perf/goodput"] * last["perf/wall_s"] == pytest.approx(kept)
    assert kept < last["perf/wall_s"] - sum(line["perf/startup_s"] for line in begun)


# ------------------------------------------------------------------------------------------------------- another mesh


@contextlib.contextmanager
def watched():
    """Within it: the arrays that runs restore, {step: arrays by path}, and the tokens that they feed, in order."""
    arrays, tokens = {}, []
    restore, feed_batch = train.restore, feed.Feed.batch

    def watched_restore(*arguments):
        found = restore(*arguments)
        arrays[found.step] = {path: np.asarray(array) for path, array in by_path(found.state).items()}
        return found

    def watched_batch(*arguments):
        batch = feed_batch(*arguments)
        tokens.append(np.asarray(batch["tokens_BT"]))
        return batch

    with (
        mock.patch.object(train, "restore", watched_restore),
        mock.patch.object(feed.Feed, "batch", watched_batch),
    ):
        yield arrays, tokens


def test_other_meshes_restore_bitwise_and_go_on(text, undisturbed, tmp_path):
    here = copy(undisturbed, tmp_path / "run", last=12)
    arguments = runs.overrides(text, here, "train.eval_every=0")
    with watched() as (arrays, tokens):
        with during_step(16, signal.SIGTERM):
            assert runs.run([*arguments, "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"]) == PREEMPTED
        assert runs.run(arguments, devices=1) == DONE
    for step, restored in arrays.items():
        runs.assert_same_arrays(restored, runs.checkpoint(here, step))
    assert sorted(arrays) == [12, 16]
    runs.assert_near(runs.losses(here), runs.losses(undisturbed))

    ours = compose.load(arguments)
    stream = prepare(ours.data, ours.tokenizer).train
    loader = Loader(stream, seq_len=ours.train.seq_len, batch_size=ours.train.batch_size, seed=ours.seed)
    read = [12, *range(12, 16), 16, *range(16, runs.STEPS)]  # each life compiles for its first batch
    assert len(tokens) == len(read)
    for found, step in zip(tokens, read, strict=True):
        assert np.array_equal(found, loader.batch(step)["tokens_BT"])


OPTIMIZERS = [("optimizer=adamw",), ("optimizer=adafactor", "model.width=128")]


@pytest.mark.long
@pytest.mark.parametrize(
    "optimizer", few_of([(one,) for one in OPTIMIZERS], [(OPTIMIZERS[1],)]), ids=["adamw", "adafactor"]
)
def test_padding_of_the_vocabulary_follows_the_mesh(optimizer, text, tmp_path):
    """Of parameters and of all that an optimizer keeps, also Adafactor's means over rows and columns."""
    odd = (
        *optimizer,
        "model.vocab_size=257",
        "model.vocab_multiple=1",
        "model.tied_embeddings=false",
        "train.eval_every=0",
    )
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    arguments = runs.overrides(text, whole, *odd, "train.steps=12")
    assert runs.run(arguments, devices=1) == DONE
    copy(whole, moved, last=4)
    arguments = runs.overrides(text, moved, *odd, "train.steps=12")
    with during_step(8, signal.SIGTERM):
        assert runs.run([*arguments, "mesh.tensor=2"], devices=2) == PREEMPTED
    wide = runs.checkpoint(moved, 8)["params/tokens/weight"]
    assert wide.shape[0] == 258
    assert not wide[257].any()
    assert runs.run(arguments, devices=1) == DONE
    assert runs.checkpoint(moved, 12)["params/tokens/weight"].shape[0] == 257
    runs.assert_near(runs.losses(moved), runs.losses(whole))


@pytest.mark.long
def test_checkpoints_do_not_know_the_pipeline(text, tmp_path):
    """Five layers on four stages, then shards, then two stages in a V, then one device: one run, evaluations too."""
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    deep = ("model.layers=5", "train.steps=14", "train.eval_every=4")
    assert runs.run(runs.overrides(text, whole, *deep), devices=1) == DONE
    arguments = runs.overrides(text, moved, *deep)
    lives = [
        (5, ["mesh.pipe=4", "mesh.fsdp=2", "pipeline.schedule=1f1b"]),
        (8, ["mesh.fsdp=8"]),
        (11, ["mesh.pipe=2", "mesh.fsdp=1", "mesh.data=2", "mesh.tensor=2", "pipeline.schedule=zero_bubble_v"]),
    ]
    for last, mesh in lives:
        with during_step(last, signal.SIGTERM):
            assert runs.run([*arguments, *mesh]) == PREEMPTED
        shapes = {path: array.shape for path, array in runs.checkpoint(moved, last).items() if "layers/" in path}
        assert len(shapes) > 20  # parameters and both moments
        assert {shape[0] for shape in shapes.values()} == {5}
    assert runs.run(arguments, devices=1) == DONE
    runs.assert_near(runs.losses(moved), runs.losses(whole))
    runs.assert_near(runs.evaluations(moved), runs.evaluations(whole))


# ------------------------------------------------------------------------------------------------------------- damage


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def largest_file(run: Path, step: int) -> Path:
    files = (run / "checkpoints" / f"{step:08d}" / "arrays").rglob("*")
    return max((file for file in files if file.is_file()), key=lambda file: file.stat().st_size)


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink], ids=["flipped bit", "truncated", "missing"])
def test_damaged_checkpoint_is_named_and_the_one_before_used(text, undisturbed, tmp_path, capsys, damage):
    here = copy(undisturbed, tmp_path / "run", last=20)
    file = largest_file(here, 20)
    damage(file)
    assert runs.run(runs.overrides(text, here)) == DONE
    said = capsys.readouterr().out
    assert f"checkpoint of step 20 is damaged: {file.relative_to(here / 'checkpoints' / '00000020')}" in said
    assert "resumed after step 16" in said
    assert_equal_runs(here, undisturbed)
    runs.assert_same_arrays(runs.checkpoint(here, 20), runs.checkpoint(undisturbed, 20))  # written anew


def test_nothing_but_damage_is_an_error_and_no_fresh_start(text, undisturbed, tmp_path, capsys):
    here = copy(undisturbed, tmp_path / "run", last=8)
    for step in runs.steps(here):
        flip(largest_file(here, step))
    kept = contents(here)
    assert_refused(runs.overrides(text, here), capsys, "no usable checkpoint", "step 8", "step 4")
    assert contents(here) == kept


def contents(run: Path) -> dict[Path, bytes]:
    return {
        file: file.read_bytes()
        for file in run.rglob("*")
        if file.is_file() and file.name not in ("run.log", "config.yaml")
    }


def assert_refused(arguments: list[str], capsys, *words: str) -> None:
    """Exit code 2 and one line with all these words."""
    capsys.readouterr()
    assert runs.run(arguments) == MISTAKE
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert all(word in said for word in words), said


# ------------------------------------------------------------------------------------------------------- whose it is


def test_directory_of_another_run_is_refused(text, undisturbed, capsys):
    kept, mine = contents(undisturbed), runs.saved_config(undisturbed)
    assert_refused(runs.overrides(text, undisturbed, "optimizer.lr=0.5"), capsys, "another run", "optimizer.lr", "0.5")
    assert_refused(runs.overrides(text, undisturbed, "seed=1"), capsys, "another run", "seed (0 there, 1 asked)")
    assert_refused(runs.overrides(text, undisturbed, "checkpoint.resume=never"), capsys, "checkpoint.resume=never")
    assert contents(undisturbed) == kept
    assert runs.saved_config(undisturbed) == mine


def test_checkpoints_of_another_run_are_refused(text, undisturbed, tmp_path, capsys):
    there = f"checkpoint.dir={undisturbed / 'checkpoints'}"
    arguments = runs.overrides(text, tmp_path / "run", there, "optimizer.lr=0.5")
    assert_refused(arguments, capsys, "checkpoints of another run", "optimizer.lr")
    assert_refused([*arguments, "checkpoint.resume=never"], capsys, "checkpoint.resume=never")


def test_a_mistake_does_not_take_the_directory(text, tmp_path, capsys):
    arguments = runs.overrides(text, tmp_path / "run", "checkpoint.resume=require")
    assert_refused([*arguments, "seed=3", f"data.path={text}/nothing.txt"], capsys, "matches no file")
    assert_refused(arguments, capsys, "checkpoint.resume=require", "no checkpoint")


def test_changed_data_is_refused(text, undisturbed, capsys):
    file, kept = text / "00.txt", contents(undisturbed)
    before = file.read_text()
    file.write_text(before + " and more")
    try:
        assert_refused(runs.overrides(text, undisturbed), capsys, "data")
    finally:
        file.write_text(before)
    assert contents(undisturbed) == kept


# ------------------------------------------------------------------------------------------------- finished, extended


def test_finished_run_has_nothing_to_do_and_can_be_extended(text, undisturbed, tmp_path, capsys):
    here = copy(undisturbed, tmp_path / "run", last=runs.STEPS)
    kept = contents(here)
    assert runs.run(runs.overrides(text, here)) == DONE
    assert contents(here) == kept
    longer = runs.STEPS + 2
    capsys.readouterr()
    assert runs.run(runs.overrides(text, here, f"train.steps={longer}")) == DONE
    assert f"resumed after step {runs.STEPS}" in capsys.readouterr().out
    assert list(runs.losses(here)) == list(range(1, longer + 1))
    assert runs.steps(here)[-1] == longer
    assert runs.saved_config(here)["train"]["steps"] == longer
