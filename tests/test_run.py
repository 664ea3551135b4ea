"""What a run leaves behind, how it ends, and what it does not depend on."""

import json
import logging
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import jax
import numpy as np
import pytest
import runs

import train
from config import compose
from data.loader import Loader
from inference import ahead, generate
from tracking.run_directory import RunDirectory
from training import feed, job

DONE, MISTAKE, FAULT = 0, 2, 3
COMPILING = re.compile(r"Compiling (\S+)")

LOGGED = {
    *(
        "step",
        "tokens",
        "epoch",
        "train/loss",
        "train/grad_norm",
        "train/param_norm",
        "train/lr",
        "train/accuracy",
        "train/skipped",
    ),
    *(
        "train/loss_spike",
        "train/grad_norm_ratio",
        "perf/tokens_per_s",
        "perf/step_ms",
        "perf/mfu",
        "perf/goodput",
        "perf/bubble",
    ),
    *("perf/data_wait_ms", "perf/device_ms", "perf/host_ms", "perf/model_tflops_per_device"),
    *("perf/mfu_full_attention", "perf/hfu", "perf/wall_s"),
    *("perf/predicted_step_ms", "perf/predicted_memory_gb", "perf/memory_gb"),
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return runs.corpus(tmp_path_factory.mktemp("run") / "text")


@pytest.fixture(scope="module")
def finished(text) -> Path:
    directory = text.parent / "finished"
    assert runs.run(runs.overrides(text, directory)) == DONE
    return directory


@pytest.fixture(autouse=True)
def at_home(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # whatever a run writes by mistake lands here


# --------------------------------------------------------------------------------------------------- what is written


def test_metrics_are_one_object_a_line(finished):
    raw = (finished / "metrics.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in raw]
    steps = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in steps] == list(range(1, runs.STEPS + 1))
    for line in steps:
        assert line.keys() == LOGGED
        assert line["tokens"] == line["step"] * 8 * 32
        assert all(math.isfinite(value) for value in line.values())
    assert steps[3]["train/lr"] == pytest.approx(2e-3)  # the warm-up of four steps ends at the peak
    assert steps[-1]["train/loss"] < steps[0]["train/loss"] - 0.5


def test_losses_keep_their_full_precision(finished):
    written = re.findall(r'"train/loss": ([^,}]+)', (finished / "metrics.jsonl").read_text())
    assert len(written) == runs.STEPS
    for number in written:
        assert repr(float(number)) == number
        assert float(np.float32(float(number))) == float(number)  # a float32 that lost nothing


def test_evaluations(finished):
    lines = [line for line in runs.lines(finished) if "eval/loss" in line]
    assert [line["step"] for line in lines] == [8, 16, 24]
    for line in lines:
        assert line.keys() == {"step", "tokens", "eval/loss", "eval/bits_per_byte"}
        # tokens are bytes here, but for the ends of documents, which stand for none
        assert 1 <= line["eval/bits_per_byte"] / (line["eval/loss"] / math.log(2)) < 1.01


def test_config_reads_back_as_it_was(finished, text):
    config_again = compose.load_run(finished)
    assert re.fullmatch(r"[0-9a-f]{8}", config_again.run.id)
    arguments = runs.overrides(text, finished, f"run.id='{config_again.run.id}'", f"runtime.cpu_devices={runs.DEVICES}")
    config = compose.load(arguments)
    assert config.train.compute_dtype == "auto"
    resolved = replace(config.train, compute_dtype="float32")  # as this CPU has it
    assert replace(config, train=resolved) == config_again
    assert compose.to_yaml(config_again) == (finished / "config.yaml").read_text()


def test_log_tells_the_story_with_times(finished):
    lines = (finished / "run.log").read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line) for line in lines)
    log = "\n".join(line[20:] for line in lines)
    parts = (
        "fsdp=8",
        "compiled the step in",
        f"step {runs.STEPS}/{runs.STEPS}",
        "eval 8/24",
        "to extend: ",
        "to see: ",
    )
    for part in parts:
        assert part in log
    for name in ("metrics.jsonl", "config.yaml", "run.log", "checkpoints"):
        assert str(finished / name) in log
        assert (finished / name).exists()


def test_checkpoints_hold_everything_that_goes_on(finished):
    assert runs.steps(finished) == [4, 8, 12, 16, 20, 24]
    arrays, record = runs.checkpoint(finished, 24), runs.record(finished, 24)
    assert arrays["step"] == 24
    assert {"rng", "skipped", "halted", "monitor/loss_mean", "params/tokens/weight"} <= arrays.keys()
    for path in [path for path in arrays if path.startswith("params/")]:
        moments = [moment for moment in arrays if moment.endswith("/" + path.removeprefix("params/"))]
        assert len(moments) == 3, path  # the parameter and Adam's two
    assert record["progress"] == {"best": min(runs.evaluations(finished).values()), "since_best": 0}
    assert record["identity"]["model"]["vocab_size"] == 256


