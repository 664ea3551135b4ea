"""What a step exchanges, in the compiled program for 8 devices, is what the textbook says; and nothing is replicated.

Volumes as in How to Scale Your Model (Austin et al., 2025): bytes that one device receives by ring algorithms. With n
devices along an axis a gather or scatter of X bytes receives (n-1)/n X, an all-reduce twice that.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import pytest

from config import compose
from parallel.mesh import AXES, make_mesh
from parallel.sharding import batch_sharding
from performance.collectives import collectives, summary
from performance.hlo import arrays, parse
from training.job import make_job

B, T, D, F, N, H, V, LAYERS = 16, 64, 128, 384, 8, 16, 2048, 4
MODEL = [
    *(f"model.layers={LAYERS}", f"model.width={D}", f"model.heads={N}", f"model.kv_heads={N}", f"model.head_dim={H}"),
    *(f"model.ffn={F}", f"model.vocab_size={V}", "model.tied_embeddings=false", "model.scan_layers=true"),
    *(f"train.batch_size={B}", f"train.seq_len={T}", "optimizer=adamw"),
]
FLOAT = 4  # bytes
MATRICES = FLOAT * LAYERS * (4 * D * N * H + 3 * D * F)  # of all layers
TABLE = FLOAT * V * D  # there are two
PARAMETERS = MATRICES + 2 * TABLE
ACTIVATION = FLOAT * B * T * D  # the residual stream of the whole batch


@dataclass(frozen=True)
class Program:
    text: str
    volume: dict  # (kind, axes) -> (times, bytes)


@functools.cache
def program(remat: str = "none", loss_chunk: int = 0, dtype: str = "float32", **mesh: int) -> Program:
    """The compiled training step.

    The CPU compiler has no reduce-scatter and reduces before it sums; its all-reduces are read as what the compilers
    for GPU and TPU make of them (`make test-aot` reads their own programs).
    """
    sizes = dict.fromkeys(AXES, 1) | mesh
    settings = [f"train.remat={remat}", f"train.loss_chunk={loss_chunk}", f"train.compute_dtype={dtype}"]
    cfg, mesh = compose.load([*MODEL, *settings]), make_mesh(sizes)
    with jax.set_mesh(mesh):
        job = make_job(cfg, mesh)
        dtypes = {"tokens_BT": jnp.int32, "targets_BT": jnp.int32, "mask_BT": jnp.float32}
        layout = batch_sharding(mesh)
        batch = {name: jax.ShapeDtypeStruct((B, T), dtype, sharding=layout) for name, dtype in dtypes.items()}
        text = job.step.lower(job.abstract, batch).compile().as_text()
    return Program(text, summary(collectives(text, mesh, as_accelerator=True)))


def received(program: Program, kind: str, *axes: str) -> float:
    return program.volume.get((kind, axes), (0, 0.0))[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_data_reduces_each_gradient_once(dtype):
    """2 x parameters: one all-reduce of the gradients, which are float32, and nothing else."""
    step = program(data=8, dtype=dtype)
    assert received(step, "all-reduce", "data") == pytest.approx(2 * 7 / 8 * PARAMETERS, rel=0.01)
    assert step.volume.keys() == {("all-reduce", ("data",))}


def test_fsdp_gathers_twice_and_scatters_once():
    """3 x parameters: a layer's matrices are gathered forward and again backward, the two tables once."""
    step = program(fsdp=8)
    gathered, scattered = received(step, "all-gather", "fsdp"), received(step, "reduce-scatter", "fsdp")
    assert 7 / 8 * (2 * MATRICES + 2 * TABLE) * 0.99 < gathered < 7 / 8 * 2 * PARAMETERS * 1.01
    assert scattered == pytest.approx(7 / 8 * PARAMETERS, rel=0.01)
    assert received(step, "all-reduce", "fsdp") < 0.01 * scattered  # scalars and norms


def test_data_around_fsdp_reduces_shards_only():
    """With data=2 around fsdp=4 a gradient is scattered over fsdp first; data reduces the quarter that is left.

    But for the embedding: the compiler reduces the sums of a scatter whole, over both axes at once.
    """
    step = program(data=2, fsdp=4)
    assert received(step, "reduce-scatter", "fsdp") == pytest.approx(3 / 4 * (PARAMETERS - TABLE), rel=0.01)
    assert received(step, "all-reduce", "data") == pytest.approx(2 * 1 / 2 * (PARAMETERS - TABLE) / 4, rel=0.01)
    assert received(step, "all-reduce", "data", "fsdp") == pytest.approx(2 * 7 / 8 * TABLE, rel=0.01)


