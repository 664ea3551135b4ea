"""Dispatch against a loop over tokens, its two implementations and all meshes against each other, and what it moves."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from parallel.experts import BLOCKS, block_size, dispatch
from parallel.mesh import AXES, make_mesh
from performance.collectives import collectives

B, T, D, F, E, J = 8, 12, 8, 16, 8, 3
DIMS = (("experts", "width", "ffn"), ("experts", "ffn", "width"))
BATCH = ("data", "fsdp", "expert")
MESHES = {
    "expert 2": {"expert": 2},
    "expert 4": {"expert": 4},
    "expert 8": {"expert": 8},
    "tensor 4": {"tensor": 4},
    "context 4": {"context": 4},
    "expert x tensor": {"expert": 4, "tensor": 2},
    "expert x data x fsdp": {"expert": 2, "data": 2, "fsdp": 2},
    "expert x context x tensor": {"expert": 2, "context": 2, "tensor": 2},
}


def expert(matmul, rows, up, down):
    return matmul(jnp.tanh(matmul(rows, up)), down)


def draw(skew: float, seed: int = 0):
    """Tokens, choices of distinct experts (a tenth of them dropped), weights and matrices. A large `skew` sends every
    token to the same experts."""
    random = np.random.default_rng(seed)
    normal = lambda *shape: random.standard_normal(shape, np.float32)
    experts = np.argsort(normal(B, T, E) - skew * np.arange(E), axis=-1)[..., :J].astype(np.int32)
    experts = np.where(random.random(experts.shape) < 0.1, E, experts)
    return normal(B, T, D), experts, normal(B, T, J), normal(E, D, F), normal(E, F, D)


def loop(x, experts, weights, up, down) -> np.ndarray:
    """Token by token, expert by expert."""
    y = np.zeros_like(x)
    for index in np.ndindex(experts.shape):
        if (e := experts[index]) < E:
            y[index[:2]] += weights[index] * (np.tanh(x[index[:2]] @ up[e]) @ down[e])
    return y


def value_and_gradients(implementation=None, capacity=None):
    """(x, experts, weights, up, down) -> y and the gradients of a function of it, jitted."""

    def objective(x, weights, up, down, experts):
        y = dispatch(x, experts, weights, (up, down), DIMS, expert, implementation=implementation, capacity=capacity)
        return jnp.sum(jnp.sin(y)), y

    run = jax.jit(jax.value_and_grad(objective, argnums=(0, 1, 2, 3), has_aux=True))

    def compute(x, experts, weights, up, down):
        (_, y), grads = run(x, weights, up, down, experts)
        return jax.tree.map(np.asarray, (y, *grads))

    return compute


@functools.cache
def expected(skew: float):
    with jax.set_mesh(make_mesh(dict.fromkeys(AXES, 1), jax.devices()[:1])):
        return value_and_gradients()(*draw(skew))


def mesh_of(axes: dict):
    return make_mesh(dict.fromkeys(AXES, 1) | axes, jax.devices()[: int(np.prod(list(axes.values())))])


def assert_equal(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert np.linalg.norm(a - b) < 2e-6 * np.linalg.norm(b)


@pytest.mark.parametrize("skew", [0.0, 100.0])
@pytest.mark.parametrize("implementation", ["padded", "ragged"])
def test_equals_a_loop_over_tokens(implementation, skew):
    ours = value_and_gradients(implementation)(*draw(skew))
    np.testing.assert_allclose(ours[0], loop(*draw(skew)), atol=1e-4)
    assert_equal(ours, expected(skew))


def test_gradients_equal_those_of_all_experts_for_all_tokens():
    def objective(x, weights, up, down, experts):
        every = jnp.einsum("BTEF,EFD->BTED", jnp.tanh(jnp.einsum("BTD,EDF->BTEF", x, up)), down)
        share = (jax.nn.one_hot(experts, E) * weights[..., None]).sum(2)
        return jnp.sum(jnp.sin(jnp.einsum("BTED,BTE->BTD", every, share)))

    x, experts, weights, up, down = draw(0.0)
    theirs = jax.grad(objective, argnums=(0, 1, 2, 3))(x, weights, up, down, experts)
    assert_equal(expected(0.0)[1:], theirs)


@pytest.mark.parametrize("skew", [0.0, 100.0])
@pytest.mark.parametrize("mesh", MESHES)
def test_every_mesh_equals_one_device(mesh, skew):
    with jax.set_mesh(mesh_of(MESHES[mesh])):
        assert_equal(value_and_gradients()(*draw(skew)), expected(skew))


@pytest.mark.parametrize(("dtype", "bound"), [(np.float32, 2e-6), (jnp.bfloat16, 5e-3)])
@pytest.mark.parametrize("skew", [0.0, 100.0])
def test_every_platform_computes_the_same(dtype, bound, skew, monkeypatch):
    x, experts, weights, *matrices = draw(skew)
    x, *matrices = (array.astype(dtype) for array in (x, *matrices))
    found = {}
    for name, blocks in BLOCKS.items():
        monkeypatch.setitem(BLOCKS, "cpu", blocks)
        found[name] = value_and_gradients("padded")(x, experts, weights, *matrices)
    for name, ours in found.items():
        for a, b in zip(ours, found["cpu"], strict=True):
            a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
            assert np.linalg.norm(a - b) < bound * np.linalg.norm(b), name
    assert set(BLOCKS) == {"cpu", "gpu"}


@pytest.mark.parametrize("skew", [0.0, 3.0, 100.0])
@pytest.mark.parametrize("axes", [{"data": 1}, {"expert": 4, "context": 2}], ids=str)
def test_every_assignment_is_served_once(axes, skew):
    """Expert e multiplies by 2^e: whole numbers, of which each bit says whether an expert was asked."""
    _, experts, _, *_ = draw(skew)
    powers = np.stack([np.eye(1, dtype=np.float32) * 2**e for e in range(E)])
    ones = np.ones((B, T, 1), np.float32)
    with jax.set_mesh(mesh_of(axes)):
        serve = lambda x, e, w, m: dispatch(x, e, w, (m,), DIMS[:1], lambda matmul, rows, m: matmul(rows, m))
        y = np.asarray(jax.jit(serve)(ones, experts, np.ones(experts.shape, np.float32), powers))
    np.testing.assert_array_equal(y[..., 0], np.where(experts < E, 2.0**experts, 0).sum(-1))


def test_blocks_suffice_and_are_few():
    for assignments, experts in ((1, 1), (7, 8), (4096, 8), (2**20, 256)):
        size = block_size(assignments, experts)
        assert size & (size - 1) == 0
        assert experts * size <= max(assignments, 8 * experts)  # padding at most doubles the rows
    assert block_size(4096, 8) == 128


# ------------------------------------------------------------------------------------------------------ ragged exchange


def exchange_by_definition(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """jax.lax.ragged_all_to_all as its documentation has it, from whole gathers: for CPUs, which lack it."""
    gather = lambda a: jax.lax.all_gather(a, axis_name)
    operands, starts, sizes, targets = map(gather, (operand, input_offsets, send_sizes, output_offsets))
    me = jax.lax.axis_index(axis_name)
    row = jnp.arange(output.shape[0])
    for sender in range(operands.shape[0]):
        first, size = targets[sender, me], sizes[sender, me]
        source = jnp.clip(starts[sender, me] + row - first, 0, operand.shape[0] - 1)
        there = ((row >= first) & (row < first + size)).reshape(-1, *[1] * (output.ndim - 1))
        output = jnp.where(there, operands[sender][source], output)
    return output


@pytest.mark.parametrize("skew", [0.0, 100.0])
@pytest.mark.parametrize("mesh", ["expert 4", "expert x tensor", "expert x data x fsdp"])
def test_ragged_exchange_equals_one_device(mesh, skew, monkeypatch):
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", exchange_by_definition)
    with jax.set_mesh(mesh_of(MESHES[mesh])):
        assert_equal(value_and_gradients("ragged")(*draw(skew)), expected(skew))


def test_accelerators_get_ragged_operations():
    """Lowered for a TPU, forward and backward: no padded exchange, but for that of offsets."""
    mesh = jax.sharding.AbstractMesh((1, 1, 1, 4, 1, 2), AXES, axis_types=(jax.sharding.AxisType.Auto,) * 6)
    with jax.sharding.use_abstract_mesh(mesh):

        def objective(x, experts, weights, up, down):
            return dispatch(x, experts, weights, (up, down), DIMS, expert, implementation="ragged").sum()

        arguments = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, P())) for a in draw(0.0)]
        traced = jax.jit(jax.grad(objective, argnums=(0, 2, 3, 4))).trace(*arguments)
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    # vectors there and back and both again, and the experts' numbers
    assert len(re.findall(r"@ragged_all_to_all", text)) == 5
    assert len(re.findall(r"ragged_dot", text)) >= 6
    padded = re.findall(r'"stablehlo.all_to_all".*: \((\S+)\) ->', text)
    assert set(padded) == {"tensor<4xi32>"}


# ----------------------------------------------------------------------------------------- in pipelines, and the volume


@pytest.mark.parametrize("axes", [{"expert": 4}, {"expert": 2, "tensor": 2}, {"data": 2, "expert": 2}], ids=str)
def test_stages_in_different_branches(axes):
    """As in a pipeline: code manual over pipe and data, where at one time only one stage dispatches."""
    mesh = mesh_of({"pipe": 2} | axes)
    x, experts, weights, up, down = draw(0.0)

    def stage(x, experts, weights, up, down):
        def tick(total, turn):
            here = lambda x: dispatch(x * (turn + 1), experts, weights, (up, down), DIMS, expert)
            mine = jax.lax.axis_index("pipe") == turn
            return total + jax.lax.switch(mine.astype(int), [jnp.zeros_like, here], x), None

        varied = [jax.lax.pcast(a, ("pipe",), to="varying") for a in (x, experts, weights)]
        x, experts, weights = varied
        up, down = (jax.lax.pcast(a, ("pipe", "data"), to="varying") for a in (up, down))
        total, _ = jax.lax.scan(tick, jnp.zeros_like(x), jnp.arange(2.0))
        return total[None]

    with jax.set_mesh(mesh):
        specs = (P("data"), P("data"), P("data"), P(), P())
        run = jax.shard_map(stage, in_specs=specs, out_specs=P("pipe", "data"), axis_names={"pipe", "data"})
        both = np.asarray(jax.jit(run)(x, experts, weights, up, down))
    np.testing.assert_allclose(both[0], expected(0.0)[0], atol=1e-5)
    np.testing.assert_allclose(both[1], loop(2 * x, experts, weights, up, down), atol=1e-4)


def test_volume_is_the_textbooks():
    """Two exchanges each way of J * tokens * D, when an expert takes no more than its share."""
    mesh, vector = mesh_of({"expert": 4}), 4 * D
    with jax.set_mesh(mesh):

        def both_ways(x, experts, weights, up, down):
            run = lambda *a: dispatch(a[0], experts, a[1], a[2:], DIMS, expert, capacity=T * J // E)
            y, pull = jax.vjp(run, x, weights, up, down)
            return y, pull(y)

        arrays = [(a, P(BATCH)) for a in draw(0.0)[:3]] + [(a, P("expert")) for a in draw(0.0)[3:]]
        x, experts, weights, up, down = (
            jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec)) for a, spec in arrays
        )
        shardings = (x.sharding, tuple(a.sharding for a in (x, weights, up, down)))
        step = jax.jit(both_ways, out_shardings=shardings).lower(x, experts, weights, up, down)
        found = collectives(step.compile().as_text(), mesh)
    assert {(c.kind, c.axes) for c in found} == {("all-to-all", ("expert",))}
    tokens, rows = B * T // 4, B // 4 * E * (T * J // E)
    vectors = [c for c in found if c.dtype == "f32"]
    assert sum(c.payload for c in vectors) == 4 * rows * vector
    assert rows <= tokens * J
    assert sum(c.bytes for c in found) < 4 * 3 / 4 * J * tokens * vector * 1.05