def test_intervals_of_zero_switch_things_off(text, finished, tmp_path, capsys):
    off = ("train.log_every=0", "train.eval_every=0", "checkpoint.every=0")
    assert runs.run(runs.overrides(text, tmp_path / "run", *off)) == DONE
    said = capsys.readouterr().out
    assert not re.search(r"^(step|eval) \d", said, re.MULTILINE)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert runs.steps(tmp_path / "run") == [runs.STEPS]  # the end of a run is always kept
    runs.assert_same_arrays(runs.checkpoint(tmp_path / "run", 24), runs.checkpoint(finished, 24))


def test_intervals_and_what_is_kept(text, tmp_path):
    every = ("train.log_every=5", "train.eval_every=10", "checkpoint.every=7", "checkpoint.keep=1")
    assert runs.run(runs.overrides(text, tmp_path / "run", *every)) == DONE
    assert list(runs.losses(tmp_path / "run")) == [1, 5, 10, 15, 20, 24]  # the first and the last are always told
    evaluations = runs.evaluations(tmp_path / "run")
    assert list(evaluations) == [10, 20, 24]
    assert runs.steps(tmp_path / "run") == sorted({min(evaluations, key=evaluations.get), 24})


def test_default_text_samples_and_tracking(text, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("ISOMESH_CACHE", str(tmp_path / "new"))  # so that the machine's peak is measured
    words = ("data=stdlib", f"data.cache={text.parent / 'cache'}", "train.steps=2", "optimizer.warmup_steps=0")
    sampling = ("sample.tokens=4", "sample.prompts=['def ','import ']", "wandb.mode=offline", "train.eval_batches=1")
    arguments = runs.overrides(text, tmp_path / "run", *words, *sampling)
    arguments.remove(f"data.path={text}/*.txt")
    assert runs.run(arguments, peak=train.peak_flops) == DONE
    assert "matmul measured" in (tmp_path / "run" / "run.log").read_text()
    samples = (tmp_path / "run" / "samples.txt").read_text()
    assert samples.startswith("--- step 2, prompt 'def '\ndef ")
    assert "--- step 2, prompt 'import '\nimport " in samples
    (recorded,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert recorded.name.endswith("-" + compose.load_run(tmp_path / "run").run.id)
    assert "sample 1 | prompt 'def '" in (tmp_path / "run" / "run.log").read_text()


def test_samples_that_are_compiled_ahead_are_the_same(text, tmp_path, monkeypatch):
    words = ("sample.tokens=4", "sample.prompts=['the mesh','of ']", "train.steps=2", "mesh.fsdp=4", "mesh.tensor=2")
    assert runs.run(runs.overrides(text, tmp_path / "plain", *words)) == DONE
    monkeypatch.setattr(ahead, "TRAINS_ITSELF", ())
    lowered, lower = [], generate._generate.lower
    lower_once = SimpleNamespace(lower=lambda *a, **k: lowered.append(1) or lower(*a, **k))  # it cannot be called
    monkeypatch.setattr(generate, "_generate", lower_once)
    assert runs.run(runs.overrides(text, tmp_path / "ahead", *words)) == DONE
    assert lowered == [1], "compiled once, in the thread: at the end nothing is left to compile"
    plain, early = ((tmp_path / name / "samples.txt").read_text() for name in ("plain", "ahead"))
    assert early == plain
    assert runs.losses(tmp_path / "ahead") == runs.losses(tmp_path / "plain")


def test_what_cannot_be_generated_is_told_as_without_a_thread(text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ahead, "TRAINS_ITSELF", ())
    monkeypatch.setattr(generate, "check", mock.Mock(side_effect=ValueError("no text from this one")))
    arguments = runs.overrides(text, tmp_path / "run", "sample.tokens=4", "train.steps=2")
    assert runs.run(arguments) == DONE
    assert capsys.readouterr().out.count("no samples: no text from this one") == 1


# ------------------------------------------------------------------------------------------------------------ the loop


def named(make, name: str):
    """`make` whose function has a name of its own, to be told apart in the log of compilations."""

    def renamed(*arguments, **options):
        function = make(*arguments, **options)

        def call(*inputs):
            return function(*inputs)

        call.__name__ = name
        return call

    return renamed


def test_everything_compiles_once_and_nothing_is_transferred_behind_the_back(text, finished, tmp_path, caplog):
    seen, batch = {}, feed.Feed.batch

    def watched(self, cursor):
        seen[cursor] = len(caplog.records)
        return batch(self, cursor)

    with (
        mock.patch.object(feed.Feed, "batch", watched),
        mock.patch.object(job, "make_train_step", named(job.make_train_step, "the_step")),
        mock.patch.object(job, "make_eval_step", named(job.make_eval_step, "the_evaluation")),
        caplog.at_level(logging.WARNING),
        jax.log_compiles(),
    ):
        assert runs.run(runs.overrides(text, tmp_path / "run", "runtime.transfer_guard=true")) == DONE
    compiled = [match[1] for record in caplog.records if (match := COMPILING.match(record.getMessage()))]
    assert compiled.count("jit(the_step)") == 1, compiled
    assert compiled.count("jit(the_evaluation)") == 1, compiled
    after = [record.getMessage() for record in caplog.records[seen[9] :]]  # past a first save and evaluation
    assert not [message for message in after if COMPILING.match(message)]
    assert runs.losses(tmp_path / "run") == runs.losses(finished)


def test_transfer_guard_catches_a_batch_that_stayed_on_the_host(text, tmp_path, capsys):
    put_batch = feed.put_batch

    def forgetful(mesh, rows, size):
        return rows if forgetful.calls == 5 else put_batch(mesh, rows, size)

    def counting(*arguments):
        forgetful.calls += 1
        return forgetful(*arguments)

    forgetful.calls = 0
    with mock.patch.object(feed, "put_batch", counting):
        arguments = runs.overrides(text, tmp_path / "run", "runtime.transfer_guard=true", "train.eval_every=0")
        assert runs.run(arguments) == FAULT
    assert "Disallowed host-to-device transfer" in (tmp_path / "run" / "run.log").read_text()


def test_fault_while_running_exits_3_and_the_run_goes_on_after_it(text, finished, tmp_path, capsys):
    batch = Loader.batch

    def broken(self, cursor, rows=None):
        if cursor == 9:
            raise RuntimeError("the shelf fell down")
        return batch(self, cursor, rows)

    arguments = runs.overrides(text, tmp_path / "run")
    with mock.patch.object(Loader, "batch", broken):
        assert runs.run(arguments) == FAULT
    log = (tmp_path / "run" / "run.log").read_text()
    assert "RuntimeError: the shelf fell down" in log
    assert "goes on from its last checkpoint" in log
    assert runs.steps(tmp_path / "run") == [4, 8]
    assert runs.run(arguments) == DONE
    assert runs.losses(tmp_path / "run") == runs.losses(finished)


def test_unwritable_checkpoints_are_told_and_trained_past(text, finished, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    there = f"checkpoint.dir={tmp_path / 'file' / 'checkpoints'}"
    assert runs.run(runs.overrides(text, tmp_path / "run", there)) == FAULT
    said = capsys.readouterr().out
    assert "error: step 4 was not saved: NotADirectoryError" in said
    last = said.splitlines()[-1]
    assert "the last checkpoint was not written, and in" in last
    assert f"there is none: step {runs.STEPS} was not saved: NotADirectoryError" in last
    assert runs.losses(tmp_path / "run") == runs.losses(finished)
    assert (tmp_path / "file").read_text() == "in the way"


# ----------------------------------------------------------------------------------------------------- non-finite steps

HUGE = ("optimizer.lr=1e16", "optimizer.clip_norm=0", "optimizer.warmup_steps=0", "train.eval_every=0")


def assert_finite(arrays: dict[str, np.ndarray]) -> None:
    assert all(np.isfinite(array).all() for array in arrays.values())


def test_nonfinite_step_stops_the_run_with_the_state_before_it(text, tmp_path, capsys):
    arguments = runs.overrides(text, tmp_path / "run", *HUGE)
    assert runs.run(arguments, devices=1) == FAULT
    assert re.search(r"warning: step 2 is not finite: loss .*, gradient norm .*; stopping", capsys.readouterr().out)
    assert runs.steps(tmp_path / "run") == [1]
    arrays = runs.checkpoint(tmp_path / "run", 1)
    assert_finite(arrays)
    assert arrays["step"] == 1
    assert not arrays["halted"]
    assert runs.run(arguments, devices=1) == FAULT  # it comes to the same step again, and saves nothing over it
    assert "resumed after step 1" in capsys.readouterr().out
    runs.assert_same_arrays(runs.checkpoint(tmp_path / "run", 1), arrays)


def test_nonfinite_steps_are_skipped_counted_and_logged(text, tmp_path, capsys):
    arguments = runs.overrides(text, tmp_path / "run", *HUGE, "train.nonfinite=skip", "train.log_every=10")
    assert runs.run(arguments, devices=1) == DONE
    said = capsys.readouterr().out
    assert "step 2 is not finite" in said
    assert "the update was skipped" in said
    arrays = runs.checkpoint(tmp_path / "run", runs.STEPS)
    assert_finite(arrays)
    assert arrays["skipped"] == runs.STEPS - 1
    lines = {line["step"]: line for line in runs.lines(tmp_path / "run")}
    assert lines[1]["train/skipped"] == 0
    assert lines[7]["train/skipped"] == 6  # between two log points, since it was not finite


def test_a_finite_step_to_parameters_that_are_not_finite_is_not_taken(text, tmp_path, capsys):
    arguments = runs.overrides(text, tmp_path / "run", *HUGE, "optimizer.lr=1e37", "train.nonfinite=skip")
    assert runs.run(arguments, devices=1) == DONE
    assert "step 1 is not finite" in capsys.readouterr().out
    assert_finite(runs.checkpoint(tmp_path / "run", runs.STEPS))


def test_nonfinite_evaluation_is_never_the_best(text, tmp_path, capsys):
    make = job.make_eval_step

    def broken(*arguments):
        return lambda *inputs: make(*arguments)(*inputs) | {"nats": np.float32(np.nan)}

    with mock.patch.object(job, "make_eval_step", broken):
        assert runs.run(runs.overrides(text, tmp_path / "run")) == DONE
    assert all(math.isnan(loss) for loss in runs.evaluations(tmp_path / "run").values())
    assert runs.record(tmp_path / "run", runs.STEPS)["progress"] == {"best": None, "since_best": 3}
    assert not re.search(r"eval .*best", capsys.readouterr().out)


# ------------------------------------------------------------------------------------------------- patience, and equals


def test_run_out_of_patience_stops_and_keeps_its_best(text, tmp_path, capsys):
    getting_worse = ("optimizer.lr=3", "optimizer.warmup_steps=24", "train.eval_every=1", "train.patience=3")
    arguments = runs.overrides(text, tmp_path / "run", *getting_worse, "checkpoint.keep=1")
    assert runs.run(arguments, devices=1) == DONE
    evaluations = runs.evaluations(tmp_path / "run")
    best = min(evaluations, key=evaluations.get)
    assert list(evaluations) == list(range(1, best + 4))
    assert best + 3 < runs.STEPS
    assert runs.steps(tmp_path / "run") == [best, best + 3]
    assert f"no better eval/loss in 3 evaluations: stopping after step {best + 3}" in capsys.readouterr().out
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert runs.run(arguments, devices=1) == DONE  # it had stopped, and has not become more patient
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == metrics


def test_accumulation_and_mesh_change_no_loss_even_with_dropout(text, tmp_path):
    plain = ("model.dropout=0.2", "train.eval_every=0", "train.steps=6", "checkpoint.every=0")

    def trained(name: str, devices: int, *more: str) -> dict[int, float]:
        assert runs.run(runs.overrides(text, tmp_path / name, *plain, *more), devices) == DONE
        found = runs.losses(tmp_path / name)
        shutil.rmtree(tmp_path / name)
        return found

    whole = trained("whole", 1)
    runs.assert_near(trained("accumulated", 1, "train.grad_accumulation=4"), whole, relative=1e-6)
    meshed = ("mesh.data=2", "mesh.tensor=2", "train.grad_accumulation=2")
    runs.assert_near(trained("meshed", 8, *meshed), whole)


# ------------------------------------------------------------------------------------------- what must not be lost


def test_a_directory_in_use_is_refused(text, tmp_path, capsys):
    with RunDirectory(tmp_path / "run").held():
        assert runs.run(runs.overrides(text, tmp_path / "run")) == MISTAKE
    assert "is in use by another process" in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_metrics_without_a_checkpoint_are_kept_beside(text, tmp_path):
    arguments = runs.overrides(text, tmp_path / "run", "train.steps=4")
    assert runs.run(arguments) == DONE
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert runs.run(arguments) == DONE
    assert (tmp_path / "run" / "metrics.1.jsonl").read_bytes() == before
    assert list(runs.losses(tmp_path / "run")) == [1, 2, 3, 4]


def test_samples_that_cannot_be_made_do_not_spoil_a_run(text, tmp_path, capsys):
    prompts = (f"sample.prompts=[{'x' * 60},short,{'y' * 30}]", "sample.tokens=5")
    learned = ("model.positions=learned", "model.max_positions=32")
    assert runs.run(runs.overrides(text, tmp_path / "run", *prompts, *learned, "train.steps=2")) == DONE
    out, samples = capsys.readouterr().out, (tmp_path / "run" / "samples.txt").read_text()
    assert "its 60 tokens leave no room in model.max_positions=32" in out
    assert ["short" in samples, "y" * 30 in samples, "x" * 60 in samples] == [True, True, False]
    assert runs.steps(tmp_path / "run") == [2]
