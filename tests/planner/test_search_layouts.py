"""Searching: all legal layouts and no others, pins are kept, what is told is what is predicted, and it is fast."""

import json
import math
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from config import compose
from config.layout import mesh_sizes, requirements
from model.transformer import describe
from parallel.config import schedule_for
from parallel.mesh import factorizations, make_mesh
from planner.__main__ import main
from planner.cost import Planner
from planner.layout import Layout, layout_of
from planner.machine import open_machine
from planner.parameters import Parameters
from planner.search import Pins, layouts, meshes, pins_of, search
from planner.software import program

ROOT = Path(__file__).parent.parent.parent
SMALL = ["model=llama_1b", "train.batch_size=16", "train.seq_len=2048", "optimizer=adamw"]
LARGE = ["model=llama3_70b", "train.batch_size=1024", "train.seq_len=8192", "optimizer=adamw"]


def planner_of(words: list[str], devices: int, hardware: str = "h200") -> Planner:
    """For these settings."""
    machine = open_machine(hardware)
    return Planner(compose.load(words), machine, devices, program("isomesh", machine.platform))


def test_meshes_are_all_legal_ones():
    config = compose.load([*SMALL, "model=moe_nano", "train.seq_len=1024"])
    found = {tuple(sizes.values()) for sizes in meshes(config, 8, Pins({}))}
    asked = requirements(config)
    legal = {tuple(s.values()) for s in factorizations(8) if not any(r.problem(s) for r in asked)}
    assert found == {s for s in legal if s[0] <= config.model.layers and s[4] == 1}


def test_every_layout_is_one_that_train_py_takes():
    config = compose.load(SMALL)
    some = [layout for sizes in meshes(config, 16, Pins({})) for layout in layouts(config, sizes, Pins({}))][::151]
    assert len(some) > 5
    for layout in some:
        asked = compose.load([*SMALL, *layout.overrides()])
        sizes = mesh_sizes(asked, 16)  # raises where it is not legal
        schedule = schedule_for(asked.pipeline, asked.train.batch_size // asked.train.grad_accumulation, sizes)
        assert layout_of(asked, sizes, schedule and schedule.microbatches) == normal(layout)
        assert layout_of(layout.applied(config), sizes, schedule and schedule.microbatches) == normal(layout)


def normal(layout: Layout) -> Layout:
    """A layout without a pipeline has no schedule, and without shards of a sequence no style."""
    return layout if layout.pipe > 1 else replace(layout, schedule="zero_bubble", chunks=1)


def test_pins_are_kept():
    words = [*SMALL, "mesh.tensor=2", "train.remat=full", "pipeline.schedule=1f1b"]
    planner = planner_of(words, 16)
    found = search(planner, pins_of(planner.config, words))
    assert found.fitting
    for weighed in found.fitting:
        assert (weighed.layout.tensor, weighed.layout.remat) == (2, "full")
        assert weighed.layout.schedule == "1f1b" or weighed.layout.pipe == 1


def test_what_is_weighed_is_what_is_predicted():
    planner = planner_of(SMALL, 16)
    for weighed in search(planner, Pins({})).fitting[::97]:
        p = planner.predict(weighed.layout)
        assert p.step == pytest.approx(weighed.step)
        assert p.memory.total == pytest.approx(weighed.memory)


def test_parameters_of_a_device_are_those_of_the_shardings():
    config = compose.load([*SMALL, "model=moe_nano", "model.vocab_size=512"])
    sizes = {"pipe": 1, "data": 1, "fsdp": 2, "expert": 2, "context": 1, "tensor": 2}
    mesh = make_mesh(sizes)
    with jax.set_mesh(mesh):
        description = describe(config.model)
    shapes, shardings = jax.tree.leaves(description.shapes), jax.tree.leaves(description.shardings(mesh))
    exact = sum(math.prod(h.shard_shape(s.shape)) for s, h in zip(shapes, shardings, strict=True))
    assert Parameters(config.model).held(sizes, config.model.layers).stored == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("devices", [2, 16])
def test_what_a_search_leaves_out_decides_nothing(devices, monkeypatch):
    """On 2 of these devices nothing fits, on 16 some layouts do: the best, or the smallest, are those of all."""
    planner = planner_of([*SMALL, "model=llama3_8b"], devices, "v5e")
    found = search(planner, Pins({}))
    monkeypatch.setattr("planner.search.SLOWEST", math.inf)
    monkeypatch.setattr("planner.search.least_memory", lambda *_: 0.0)
    whole = search(planner, Pins({}))
    assert whole.considered > found.considered
    assert bool(whole.fitting) == (devices > 2)
    assert found.meshes()[:5] == whole.meshes()[:5]
    assert found.fitting or found.too_large[0] == whole.too_large[0]


def test_state_alone_is_less_than_any_layout_needs():
    planner = planner_of(SMALL, 16)
    for weighed in search(planner, Pins({})).fitting[::31]:
        assert planner.state_bytes(weighed.layout) < weighed.memory


@pytest.mark.long
def test_a_search_of_a_thousand_devices_takes_seconds():
    planner = planner_of(LARGE, 1024)
    began = time.process_time()
    found = search(planner, Pins({}))
    assert found.considered > 10_000
    assert time.process_time() - began < 10


def test_memory_decides_and_its_absence_is_explained(capsys):
    assert main([*LARGE, "--devices", "4"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: no layout of")
    assert said.count("\n") == 1
    assert "devices do, with mesh." in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--hardware", "abacus"], "no such machine"),
        (["--devices", "0"], "must be 1 or more"),
        (["--program", "abacus"], "is unknown; use one of isomesh"),
        (["pipeline.schedule=mine.csv"], "and no table of a file"),
        (["mesh.tensor=3"], "3 devices does not divide --devices 8; use a multiple of 3"),
        (["--devices", "999999999"], "is more than a search weighs"),
        (["--tokens", "nan"], "--tokens nan must be a number above 0"),
        (["--json", "/"], "--json / is a folder; name a file in it, as in --json /plan.json"),
        (["--picture", "plan.doc"], "must end with .png or .svg or .pdf"),
        (["train.remta=full"], "did you mean train.remat"),
        (["mesh.data=8", "train.batch_size=12"], "train.batch_size=12 does not divide by mesh.data=8; nearest legal"),
    ],
)
def test_mistakes_are_one_line(capsys, words, said):
    assert main([*SMALL, *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_plan_is_told_as_text_json_and_picture(capsys, tmp_path):
    out, picture = tmp_path / "plan.json", tmp_path / "plan.svg"
    words = ["--devices", "16", "--top", "3", "--json", str(out), "--picture", str(picture)]
    assert main([*SMALL, *words, "--hardware", "v5e"]) == 0
    said, plan = capsys.readouterr().out, json.loads(out.read_text())
    best = plan["best"][0]
    assert f"paste     python train.py {' '.join(best['overrides'])}" in said
    for word in ("second", "binds", "roofline", "memory", "exchanges", "cost"):
        assert f"\n{word} " in said
    assert best["step_s"] == pytest.approx(sum(best["seconds"].values()))
    assert [w["step_s"] for w in plan["fitting"]] == sorted(w["step_s"] for w in plan["fitting"])
    assert picture.read_text().startswith("<?xml")


def test_a_plan_needs_no_jax():
    code = "import sys; from planner.__main__ import main; main(sys.argv[1:]); sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code, *SMALL], cwd=ROOT, check=True, capture_output=True)
