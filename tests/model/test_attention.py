"""The attention function: chunks of queries, grouped heads, soft-caps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import attention as module
from model import plain_attention
from model.attention import attention
from model.attention_rule import TokenInfo

B, T, N, K, H = 2, 12, 4, 2, 8
SEGMENTS_BT = jnp.asarray([[0] * 7 + [1] * 5, [0] * 2 + [1] * 10], jnp.int32)
POSITIONS_1T = jnp.arange(T, dtype=jnp.int32)[None]
OPTIONS = {
    "causal": {"causal": True, "window": None},
    "full": {"causal": False, "window": None},
    "window and soft-cap": {"causal": True, "window": jnp.int32(3), "softcap": 1.5},
}


def drawn() -> list[jax.Array]:
    generator = np.random.default_rng(0)
    return [jnp.asarray(generator.standard_normal((B, T, heads, H)), jnp.float32) for heads in (N, K, K)]


def value_and_gradients(arrays, segments_BT, in_order=False, **options):
    info = TokenInfo(POSITIONS_1T, segments_BT, in_order=in_order)

    @jax.jit
    def run(arrays):
        def objective(arrays):
            out = attention(*arrays, info, info, scale=1.0, **options)
            return jnp.sin(out).sum(), out

        (_, out), grads = jax.value_and_grad(objective, has_aux=True)(arrays)
        return out, grads

    return run(arrays)


@pytest.mark.parametrize("segments_BT", [None, SEGMENTS_BT], ids=["one document", "documents"])
@pytest.mark.parametrize("case", OPTIONS)
def test_chunks_of_queries_change_nothing(case, segments_BT, monkeypatch):
    whole = value_and_gradients(drawn(), segments_BT, **OPTIONS[case])
    monkeypatch.setattr(module, "QUERY_CHUNK", 3)
    chunked = value_and_gradients(drawn(), segments_BT, **OPTIONS[case])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), chunked, whole)


@pytest.mark.parametrize("segments_BT", [None, SEGMENTS_BT], ids=["one document", "documents"])
@pytest.mark.parametrize("case", OPTIONS)
def test_keys_after_a_part_of_the_queries_are_left_out_and_change_nothing(case, segments_BT, monkeypatch):
    options = OPTIONS[case] | {"windows": (3,)}
    whole = value_and_gradients(drawn(), segments_BT, **options)
    monkeypatch.setattr(plain_attention, "SMALLEST_PART", 3)
    parts = value_and_gradients(drawn(), segments_BT, in_order=True, **options)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), parts, whole)
    loss = lambda *arrays: value_and_gradients(arrays, segments_BT, in_order=True, **options)[0].sum()
    sizes = {f"{B}x{K}x{N // K * 3}x{keys}xf32" for keys in (3, 6, 9, 12)}
    text = jax.jit(loss).lower(*drawn()).as_text()
    assert {size for size in sizes if size in text} == (sizes if OPTIONS[case]["causal"] else set())


def test_scores_of_all_queries_never_exist_at_once_when_chunked(monkeypatch):
    monkeypatch.setattr(module, "QUERY_CHUNK", 3)
    info = TokenInfo(POSITIONS_1T)
    loss = lambda *arrays: attention(*arrays, info, info, causal=True, window=None, scale=1.0).sum()
    text = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*drawn()).as_text()
    assert f"{B}x{K}x{N // K * 3}x{T}xf32" in text
    assert f"{B}x{K}x{N // K * T}x{T}xf32" not in text


def by_definition(q_BTNH, k_BSKH, v_BSKH, segments_BT, causal, window, softcap=0.0):
    """Attention of scale 1 in one piece, which JAX differentiates by itself."""
    k_BSNH, v_BSNH = (jnp.repeat(x, N // K, axis=2) for x in (k_BSKH, v_BSKH))
    scores = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSNH)
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    distance = jnp.arange(T)[:, None] - jnp.arange(T)
    seen = (distance >= 0) | (not causal)
    if window is not None:
        seen &= abs(distance) < window
    seen = seen[None] if segments_BT is None else seen & (segments_BT[:, :, None] == segments_BT[:, None])
    weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf))
    return jnp.einsum("BNTS,BSNH->BTNH", weights, v_BSNH)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("segments_BT", [None, SEGMENTS_BT], ids=["one document", "documents"])
@pytest.mark.parametrize("case", OPTIONS)
def test_gradients_are_those_of_the_definition(case, segments_BT, dtype, monkeypatch):
    monkeypatch.setattr(plain_attention, "SMALLEST_PART", 3)
    info = TokenInfo(POSITIONS_1T, segments_BT, in_order=True)
    options = OPTIONS[case]
    arrays = [x.astype(dtype) for x in drawn()]
    dout = jnp.asarray(np.random.default_rng(1).standard_normal((B, T, N, H)), dtype)
    run = lambda *arrays: attention(*arrays, info, info, scale=1.0, windows=(3,), **options)
    reference = lambda *arrays: by_definition(*arrays, segments_BT, **options)
    found, expected = (
        jax.jit(lambda arrays, dout, f=f: (lambda out, pull: (out, *pull(dout)))(*jax.vjp(f, *arrays)))(arrays, dout)
        for f, arrays, dout in (
            (run, arrays, dout),
            (reference, [x.astype(jnp.float32) for x in arrays], dout.astype(jnp.float32)),
        )
    )
    for ours, exact in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        # in bfloat16 weights and their gradients are rounded too
        size = float(jnp.abs(exact).max()) * (1e-6 if dtype == "float32" else 2.0**-6)
        np.testing.assert_allclose(np.asarray(ours, np.float32), exact, rtol=0, atol=size)


def test_16_bit_attention_multiplies_16_bit_numbers_in_the_backward_pass_too():
    arrays = [x.astype(jnp.bfloat16) for x in drawn()]
    info = TokenInfo(POSITIONS_1T, in_order=True)
    run = lambda *arrays: attention(*arrays, info, info, causal=True, window=None, scale=1.0)
    text = jax.jit(lambda arrays: jax.vjp(run, *arrays)[1](arrays[0])).lower(arrays).as_text()
    dots = [line.split(" : ")[-1] for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert len(dots) == 5  # scores; gradients of weights, queries, keys and values
    assert all(line.split("->")[0].count("bf16") == 2 for line in dots)


def test_equals_a_plain_loop_over_tokens():
    q, k, v = (np.asarray(x, np.float64) for x in drawn())
    info = TokenInfo(POSITIONS_1T, SEGMENTS_BT)
    out = attention(*drawn(), info, info, causal=True, window=jnp.int32(4), scale=0.3, softcap=2.0)
    for b, t, n in np.ndindex(B, T, N):
        visible = [s for s in range(max(0, t - 3), t + 1) if SEGMENTS_BT[b, s] == SEGMENTS_BT[b, t]]
        scores = np.array([2.0 * np.tanh(0.3 * q[b, t, n] @ k[b, s, n * K // N] / 2.0) for s in visible])
        weights = np.exp(scores) / np.exp(scores).sum()
        expected = sum(w * v[b, s, n * K // N] for w, s in zip(weights, visible, strict=True))
        np.testing.assert_allclose(out[b, t, n], expected, atol=1e-6)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_heads_equal_multi_head_with_repeated_weights(kv_heads, build, tokens_BT):
    grouped, whole = build(kv_heads=kv_heads, bias="qkv"), build(kv_heads=4, bias="qkv")
    params = jax.tree.map(lambda x: x, grouped.params)
    for name in ("key", "value"):
        repeated = jax.tree.map(
            lambda heads: jnp.repeat(heads, 4 // kv_heads, axis=-2), grouped.params["layers"]["attention"][name]
        )
        params["layers"]["attention"][name] = repeated
    expected = jax.jit(grouped.logits)(grouped.params, tokens_BT)
    np.testing.assert_allclose(jax.jit(whole.logits)(params, tokens_BT), expected, atol=1e-5)
