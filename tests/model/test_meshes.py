"""Sizes that a mesh does not divide: fewer kv heads than tensor shards, a vocabulary that needs padding rows."""

import jax
import numpy as np
import pytest

from model import plain_attention
from model.transformer import describe
from parallel.mesh import AXES, make_mesh
from parallel.sharding import put_batch
from training.config import TrainConfig
from training.step import gradients

VOCABULARY, B, T = 257, 4, 12
SIZES = {"width": 24, "vocab_size": VOCABULARY, "vocab_multiple": 1}
CASES = {
    "multi-query": ({"heads": 4, "kv_heads": 1, "qk_norm": True}, {"fsdp": 2, "tensor": 4}),
    "three shards": ({"heads": 6, "kv_heads": 3, "bias": "qkv", "tied_embeddings": False}, {"data": 2, "tensor": 3}),
}


def on_mesh(model, **axes: int):
    """The initial token table, the mean loss and the gradients of the model's parameters on a mesh, all as numpy."""
    mesh = make_mesh({axis: axes.get(axis, 1) for axis in AXES}, jax.devices()[: int(np.prod(list(axes.values())))])
    tokens, targets = np.random.default_rng(0).integers(VOCABULARY, size=(2, B, T), dtype=np.int32)
    tokens[0, :2] = VOCABULARY - 1  # the last row before the padding takes part
    batch = {"tokens_BT": tokens, "targets_BT": targets, "mask_BT": np.ones((B, T), np.float32)}
    with jax.set_mesh(mesh):
        description = describe(model.description.config)
        shardings = description.shardings(mesh)
        pad = lambda p, shape: np.pad(p, [(0, shape[0] - len(p))] + [(0, 0)] * (p.ndim - 1))
        params = jax.tree.map(lambda p, leaf: pad(np.asarray(p), leaf.shape), model.params, description.shapes)
        train = TrainConfig(loss_chunk=4, batch_size=B, seq_len=T)
        step = jax.jit(lambda params, batch: gradients(description, train, params, batch))
        sums, grads = step(jax.device_put(params, shardings), put_batch(mesh, batch, B))
        draw = lambda key: description.init(key)["tokens"]["weight"]
        table = jax.jit(draw, out_shardings=shardings["tokens"]["weight"])(jax.random.key(0))
    return jax.tree.map(np.asarray, (table, sums.nll / (B * T), grads))


def assert_equal_and_padded_with_zeros(padded: np.ndarray, expected: np.ndarray, tolerance: float):
    np.testing.assert_allclose(padded[: len(expected)], expected, rtol=0, atol=tolerance * np.abs(expected).max())
    np.testing.assert_array_equal(padded[len(expected) :], 0)


@pytest.mark.parametrize("case", CASES)
def test_undivided_sizes_equal_one_device(case, build, monkeypatch):
    """Bitwise equal initial rows, loss and gradients within 1e-5, zero rows and zero gradients of padding."""
    monkeypatch.setattr(plain_attention, "SMALLEST_PART", 3)  # attention in four parts
    fields, axes = CASES[case]
    model = build(**SIZES, **fields)
    table, loss, grads = on_mesh(model, data=1)
    padded_table, mesh_loss, mesh_grads = on_mesh(model, **axes)
    assert len(padded_table) > len(table) == VOCABULARY
    assert_equal_and_padded_with_zeros(padded_table, table, 0.0)
    np.testing.assert_allclose(mesh_loss, loss, rtol=1e-5)
    jax.tree.map(lambda a, b: assert_equal_and_padded_with_zeros(a, b, 1e-5), mesh_grads, grads)
