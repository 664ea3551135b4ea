"""What is asked of compilers, and what is said where there is none; the compilers themselves: make aot-tpu, aot-gpu."""

import json
import subprocess
from types import SimpleNamespace

import pytest

from config.compose import load
from planner import compile
from planner.__main__ import main
from planner.cost import Planner
from planner.machine import open_machine
from planner.search import Pins, search
from planner.software import program

WORDS = ["model=llama_1b", "optimizer=adamw", "train.batch_size=1024", "train.seq_len=2048"]


def planner_of(hardware: str, devices: int) -> Planner:
    """For a small model."""
    machine = open_machine(hardware, calibrated=False)
    return Planner(load(WORDS), machine, devices, program("isomesh", machine.platform))


@pytest.mark.parametrize(
    ("hardware", "devices", "name"),
    [
        ("v5e", 256, "v5e:16x16"),
        ("v5p", 64, "v5p:4x4x4"),
        ("v6e", 32, "v6e:4x8"),
        ("v6e", 256, "v6e:16x16"),
        ("v5p", 256, "v5p:4x8x8"),
        ("h100", 64, "8x1x8"),
        ("h200", 4, "1x1x4"),
        ("cpu", 8, "8"),
    ],
)
def test_topologies_have_the_compilers_names(hardware, devices, name):
    assert compile.topology(planner_of(hardware, devices)) == name


@pytest.mark.parametrize(("hardware", "devices"), [("v5e", 512), ("mi300x", 8)])
def test_what_no_compiler_knows_is_said(hardware, devices):
    with pytest.raises(ValueError, match="--compile: "):
        compile.topology(planner_of(hardware, devices))


def test_an_absent_compiler_is_told_with_what_makes_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(compile, "ROOT", tmp_path)
    assert main([*WORDS, "--hardware", "v5e", "--devices", "16", "--compile", "1"]) == 2
    assert capsys.readouterr().err == "error: --compile needs the compiler for TPUs: run `make aot-tpu` once (1.5 GB)\n"


def test_answers_of_a_compiler_are_told(monkeypatch):
    planner = planner_of("h200", 8)
    monkeypatch.setattr(compile, "interpreter", lambda platform: "python")
    prediction = planner.predict(search(planner, Pins({})).fitting[0].layout)
    predicted = prediction.memory.total - prediction.memory.fragmentation
    row = {"kind": "all-gather", "axes": ["fsdp"], "times": 12, "bytes": 3e9, "asynchronous": True}
    answer = {"arguments": predicted / 2, "temporary": predicted / 2, "code": 0.0, "flops": 1e12, "collectives": [row]}
    answer |= {"largest": [["f32[8,8]", 256.0]], "least_s": 0.5, "seconds": 3.0}
    child = SimpleNamespace(returncode=0, stdout=f"noise\n{json.dumps(answer)}\n", stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: child)
    found = compile.compiled(planner, prediction, WORDS)
    assert found.fits
    said = compile.told(found)
    assert "+0.0%" in said
    assert "all-gather" in said
    assert "least time by kernels 500.0 ms" in said
    child.returncode, child.stderr = 2, "noise\nRESOURCE_EXHAUSTED: needs more"
    with pytest.raises(compile.Refused, match="the compiler refuses it: RESOURCE_EXHAUSTED"):
        compile.compiled(planner, prediction, WORDS)
    child.returncode = -9
    with pytest.raises(ValueError, match="was ended by SIGKILL"):
        compile.compiled(planner, prediction, WORDS)


def test_a_compiler_without_an_end_is_ended(monkeypatch):
    planner = planner_of("h200", 8)
    monkeypatch.setattr(compile, "interpreter", lambda platform: "python")

    def late(*_, **options):
        raise subprocess.TimeoutExpired("python", options["timeout"])

    monkeypatch.setattr(subprocess, "run", late)
    with pytest.raises(ValueError, match="not compiled after 30 minutes"):
        compile.compiled(planner, planner.predict(search(planner, Pins({})).fitting[0].layout), WORDS)


def test_a_refusal_is_an_answer_and_the_next_layout_is_asked(monkeypatch, capsys):
    asked = []

    def refuse(planner, prediction, settings, text):
        asked.append(prediction.layout)
        raise compile.Refused(f"{prediction.layout.told()}: the compiler refuses it: RESOURCE_EXHAUSTED")

    monkeypatch.setattr(compile, "interpreter", lambda platform: "python")
    monkeypatch.setattr(compile, "compiled", refuse)
    assert main([*WORDS, "--hardware", "v5e", "--devices", "16", "--compile", "2"]) == 0
    assert len(set(asked)) == 2
    assert capsys.readouterr().out.count("RESOURCE_EXHAUSTED") == 2


def test_programs_are_kept_where_there_is_nothing_yet(tmp_path, capsys):
    words = [*WORDS, "--hardware", "cpu", "--devices", "8", "--compile", "1", "--texts", str(tmp_path)]
    assert main(words) == 2
    assert f"--texts {tmp_path} is there already" in capsys.readouterr().err


def test_what_is_asked_names_the_rates_of_the_data_sheet():
    planner = planner_of("v5e", 256)
    asked = compile.question(planner, WORDS)
    assert asked["topology"] == "v5e:16x16"
    assert asked["rates"]["flops"] == planner.machine.peak("bfloat16")
    json.dumps(asked)  # it goes to another process
