"""Predicted memory against compiled steps on simulated devices: most within 15%, and what the allowance covers.

The layouts are others than those that the arithmetic was found with. All of them take about a quarter of an hour on
two cores: `make test-long` asks for every third, `make test-every` for all.
"""

import itertools
import statistics

import jax
import pytest
from every import few_of

from config import compose
from config.layout import mesh_sizes
from parallel.config import schedule_for
from parallel.mesh import make_mesh
from planner.cost import Planner
from planner.layout import layout_of
from planner.machine import open_machine
from planner.software import program
from training.job import abstract_batch, make_job

LLAMA = (
    *(
        "model.layers=12",
        "model.width=384",
        "model.heads=12",
        "model.kv_heads=4",
        "model.head_dim=32",
        "model.ffn=1024",
    ),
    *("model.vocab_size=12000", "model.tied_embeddings=false", "model.scan_layers=true"),
    *("train.seq_len=1024", "train.batch_size=16"),
)
ENCODERLIKE = (
    *("model.layers=4", "model.width=768", "model.heads=8", "model.kv_heads=8", "model.head_dim=96", "model.ffn=3072"),
    *("model.vocab_size=4096", "model.activation=gelu", "model.bias=all", "model.norm=layer", "model.scan_layers=true"),
    *("train.seq_len=512", "train.batch_size=32"),
)
EXPERTS = (
    *("model=moe_nano", "model.layers=6", "model.width=192", "model.heads=4", "model.kv_heads=4", "model.head_dim=48"),
    *("model.ffn=768", "model.vocab_size=8192", "model.scan_layers=true", "train.seq_len=512", "train.batch_size=16"),
)
UNROLLED = tuple(word.replace("scan_layers=true", "scan_layers=false") for word in LLAMA)
DENSE_MESHES = (
    {"fsdp": 8},
    {"data": 4, "fsdp": 2},
    {"fsdp": 4, "tensor": 2},
    {"data": 2, "tensor": 4},
    {"pipe": 2, "fsdp": 4},
    {"pipe": 4, "tensor": 2},
)
CASES = [
    *((LLAMA, mesh, (f"train.remat={remat}",)) for mesh, remat in itertools.product(DENSE_MESHES, ("none", "full"))),
    *((LLAMA, mesh, ("train.remat=dots",)) for mesh in DENSE_MESHES[::2]),
    *(
        (ENCODERLIKE, mesh, (f"train.remat={remat}",))
        for mesh, remat in itertools.product(DENSE_MESHES[::2], ("none", "full"))
    ),
    *(
        (ENCODERLIKE, {"pipe": 4, "fsdp": 2}, (f"pipeline.schedule={name}", "train.remat=full"))
        for name in ("1f1b", "gpipe")
    ),
    *((EXPERTS, mesh, ("train.remat=full",)) for mesh in ({"fsdp": 8}, {"expert": 8}, {"expert": 4, "tensor": 2})),
    (EXPERTS, {"expert": 2, "fsdp": 4}, ("train.remat=none",)),
    (LLAMA, {"fsdp": 4, "context": 2}, ("train.remat=none",)),
    (LLAMA, {"fsdp": 2, "context": 2, "tensor": 2}, ("train.remat=none",)),
    (LLAMA, {"fsdp": 8}, ("train.remat=full", "train.grad_accumulation=2")),
    (LLAMA, {"fsdp": 8}, ("train.remat=attention", "optimizer.moment_dtype=bfloat16")),
    (UNROLLED, {"fsdp": 8}, ("train.remat=full",)),
    (UNROLLED, {"data": 4, "tensor": 2}, ("train.remat=none",)),
    (UNROLLED, {"pipe": 2, "fsdp": 4}, ("train.remat=full", "pipeline.schedule=1f1b")),
]


@pytest.fixture(scope="module", params=few_of(["a third", "all"], ["a third"]))
def errors(request) -> dict[str, tuple[float, float]]:
    """Predicted over needed memory, without and with the allowance, by layout."""
    cases = CASES if request.param == "all" else CASES[1::3]
    named = lambda number, axes, more: f"{number}: {axes} {' '.join(more)}"
    return {named(i, axes, more): compared(model, axes, more) for i, (model, axes, more) in enumerate(cases)}


def compared(model: tuple[str, ...], mesh_axes: dict[str, int], more: tuple[str, ...]) -> tuple[float, float]:
    """Of one layout, which is compiled for it."""
    axes = [f"mesh.{axis}={size}" for axis, size in ({"fsdp": 1} | mesh_axes).items()]
    config = compose.load([*model, "optimizer=adamw", *axes, *more])
    sizes = mesh_sizes(config, 8)
    schedule = schedule_for(config.pipeline, config.train.batch_size // config.train.grad_accumulation, sizes)
    planner = Planner(config, open_machine("cpu", calibrated=False), 8, program("isomesh", "cpu"))
    memory = planner.predict(layout_of(config, sizes, schedule and schedule.microbatches)).memory
    mesh = make_mesh(sizes)
    with jax.set_mesh(mesh):
        job = make_job(config, mesh)
        batch = abstract_batch(config.train, mesh, segments=config.data.segments)
        compiled = job.step.lower(job.abstract, batch).compile().memory_analysis()
    needed = compiled.argument_size_in_bytes + compiled.temp_size_in_bytes
    return (memory.total - memory.fragmentation) / needed, memory.total / needed


def test_memory_is_what_the_compiler_says(errors):
    """How compilers place arrays is not known before: a few are further off (docs/planner.md)."""
    off = {name: abs(ratio - 1) for name, (ratio, _) in errors.items()}
    told = {name: f"{error:.1%}" for name, error in off.items() if error > 0.15}
    assert len(CASES) >= 30
    assert len(off) >= len(CASES) // 3
    assert statistics.median(off.values()) < 0.08
    assert len(told) <= len(off) / 6, told
    assert max(off.values()) < 0.35, told


def test_the_allowance_covers_what_the_compiler_adds(errors):
    assert not {name: f"{ratio:.3f}" for name, (_, ratio) in errors.items() if ratio < 1}