def test_tensor_gathers_and_scatters_four_times_a_layer():
    """Attention and feed-forward each gather the tokens and scatter their sums, forward and backward.

    Besides the layers: the embedding scatters what each vocabulary shard found, and gathers its gradient; the head
    gathers the tokens, and scatters their gradient.
    """
    step = program(tensor=8)
    exchanges = 7 / 8 * ACTIVATION * (4 * LAYERS + 2)
    assert received(step, "all-gather", "tensor") == pytest.approx(exchanges, rel=0.01)
    assert received(step, "reduce-scatter", "tensor") == pytest.approx(exchanges, rel=0.01)
    assert received(step, "all-reduce", "tensor") < 0.02 * exchanges  # of the softmax over the vocabulary, and norms


def test_remat_gathers_activations_once_more():
    """Recomputation runs a layer's forward exchanges again, but for the sum that ends it, which nothing needs."""
    step = program("full", tensor=8)
    gathered, scattered = (7 / 8 * ACTIVATION * (n * LAYERS + 2) for n in (6, 5))
    assert received(step, "all-gather", "tensor") == pytest.approx(gathered, rel=0.01)
    assert received(step, "reduce-scatter", "tensor") == pytest.approx(scattered, rel=0.01)


@pytest.mark.parametrize("mesh", [{"fsdp": 8}, {"data": 2, "fsdp": 4}], ids=str)
def test_parts_of_the_logits_gather_the_table_once_more(mesh):
    """And reduce nothing more: the gradient of each part of the table is summed over devices once."""
    whole, cut = (program(loss_chunk=chunk, **mesh) for chunk in (0, T // 4))
    more = {key: cut.volume[key][1] - whole.volume.get(key, (0, 0.0))[1] for key in cut.volume}
    assert more.pop(("all-gather", ("fsdp",))) == pytest.approx((1 - 1 / mesh["fsdp"]) * TABLE, rel=0.01)
    assert max(more.values()) < 0.01 * TABLE, more


def test_fsdp_and_tensor_do_not_add_to_each_other():
    """Each axis exchanges its share of what the other leaves: parameters / 4, activations / 2."""
    step = program(fsdp=2, tensor=4)
    exchanges = 3 / 4 * ACTIVATION / 2 * (4 * LAYERS + 2)
    assert received(step, "all-gather", "tensor") == pytest.approx(exchanges, rel=0.02)
    assert received(step, "reduce-scatter", "tensor") == pytest.approx(exchanges, rel=0.02)
    moved = received(step, "all-gather", "fsdp") + received(step, "reduce-scatter", "fsdp")
    assert 1 / 2 * (3 * PARAMETERS - 2 * TABLE) / 4 * 0.98 < moved < 1 / 2 * 3 * PARAMETERS / 4 * 1.05


@pytest.mark.parametrize(
    "mesh", [{"fsdp": 8}, {"data": 2, "fsdp": 4}, {"fsdp": 2, "tensor": 4}, {"tensor": 8}], ids=str
)
def test_nothing_is_replicated_by_accident(mesh):
    """The largest array of a device is the largest that it should hold: what the scan keeps for the backward pass."""
    batch, tensor = B // (mesh.get("data", 1) * mesh.get("fsdp", 1)), mesh.get("tensor", 1)
    kept = {
        "ffn": LAYERS * batch * T * F // tensor,
        "scores": LAYERS * batch * N // tensor * T * T,
        "tokens": LAYERS * batch * T * D,
        "logits": batch * T * V // tensor,
        "table": V * D // tensor,
        "matrices": LAYERS * D * F // (mesh.get("fsdp", 1) * tensor),
    }
    largest = max(array_sizes(program(**mesh).text))
    assert largest[0] <= FLOAT * max(kept.values()), (largest, kept)


def array_sizes(text: str) -> list[tuple[float, str]]:
    """The bytes of every array that has a buffer of its own, with where it comes from."""
    computations, _ = parse(text)
    fused = {
        name
        for computation in computations.values()
        for instruction in computation.values()
        if instruction.opcode == "fusion"
        for name in instruction.called("calls")
    }
    return [
        (array.bytes, f"{instruction.shape} {instruction.name} {instruction.scope}")
        for name, computation in computations.items()
        if name not in fused
        for instruction in computation.values()
        for array in arrays(instruction.shape)
    ]
