"""The pipeline's compiled program: what it holds, what it sends, and that stages never wait for each other inside."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest

from config import compose
from parallel.mesh import AXES, make_mesh
from parallel.pipeline import run as pipeline
from parallel.pipeline.buffers import allocate
from parallel.pipeline.schedules import DEFAULT_CHUNKS, make
from parallel.sharding import batch_sharding
from performance.collectives import check_pipeline, collectives
from training.job import make_job

STAGES, T, D = 4, 32, 64
MODEL = [
    *("model.layers=8", f"model.width={D}", "model.heads=4", "model.kv_heads=2", "model.head_dim=16", "model.ffn=128"),
    *("model.vocab_multiple=4", "model.scan_layers=true", f"train.seq_len={T}", "optimizer=adamw"),
]


def traced(schedule: str, microbatches: int, rows: int = 1, *more: str, **mesh: int):
    """The step on 4 stages, with `rows` sequences in each microbatch, and its mesh and schedule."""
    sizes = dict.fromkeys(AXES, 1) | {"pipe": STAGES} | mesh
    batch_size = rows * microbatches
    how = [f"pipeline.schedule={schedule}", f"pipeline.microbatches={microbatches}", f"train.batch_size={batch_size}"]
    cfg = compose.load([*MODEL, *how, *more])
    mesh = make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])
    with jax.set_mesh(mesh):
        job = make_job(cfg, mesh)
        dtypes = {"tokens_BT": jnp.int32, "targets_BT": jnp.int32, "mask_BT": jnp.float32}
        layout = batch_sharding(mesh)
        batch = {n: jax.ShapeDtypeStruct((batch_size, T), d, sharding=layout) for n, d in dtypes.items()}
        return job.step.trace(job.abstract, batch), mesh, job.schedule


@functools.cache
def compiled(schedule: str, microbatches: int, rows: int = 1, **mesh: int):
    """As `traced`, compiled."""
    step, mesh, table = traced(schedule, microbatches, rows, **mesh)
    return step.lower().compile(), mesh, table


@pytest.mark.long
@pytest.mark.parametrize("schedule", ["1f1b", "zero_bubble"])
def test_memory_does_not_grow_with_microbatches(schedule):
    few, many = (compiled(schedule, m)[0].memory_analysis().temp_size_in_bytes for m in (8, 32))
    assert many <= 1.02 * few


def test_memory_of_gpipe_grows():
    """Its table keeps every microbatch in flight, which is why nobody wants it."""
    few, many = (compiled("gpipe", m)[0].memory_analysis().temp_size_in_bytes for m in (8, 16))
    assert many > 1.5 * few


@pytest.mark.parametrize("schedule", ["1f1b", "zero_bubble"])
def test_stages_send_one_activation_a_microbatch_and_boundary_each_way(schedule):
    """Each pattern of sends is in a branch; the table tells how often it runs, and who sends in it."""
    microbatches = 8
    step, mesh, table = compiled(schedule, microbatches)
    sends = [c for c in collectives(step.as_text(), mesh) if c.kind == "collective-permute"]
    assert {c.axes for c in sends} == {("pipe",)}
    assert {c.payload for c in sends} == {4 * T * D}  # one microbatch's activation, float32
    buffers = allocate(table)
    pairs = sum(len(pairs) for p in buffers.ticks.pattern for pairs in buffers.patterns[p])
    assert pairs == 2 * microbatches * (STAGES - 1)
    rounds = sum(len(pattern) for pattern in buffers.patterns)
    assert len(sends) == rounds  # so no pattern sends more than its pairs


@pytest.mark.parametrize("chunk", [0, 8])
def test_what_stages_sum_of_an_activation_travels_in_the_compute_dtype(chunk):
    """Also where the loss takes the vocabulary in parts, whose gradients it adds up in float32."""
    more = ("train.compute_dtype=bfloat16", f"train.loss_chunk={chunk}", "model.tied_embeddings=false")
    program = str(traced("zero_bubble", 4, 1, *more)[0].jaxpr)
    assert set(re.findall(rf"\w+:(\w+)\[1,{T},{D}\]\S* = psum\w*\[", program)) == {"bf16"}


@pytest.mark.parametrize("mesh", [{"tensor": 2}, {"context": 2}], ids=str)
def test_inside_operations_no_stage_waits_for_another(mesh):
    """There, stages take different ways: a permutation of another axis, or a group across stages, would hang."""
    step, mesh, _ = compiled("zero_bubble", 4, 2, **mesh)
    text = step.as_text()
    assert any(f"{pipeline.AT_MOST_ONCE}.B" in c.scope for c in collectives(text, mesh))
    check_pipeline(text, mesh)


def test_a_permutation_inside_an_operation_is_refused():
    mesh = make_mesh(dict.fromkeys(AXES, 1) | {"pipe": 2, "tensor": 2})

    def stage(x):
        swap = lambda x: jax.lax.ppermute(x, "tensor", [(0, 1), (1, 0)])
        return pipeline._when(jax.lax.axis_index("pipe") == 1, swap, x, "F")

    with jax.set_mesh(mesh):
        spec = jax.sharding.PartitionSpec(("pipe", "tensor"))
        mapped = jax.shard_map(stage, in_specs=spec, out_specs=spec, axis_names={"pipe", "tensor"})
        text = jax.jit(mapped).lower(jnp.zeros(8)).compile().as_text()
    with pytest.raises(ValueError, match="collective-permute over tensor into an operation of a stage"):
        check_pipeline(text, mesh)


def test_slots_hold_every_layer_once():
    for schedule, chunks in DEFAULT_CHUNKS.items():
        for stages in (1, 2, 3, 4):
            for layers in range(stages * chunks, 14):
                rows = pipeline.slots(layers, make(schedule, stages, 4))
                assert sorted(layer for layer in rows if layer >= 0) == list(range(layers))
                assert len(rows) % (stages * chunks) == 0
                held = [
                    sum(r >= 0 for r in rows[i::1][: len(rows) // stages])
                    for i in range(0, len(rows), len(rows) // stages)
                ]
                assert max(held) - min(held) <= chunks  # no stage has a whole virtual stage more than another


def test_fewer_layers_than_stages_are_refused():
    with pytest.raises(ValueError, match=r"model.layers=3 is less than 2 stages \* 2 chunks = 4"):
        pipeline.slots(3, make("interleaved", 2, 4))
