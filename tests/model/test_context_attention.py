"""Attention and the model over a split sequence equal one device: masks, heads, precision, pipelines, caches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from every import few_of
from jax.sharding import PartitionSpec as P

from model import attention as module
from model.attention import attention
from model.attention_rule import TokenInfo
from model.kv_cache import make_cache
from model.layers import dropout
from parallel.context import zigzag
from parallel.mesh import AXES, make_mesh
from parallel.sharding import shard
from performance.collectives import collectives
from training.config import TrainConfig
from training.step import gradients, in_context_order

B, T, N, K, H = 4, 32, 4, 2, 8
STYLES = ("ring", "ulysses", "gather")
SEGMENTS_BT = np.cumsum(np.random.default_rng(1).random((B, T)) < 4 / T, axis=1, dtype=np.int32)
OPTIONS = {
    "causal": {"causal": True, "window": None},
    "full": {"causal": False, "window": None},
    "window and soft-cap": {"causal": True, "window": jnp.int32(5), "softcap": 1.5},
    "full, window": {"causal": False, "window": jnp.int32(5)},
    "window off": {"causal": True, "window": jnp.int32(0)},
}
STAGED = [{"context": 4}, {"context": 2, "data": 2}, {"context": 2, "tensor": 2}]
MESHES = [{"context": 4}, {"context": 2, "tensor": 2, "data": 2}, {"context": 2, "tensor": 4}]


def spelled(axes: dict[str, int]) -> str:
    return " ".join(f"{axis}={size}" for axis, size in axes.items())


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(module, "QUERY_CHUNK", 4)


def on_mesh(**axes: int):
    return jax.set_mesh(make_mesh(dict.fromkeys(AXES, 1) | axes, jax.devices()[: int(np.prod(list(axes.values())))]))


def order_of(style: str | None, size: int, causal: bool = True) -> np.ndarray:
    return zigzag(T, size) if style == "ring" and causal else np.arange(T)


def arrays(heads=(N, K, K), dtype=jnp.float32) -> list[jax.Array]:
    generator = np.random.default_rng(0)
    return [jnp.asarray(generator.standard_normal((B, T, h, H)), dtype) for h in heads]


def value_and_gradients(axes, style, segments_BT=None, dtype=jnp.float32, **options):
    """Result and gradients of `attention` on a mesh, in the order of the sequence."""
    order_T = order_of(style, axes.get("context", 1), options["causal"])
    back_T = np.argsort(order_T)

    @jax.jit
    def run(arrays, info, window):
        names = ("heads", "kv_heads", "kv_heads")
        arrays = [shard(x, "batch", "tokens", name, "head_dim") for x, name in zip(arrays, names, strict=True)]
        attend = lambda *x: attention(*x, info, info, **options | {"window": window}, scale=0.35)
        out, pull = jax.vjp(attend, *arrays)
        return out, *pull(jnp.cos(out))

    with on_mesh(**axes):
        segments_BT = None if segments_BT is None else jnp.asarray(segments_BT[:, order_T])
        info = TokenInfo(jnp.asarray(order_T, jnp.int32)[None], segments_BT, context_style=style)
        out = run([x[:, order_T] for x in arrays(dtype=dtype)], info, options["window"])
        return [np.asarray(x, np.float32)[:, back_T] for x in out]


def assert_close(ours, expected, tolerance):
    for a, b in zip(ours, expected, strict=True):
        assert np.linalg.norm(a - b) < tolerance * np.linalg.norm(b)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("axes", few_of(MESHES, MESHES[1:2]), ids=spelled)
@pytest.mark.parametrize("case", few_of(OPTIONS, ["causal", "full, window", "window and soft-cap"]))
def test_equals_one_device(case, axes, style):
    """Two key-value heads on four tensor shards as well; ulysses has two query heads for two shards, or one."""
    if style == "ulysses" and axes.get("tensor") == 4:
        with pytest.raises(ValueError, match="1 heads of a tensor shard do not divide by mesh.context=2"):
            value_and_gradients(axes, style, **OPTIONS[case])
        return
    segments_BT = None if case == "full" else SEGMENTS_BT
    ours = value_and_gradients(axes, style, segments_BT, **OPTIONS[case])
    assert_close(ours, value_and_gradients({"data": 1}, None, segments_BT, **OPTIONS[case]), 1e-6)


@pytest.mark.parametrize("style", STYLES)
def test_bfloat16_is_as_far_from_float32_as_on_one_device(style):
    exact = value_and_gradients({"data": 1}, None, **OPTIONS["causal"])
    ours = value_and_gradients({"context": 4}, style, dtype=jnp.bfloat16, **OPTIONS["causal"])
    assert_close(ours, exact, 0.02)


# ------------------------------------------------------------------------------------------------------------ pipeline


def staged(axes, style):
    """Two stages that do different things in every tick: nothing, attention, or attention and its gradient."""
    order_T = order_of(style, axes.get("context", 1))
    axis = ("pipe", "data")

    def stage(x, positions_BT, segments_BT, window):
        number, info = jax.lax.axis_index("pipe"), TokenInfo(positions_BT, segments_BT, context_style=style)

        def attend(x_BTNH):
            x_BTKGH = x_BTNH.reshape(*x_BTNH.shape[:2], K, N // K, H)
            return attention(x_BTNH, x_BTKGH.mean(3), x_BTKGH.max(3), info, info, causal=True, window=window, scale=0.3)

        def both(x_BTNH):
            y_BTNH, pull = jax.vjp(attend, x_BTNH)
            return x_BTNH - pull(jnp.sin(y_BTNH))[0]

        def tick(x_BTNH, tick):
            branches = [lambda x: x, lambda x: x + attend(x), both]
            x_BTNH = jax.lax.switch((tick + number) % 3, branches, x_BTNH)
            return jax.lax.ppermute(x_BTNH, "pipe", [(0, 1), (1, 0)]), None

        return jax.lax.scan(tick, x[0], jnp.arange(4))[0][None]

    with on_mesh(**axes):
        run = jax.shard_map(
            stage, in_specs=(P(*axis), P(), P("data"), P()), out_specs=P(*axis), axis_names={*axis}
        )  # fmt: skip
        q_BTNH = arrays()[0][:, order_T]
        inputs = (
            jnp.stack([q_BTNH, jnp.cos(q_BTNH)]),
            jnp.asarray(order_T, jnp.int32)[None],
            jnp.asarray(SEGMENTS_BT[:, order_T]),
            jnp.int32(9),
        )
        compiled = jax.jit(run).lower(*inputs).compile()
        found = collectives(compiled.as_text(), jax.sharding.get_mesh())
        return np.asarray(compiled(*inputs))[:, :, np.argsort(order_T)], found


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("axes", few_of(STAGED, STAGED[1:2]), ids=str)
def test_stages_of_a_pipeline_may_take_different_branches(axes, style):
    """In a branch that only some stages take there is no permutation, and the numbers are those of two devices."""
    ours, found = staged({"pipe": 2} | axes, style)
    assert_close([ours], [staged({"pipe": 2}, None)[0]], 1e-5)
    inside = [c for c in found if c.conditional]
    assert inside
    assert {c.axes for c in inside} == {("context",)}
    assert "collective-permute" not in {c.kind for c in inside}


# --------------------------------------------------------------------------------------------------------- the model


def test_a_batch_is_put_in_order_and_says_so(build):
    batch = {"tokens_BT": jnp.arange(2 * 16).reshape(2, 16), "mask_BT": jnp.ones((2, 16))}
    description = build().description
    with on_mesh(context=2):
        moved = jax.jit(lambda batch: in_context_order(description, batch))(batch)
        assert in_context_order(build(causal=False).description, batch) is batch
    order_T = zigzag(16, 2)
    np.testing.assert_array_equal(moved["positions_BT"], order_T[None])
    np.testing.assert_array_equal(moved["tokens_BT"], batch["tokens_BT"][:, order_T])
    assert in_context_order(description, batch) is batch  # without a mesh there is nothing to put in order


def test_a_prefilled_cache_is_read_on_a_context_mesh(build, tokens_BT):
    model = build()

    def run(axes):
        with on_mesh(**axes):
            bound = model.description.bind(model.params)
            _, cache, _ = bound(tokens_BT[:, :8], cache=make_cache(model.description.config, 2, 16))
            positions_BT = jnp.full((2, 1), 8, jnp.int32)
            x_BTD, *_ = jax.jit(lambda t: bound(t, positions_BT=positions_BT, cache=cache))(tokens_BT[:, 8:9])
            return np.asarray(x_BTD)

    np.testing.assert_allclose(run({"context": 2, "tensor": 2}), run({"data": 1}), atol=2e-5)


def test_an_encoder_and_full_rematerialisation(build):
    """What the lists of tests/test_parity_context.py leave out."""
    tokens_BT = np.random.default_rng(0).integers(0, 40, (2, 16))
    batch = {"tokens_BT": tokens_BT, "targets_BT": tokens_BT[:, ::-1], "mask_BT": np.ones((2, 16), np.float32)}
    for fields, remat in (({"causal": False}, "full"), ({}, "attention")):
        model = build(**fields)
        train = TrainConfig(remat=remat, batch_size=2, seq_len=16, loss_chunk=4)

        def run(axes, model=model, train=train):
            with on_mesh(**axes):
                return jax.jit(lambda params, batch: gradients(model.description, train, params, batch))(
                    model.params, jax.tree.map(jnp.asarray, batch)
                )[1]

        ours, expected = run({"context": 4}), run({"data": 1})
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max() + 1e-9), ours, expected)


def test_dropout_masks_are_drawn_where_the_tokens_are():
    keys_B, positions_1T = jax.random.split(jax.random.key(0), 2), jnp.asarray(zigzag(16, 2))[None]
    x_BTD = jnp.ones((2, 16, 8))
    run = lambda x, keys, positions: dropout(shard(x, "batch", "residual", "width"), 0.5, keys, 3, positions)
    expected = run(x_BTD, keys_B, positions_1T)
    with on_mesh(context=2, tensor=2, data=2):
        compiled = jax.jit(run).lower(x_BTD, keys_B, positions_1T).compile()
        assert not collectives(compiled.as_text(), jax.sharding.get_mesh())
        np.testing.assert_array_equal(compiled(x_BTD, keys_B, positions_1T), expected)
