"""Products of many axes: three of sixteen devices, one over four processes, and random ones, equal one device."""

import math
import os
import re

import hypothesis
import pytest
import runs
from every import few_of
from hypothesis import strategies as st
from meshes import MODELS, assert_changes_nothing

from config import compose, layout
from parallel.mesh import AXES, factorizations
from parallel.pipeline.schedules import DEFAULT_CHUNKS

SEED = int(os.environ.get("ISOMESH_SEED", "0"))  # of the random meshes: another one draws others


def parity(model: str, devices: int, mesh: str, *how: str, processes: int = 1) -> str:
    """Output of the command that a user would type; it must succeed."""
    axes = dict.fromkeys(AXES, "1") | dict(axis.split("=") for axis in mesh.split())
    arguments = [*MODELS[model], *(f"mesh.{axis}={size}" for axis, size in axes.items()), *how]
    ended = runs.outside(arguments, devices=devices, processes=processes, program=("-m", "training.parity"))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "the mesh changes nothing" in ended.stdout
    return ended.stdout


SIXTEEN = [
    ("llama", "pipe=2 data=2 context=2 tensor=2", ["pipeline.schedule=interleaved", "model.layers=4"]),
    ("moe", "pipe=2 fsdp=2 expert=2 tensor=2", ["pipeline.schedule=zero_bubble"]),
    ("moe", "data=2 fsdp=2 expert=2 context=2", []),
]


@pytest.mark.long
@pytest.mark.parametrize(("model", "mesh", "how"), few_of(SIXTEEN, SIXTEEN[1:2]))
def test_sixteen_devices(model, mesh, how):
    out = parity(model, 16, mesh, *how)
    for kind, tolerance in (("loss", 1e-5), ("gradient", 2e-5)):
        assert float(re.search(rf"{kind} +(\S+)", out, re.MULTILINE)[1]) <= tolerance


@pytest.mark.long
def test_four_processes_of_two_devices():
    parity("llama", 8, "pipe=2 data=2 fsdp=1 tensor=2", "pipeline.schedule=zero_bubble", processes=4)


def legal(model: str) -> list[tuple[dict, str]]:
    """Every mesh of 8 devices with at least two axes that the model can be trained on, with a schedule."""
    cfg, found = compose.load(MODELS[model]), []
    for sizes in factorizations(8):
        if sum(n > 1 for n in sizes.values()) < 2 or any(r.problem(sizes) for r in layout.requirements(cfg)):
            continue
        possible = [s for s, chunks in DEFAULT_CHUNKS.items() if cfg.model.layers >= sizes["pipe"] * chunks]
        found += [(sizes, schedule) for schedule in (possible if sizes["pipe"] > 1 else ["1f1b"])]
    return found


@hypothesis.seed(SEED)
@hypothesis.settings(max_examples=4, deadline=None, database=None, phases=[hypothesis.Phase.generate])
@hypothesis.given(st.data())
def test_random_legal_meshes(data):
    model = data.draw(st.sampled_from(["llama", "gpt2", "moe"]))
    sizes, schedule = data.draw(st.sampled_from(legal(model)))
    hypothesis.note(f"ISOMESH_SEED={SEED}: {model} on {sizes}, {schedule}")
    print(f"ISOMESH_SEED={SEED}: {model} on {sizes}, {schedule}")
    assert math.prod(sizes[axis] for axis in AXES) == 8
    assert_changes_nothing(model, sizes, f"pipeline.schedule={schedule}")
