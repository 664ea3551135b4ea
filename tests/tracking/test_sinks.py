"""metrics.jsonl through kills and resumes, and sinks that never stop a run."""

import json
import logging
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tracking.metrics_file import MetricsFile, last_value, read_metrics
from tracking.sinks import MetricsConfig, Sinks, TensorBoardSink, WandbConfig, WandbSink

ROOT = Path(__file__).parents[2]


def wandb_sink(directory, mode="offline"):
    return WandbSink(
        mode=mode,
        project="p",
        entity=None,
        run_id="stable1",
        name="n",
        group=None,
        tags=("a",),
        config={"model": {"width": 8}},
        directory=directory,
    )


# ---------------------------------------------------------------------------------------------------------------------
# metrics.jsonl


def test_floats_come_back_bit_for_bit_and_lines_are_strict_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    values = {"a": 0.1 + 0.2, "b": float(np.nextafter(1.0, 2.0)), "c": np.float32(0.1), "d": 5e-324, "n": np.int64(7)}
    odd = {"nan": math.nan, "inf": math.inf, "minus": np.float32(-np.inf), "word": "text", "flag": True}
    file = MetricsFile(path)
    file.log(3, values | odd)
    (record,) = read_metrics(path)  # before close: every line is out at once
    assert record["step"] == 3
    assert all(record[key] == float(value) for key, value in values.items())
    assert math.isnan(record["nan"])
    assert (record["inf"], record["minus"], record["word"], record["flag"]) == (math.inf, -math.inf, "text", True)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    strict = json.loads(path.read_text(), parse_constant=refuse)
    assert (strict["nan"], strict["minus"]) == ("NaN", "-Infinity")
    assert repr(0.1 + 0.2) in path.read_text()


