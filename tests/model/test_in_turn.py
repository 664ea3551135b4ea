"""Unrolled layers: remat saves memory as in a scan, and nothing is computed for what is not trained."""

import jax
import jax.numpy as jnp
import pytest

FIELDS = {"layers": 8, "width": 64, "ffn": 256}


def compiled(build, remat: str, scan_layers: bool, trained=lambda path: True):
    """Gradients of the parameters whose path is `trained`, compiled; nothing runs."""
    model = build(scan_layers=scan_layers, **FIELDS)
    tokens_BT = jax.ShapeDtypeStruct((4, 256), jnp.int32)
    paths, structure = jax.tree.flatten_with_path(model.params)
    mine = {i: leaf for i, (path, leaf) in enumerate(paths) if trained(jax.tree_util.keystr(path))}
    assert mine

    def loss(mine, tokens_BT):
        params = structure.unflatten([mine.get(i, leaf) for i, (_, leaf) in enumerate(paths)])
        return jnp.tanh(model.logits(params, tokens_BT, remat=remat)).mean()

    return jax.jit(jax.grad(loss)).lower(mine, tokens_BT).compile()


@pytest.mark.parametrize("remat", ["full", "attention"])
def test_remat_of_unrolled_layers_keeps_two_where_a_scan_keeps_one(remat, build):
    needed = lambda remat, scan: compiled(build, remat, scan).memory_analysis().temp_size_in_bytes
    unrolled = needed(remat, False)
    assert unrolled < 2 * needed(remat, True)
    assert unrolled < 0.4 * needed("none", False)


def test_frozen_parameters_cost_no_gradient(build):
    flops = lambda *args: compiled(build, "none", False, *args).cost_analysis()["flops"]
    of_all, of_norms = flops(), flops(lambda path: "norm" in path)
    assert of_norms < 0.75 * of_all
