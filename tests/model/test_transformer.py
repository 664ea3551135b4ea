"""The stack: ways to run it that must not change what it computes, precision, dropout, the head."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from model.layers import dropout
from model.transformer import REMAT_POLICIES
from training.config import TrainConfig
from training.step import hidden, loss_sums

BASE = {"window": 4, "window_pattern": "LG", "norm_position": "both", "tied_embeddings": False}
WAYS = [("none", False), *((policy, True) for policy in REMAT_POLICIES), ("full", False)]


def value_and_gradients(build, tokens_BT, remat: str, scan_layers: bool):
    model = build(scan_layers=scan_layers, **BASE)
    weights_V = jnp.sin(jnp.arange(40.0))
    objective = lambda params: jnp.tanh(model.logits(params, tokens_BT, remat=remat) @ weights_V).mean()
    return jax.jit(jax.value_and_grad(objective))(model.params)


@pytest.fixture(scope="module")
def plain(build, tokens_BT):
    return value_and_gradients(build, tokens_BT, "none", True)


@pytest.mark.parametrize(("remat", "scan_layers"), WAYS)
def test_remat_and_unrolling_change_nothing(remat, scan_layers, plain, build, tokens_BT):
    assert max(np.abs(g).max() for g in jax.tree.leaves(plain[1])) > 1e-2
    other = value_and_gradients(build, tokens_BT, remat, scan_layers)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), other, plain)


def test_layers_weights_do_not_depend_on_how_many_there_are(build):
    # of the matrices that the depth does not scale; jit leaves the others out
    draw = lambda layers: jax.jit(
        lambda key: build(layers=layers).description.init(key)["layers"]["ffn"]["up"]["weight"]
    )
    small, large = (draw(layers)(jax.random.key(5)) for layers in (2, 3))
    np.testing.assert_array_equal(small, large[:2])
    assert np.abs(large[0] - large[1]).max() > 0.1


# ----------------------------------------------------------------------------------------------------------- precision


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from _equations(inner)


def bfloat16_losses(model, tokens_BT):
    config = TrainConfig(compute_dtype="bfloat16", loss_chunk=4)
    batch = {"tokens_BT": tokens_BT, "targets_BT": tokens_BT, "mask_BT": jnp.ones(tokens_BT.shape)}
    return lambda params: loss_sums(config, batch, *hidden(model.description, config, params, batch))


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_bfloat16_is_of_matmuls_only(norm, build, tokens_BT):
    """Matrices are multiplied in bfloat16; what softmax, norms and loss are made of is float32."""
    model = build(norm=norm, attention_softcap=2.0, logit_softcap=3.0, qk_norm=True)
    found = {}
    for equation in _equations(jax.make_jaxpr(bfloat16_losses(model, tokens_BT))(model.params).jaxpr):
        dtypes = {v.aval.dtype for v in equation.invars if jnp.issubdtype(v.aval.dtype, jnp.floating)}
        found.setdefault(equation.primitive.name, set()).update(dtypes)
    for name in ("exp", "log", "rsqrt", "tanh", "reduce_max", "reduce_sum", "cos", "sin"):
        assert found[name] == {jnp.dtype("float32")}, name
    assert found["dot_general"] == {jnp.dtype("bfloat16")}


def test_bfloat16_is_close_to_float32(build, tokens_BT):
    model = build(qk_norm=True)
    run = jax.jit(lambda params, dtype: model.logits(params, tokens_BT, dtype=dtype), static_argnums=1)
    exact, rounded = (run(model.params, dtype) for dtype in (jnp.float32, jnp.bfloat16))
    assert rounded.dtype == jnp.float32
    error = jnp.linalg.norm(rounded - exact) / jnp.linalg.norm(exact)
    assert 1e-4 < error < 0.02  # a bfloat16 has 8 bits


# ------------------------------------------------------------------------------------------------------------- dropout


def test_dropout_keeps_the_mean_and_scales_what_is_left():
    keys = jax.random.split(jax.random.key(0), 4)
    positions_1T = jnp.arange(64)[None]
    y = dropout(jnp.ones((4, 64, 128)), 0.2, keys, 3, positions_1T)
    values, counts = np.unique(y, return_counts=True)
    np.testing.assert_allclose(values, [0, 1 / 0.8], rtol=1e-6)
    assert abs(counts[0] / y.size - 0.2) < 0.01  # 4.5 standard deviations are 0.01
    assert len({np.asarray(token).tobytes() for row in y for token in row}) == 4 * 64
    assert np.abs(y - dropout(jnp.ones(y.shape), 0.2, keys, 4, positions_1T)).max() > 1


def test_dropout_mask_does_not_depend_on_the_batch_nor_on_the_order_of_the_tokens():
    x, keys, positions_1T = jnp.ones((4, 8, 16)), jax.random.split(jax.random.key(0), 4), jnp.arange(8)[None]
    y = dropout(x, 0.5, keys, 7, positions_1T)
    np.testing.assert_array_equal(y[2:3], dropout(x[2:3], 0.5, keys[2:3], 7, positions_1T))
    np.testing.assert_array_equal(y[:, ::-1], dropout(x, 0.5, keys, 7, positions_1T[:, ::-1]))


def test_dropout_of_the_model_needs_keys_and_follows_them_row_by_row(build, tokens_BT):
    on, off = build(dropout=0.3), build()
    keys = jax.random.split(jax.random.key(1), 2)
    run = jax.jit(lambda tokens_BT, keys_B: on.logits(on.params, tokens_BT, dropout_keys_B=keys_B))
    both = run(tokens_BT, keys)
    np.testing.assert_allclose(run(tokens_BT[1:], keys[1:]), both[1:], atol=1e-5)
    without = run(tokens_BT, None)
    np.testing.assert_array_equal(without, jax.jit(off.logits)(off.params, tokens_BT))
    assert np.abs(both - without).max() > 0.1


# ---------------------------------------------------------------------------------------------------------------- head


def test_logit_softcap_bounds_logits_and_spares_small_ones(build, tokens_BT):
    capped, free = (build(logit_softcap=c, vocab_size=39) for c in (1.5, 0.0))
    logits, raw = (jax.jit(model.logits)(model.params, tokens_BT) for model in (capped, free))
    assert np.abs(raw).max() > 3
    assert np.abs(logits).max() < 1.5
    np.testing.assert_allclose(logits, 1.5 * np.tanh(raw / 1.5), atol=1e-5)


def test_padding_rows_of_the_vocabulary_are_never_predicted(build, tokens_BT):
    model = build(vocab_size=39, vocab_multiple=16, logit_softcap=1.5)

    @jax.jit
    def probabilities(params):
        bound = model.description.bind(params)
        return jax.nn.softmax(bound.logits(bound(tokens_BT)[0]))

    assert probabilities(model.params).shape[-1] == 48
    np.testing.assert_array_equal(probabilities(model.params)[..., 39:], 0)