def test_last_value_is_found_behind_lines_without_it_and_torn_ones(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert last_value(path, "x") is None
    path.write_bytes(b'{"step": 1, "x": 1.5}\n{"step": 2, "x": 2.5}\n{"step": 2}\n{"step": 3, "x": 3')
    assert last_value(path, "x") == 2.5
    assert last_value(path, "y") is None


def test_resume_drops_later_and_torn_lines_and_keeps_the_rest_as_bytes(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    for step in range(1, 8):
        file.log(step, {"train/loss": 1 / step})
    file.log(5, {"eval/loss": 0.5})
    before = path.read_bytes().splitlines(keepends=True)
    with open(path, "ab") as handle:
        handle.write(b'{"step": 6, "train/lo')
    MetricsFile(path).resume(5)
    assert path.read_bytes().splitlines(keepends=True) == before[:5] + before[7:]
    assert list(tmp_path.iterdir()) == [path]

    file = MetricsFile(path)
    file.resume(5)
    for step in (6, 7):
        file.log(step, {"train/loss": 1 / step})
    steps = [record["step"] for record in read_metrics(path) if "train/loss" in record]
    assert steps == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("cut", [1, 10, 20])
def test_a_line_torn_anywhere_is_ignored_and_dropped(tmp_path, cut):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.log(1, {"x": 1.0})
    file.log(2, {"x": 123.0})
    path.write_bytes(path.read_bytes()[:-cut])
    assert [record["step"] for record in read_metrics(path)] == [1]
    MetricsFile(path).resume(2)
    assert path.read_bytes() == b'{"step": 1, "x": 1.0}\n'


def test_resume_without_a_file_makes_none(tmp_path):
    MetricsFile(tmp_path / "metrics.jsonl").resume(5)
    assert list(tmp_path.iterdir()) == []


def test_killed_process_loses_no_logged_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    code = (
        "import os, signal, sys; from tracking.metrics_file import MetricsFile; file = MetricsFile(sys.argv[1])\n"
        "for step in range(50): file.log(step, {'x': step / 3})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, check=False).returncode == -9
    assert [record["x"] for record in read_metrics(path)] == [step / 3 for step in range(50)]


def test_unwritable_file_warns_once_and_goes_on(tmp_path, caplog):
    file = MetricsFile(tmp_path / "no such folder" / "metrics.jsonl")
    with caplog.at_level(logging.WARNING, logger="isomesh"):
        for step in range(3):
            file.log(step, {"x": 1.0})
    assert len(caplog.records) == 1
    assert "metrics.jsonl" in caplog.text


def test_full_disk_warns_once_and_a_later_line_is_whole(tmp_path, caplog):
    file = MetricsFile("/dev/full")
    with caplog.at_level(logging.WARNING, logger="isomesh"):
        file.log(1, {"x": 1.0})
        file.log(2, {"x": 1.0})
    assert [record.getMessage().count("No space left") for record in caplog.records] == [1]
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "x')
    file._file = open(path, "ab", buffering=0)  # noqa: SIM115 (space is back)
    file.log(3, {"x": 3.0})
    assert [record["step"] for record in read_metrics(path)] == [3]


# ---------------------------------------------------------------------------------------------------------------------
# Sinks


def test_only_the_primary_process_writes(tmp_path):
    for primary in (False, True):
        path = tmp_path / f"{primary}.jsonl"
        sinks = Sinks([MetricsFile(path)], primary=primary)
        sinks.start()
        sinks.log(1, {"x": 1.0})
        sinks.log_samples(1, [("a", "b")])
        sinks.close()
        assert path.exists() == primary


def test_wandb_offline_writes_under_the_stable_id_and_says_nothing(tmp_path, capfd, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "openai"]:
        monkeypatch.delitem(sys.modules, name)  # of other tests; W&B has words for whoever imports it
    sink = wandb_sink(tmp_path)
    sink.log(1, {"train/loss": np.float32(1.5), "perf/mfu": math.nan})
    sink.log_samples(1, [("prompt", "continuation")])
    sink.log(2, {"train/loss": 1.25})
    assert sink._run.id == "stable1"
    assert sink._run.summary["train/loss"] == 1.5  # a step is complete when the next begins
    assert sink._run.config["model"] == {"width": 8}
    sink.finish()
    (run,) = (tmp_path / "wandb").glob("offline-run-*-stable1")
    assert (run / "run-stable1.wandb").stat().st_size > 0
    assert list(run.glob("files/media/table/samples_*.json"))
    assert capfd.readouterr() == ("", "")


def test_wandb_takes_metrics_of_a_step_that_has_passed(tmp_path, monkeypatch):
    sink, logged = wandb_sink(tmp_path), []
    sink.log(9, {"train/loss": 1.5})
    monkeypatch.setattr(sink._run, "log", lambda values, **at: logged.append((values, at)))
    sink.log_at(4, {"eval/capitals/acc": 0.25})
    assert logged == [({"step": 4, "eval/capitals/acc": 0.25}, {})]  # W&B would drop what is logged at its own step 4
    sink.finish()


def test_disabled_wandb_and_a_bare_import_load_neither_wandb_nor_jax(tmp_path):
    code = (
        "import sys, tracking.sinks, tracking.console; from tests.tracking.test_sinks import wandb_sink\n"
        f"sink = wandb_sink({str(tmp_path)!r}, 'disabled'); sink.start(); sink.log(1, {{'x': 1}}); sink.finish()\n"
        "print([name for name in ('wandb', 'jax', 'tensorboardX') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"
    assert list(tmp_path.iterdir()) == []


def test_failing_wandb_is_one_warning(tmp_path, caplog, monkeypatch):
    import wandb

    def fail(**_):
        raise RuntimeError("no route\nto host")

    monkeypatch.setattr(wandb, "init", fail)
    sink = wandb_sink(tmp_path)
    with caplog.at_level(logging.WARNING, logger="isomesh"):
        sink.start()
        sink.log(1, {"x": 1.0})
        sink.log_samples(1, [])
        sink.finish()
    assert [record.getMessage() for record in caplog.records] == ["W&B failed (no route); the run goes on without it"]


def test_tensorboard_writes_event_files(tmp_path):
    sink = TensorBoardSink(tmp_path)
    sink.log(1, {"train/loss": 1.5, "note": "text"})
    sink.log_samples(1, [("a", "b")])
    sink.close()
    assert [path for path in tmp_path.iterdir() if "tfevents" in path.name and b"train/loss" in path.read_bytes()]


def test_missing_tensorboard_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="extra `tensorboard`"):
        TensorBoardSink(tmp_path)
    with pytest.raises(ValueError, match="extra `tensorboard`"):
        MetricsConfig(tensorboard=True)


def test_wrong_wandb_settings_name_the_choices():
    with pytest.raises(ValueError, match=r"wandb.mode=onlin.*offline, online, disabled"):
        WandbConfig(mode="onlin")
    with pytest.raises(ValueError, match="project"):
        WandbConfig(project="")
