"""Factors are fitted to runs, kept by machine, and used; what no run tells of stays."""

import json
from dataclasses import replace

import pytest

from config.compose import load, to_yaml
from planner.__main__ import main
from planner.calibration import Observation, fit, observe
from planner.cost import Planner
from planner.layout import layout_of
from planner.machine import Sustained, open_machine
from planner.software import program

WORDS = ["model=llama_1b", "train.seq_len=2048", "optimizer=adamw", "train.compute_dtype=bfloat16"]


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("ISOMESH_CACHE", str(tmp_path / "cache"))


def run(path, words: list[str], step_ms: float, peak: str = "NVIDIA H200, bfloat16, dense"):
    """A run's directory as train.py leaves it."""
    path.mkdir()
    (path / "config.yaml").write_text(to_yaml(load(words)))
    lines = [{"step": 0, "perf/peak": peak}, {"step": 1, "perf/step_ms": 9 * step_ms}]
    lines += [{"step": 10 * n, "perf/step_ms": step_ms, "perf/memory_gb": 50.0} for n in (1, 2, 3)]
    (path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\nbroken\n")
    return path


def observed(tmp_path, truth: Sustained) -> list[Observation]:
    """Runs on a machine that sustains this."""
    machine, found = replace(open_machine("h200"), sustained=truth), []
    for number, batch in enumerate((4, 16)):
        words = [*WORDS, f"train.batch_size={batch}", "mesh.fsdp=1"]
        config = load(words)
        layout = layout_of(config, config.mesh.sizes)
        step = Planner(config, machine, 1, program("isomesh", "gpu")).predict(layout).step
        found.append(observe(run(tmp_path / f"run{number}", words, 1e3 * step)))
    return found


def test_a_run_is_read(tmp_path):
    words = [*WORDS, "train.batch_size=16", "mesh.fsdp=4", "mesh.tensor=2"]
    found = observe(run(tmp_path / "run", words, 250.0))
    assert (found.hardware, found.devices, found.step, found.memory) == ("h200", 8, 0.25, 50e9)
    assert (found.layout.fsdp, found.layout.tensor) == (4, 2)


def test_what_a_machine_sustains_is_found(tmp_path):
    truth = Sustained(matmul=0.5, memory=0.6, inside=0.8, across=0.85)
    machine, observations = open_machine("h200"), observed(tmp_path, truth)
    found = fit(observations, machine)
    assert found.matmul == pytest.approx(truth.matmul, rel=0.1)
    assert found.across == pytest.approx(machine.sustained.across, rel=0.01)  # no run crosses hosts
    for o in observations:
        assert o.predicted(replace(machine, sustained=found)).step == pytest.approx(o.step, rel=0.05)


def test_calibrated_factors_are_kept_and_used(tmp_path, capsys):
    observed(tmp_path, Sustained(matmul=0.5, memory=0.6, inside=0.8, across=0.85))
    plain = open_machine("h200")
    assert main(["calibrate", str(tmp_path / "run0"), str(tmp_path / "run1")]) == 0
    assert "2 runs" in capsys.readouterr().out
    fitted = open_machine("h200")
    assert fitted.sustained.matmul < plain.sustained.matmul
    assert fitted.calibrated.startswith("fitted to 2 runs")
    assert open_machine("h200", calibrated=False) == plain


def test_what_tells_too_little_is_said(tmp_path, capsys):
    words = [*WORDS, "train.batch_size=16"]
    assert main(["calibrate", str(run(tmp_path / "open", words, 250.0))]) == 2
    assert "add --devices N" in capsys.readouterr().err
    assert main(["calibrate", str(run(tmp_path / "other", words, 250.0, "abacus, bfloat16"))]) == 2
    assert "ran on abacus" in capsys.readouterr().err
    assert main(["calibrate", str(tmp_path)]) == 2
    assert "no run directory" in capsys.readouterr().err


def test_a_damaged_file_is_named(tmp_path):
    kept = tmp_path / "cache" / "planner" / "h200.json"
    kept.parent.mkdir(parents=True)
    kept.write_text("{")
    with pytest.raises(ValueError, match="h200.json is damaged"):
        open_machine("h200")
