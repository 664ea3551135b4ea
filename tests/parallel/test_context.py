"""Ring, all-to-all and gathered attention against a dense softmax: results, balance, memory, bytes."""

from collections import Counter
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from model.attention_rule import Rule
from parallel import context
from parallel.context import gather, ring, ulysses, zigzag
from parallel.mesh import AXES, make_mesh
from performance.collectives import collectives

B, T, N, K, H = 2, 48, 4, 2, 8
SCALE = 0.35


def on_mesh(**axes: int):
    return jax.set_mesh(make_mesh(dict.fromkeys(AXES, 1) | axes, jax.devices()[: int(np.prod(list(axes.values())))]))


def causal(q_BT, k_BS, window):
    seen_BTS = q_BT[:, :, None] >= k_BS[:, None, :]
    return seen_BTS if window is None else seen_BTS & (q_BT[:, :, None] - k_BS[:, None, :] < window)


def dense(q_BTNH, k_BSKH, v_BSKH, q_BT, k_BS, window):
    k, v = (jnp.repeat(x, q_BTNH.shape[2] // x.shape[2], axis=2) for x in (k_BSKH, v_BSKH))
    scores = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k) * SCALE
    weights = jax.nn.softmax(jnp.where(causal(q_BT, k_BS, window)[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("BNTS,BSNH->BTNH", weights, v)


def one_device(q, k, v, q_BT, window):
    return dense(q, k, v, q_BT, q_BT, window)


STYLES = {
    "ring": partial(ring, Rule(causal, SCALE, softcap=0.0, query_chunk=4)),
    "ulysses": partial(ulysses, dense),
    "gather": partial(gather, dense),
}


def value_and_gradients(attend, order_T, heads=(N, K, K), window=None) -> list[np.ndarray]:
    """The result, and the gradients of a function of it, in the order of the sequence."""
    generator, shape = np.random.default_rng(0), (B, len(order_T))
    arrays = [jnp.asarray(generator.standard_normal((*shape, h, H))[:, order_T], jnp.float32) for h in heads]

    @jax.jit
    def run(arrays, q_BT, window):
        out, pull = jax.vjp(lambda *arrays: attend(*arrays, q_BT, window), *arrays)
        return out, *pull(jnp.cos(out))

    return [np.asarray(x)[:, np.argsort(order_T)] for x in run(arrays, jnp.asarray(order_T, jnp.int32)[None], window)]


def assert_equal(ours, expected):
    for a, b in zip(ours, expected, strict=True):
        assert np.linalg.norm(a - b) < 1e-6 * np.linalg.norm(b)


# ------------------------------------------------------------------------------------------------------ order and work


@pytest.mark.parametrize("shards", [1, 2, 3, 8])
def test_zigzag_gives_every_part_the_same_causal_work(shards):
    order_T = zigzag(T, shards)
    assert sorted(order_T) == list(range(T))
    assert len(set((order_T + 1).reshape(shards, -1).sum(1))) == 1  # keys that a part's queries see
    chunks = order_T.reshape(2 * shards, -1)
    assert (np.diff(chunks) == 1).all()


def test_zigzag_refuses_with_the_arithmetic():
    with pytest.raises(ValueError, match=r"36 tokens do not divide by 2 \* mesh.context=4 = 8"):
        zigzag(36, 4)


executed = Counter()  # tiles by device


@dataclass(frozen=True)
class Counting(Rule):
    """Counts the tiles whose scores are computed."""

    def scores(self, q_BTKGH, k_BSKH):
        jax.debug.callback(lambda device: executed.update([int(device)]), jax.lax.axis_index("context"))
        return super().scores(q_BTKGH, k_BSKH)


def tiles(order_T, size: int, window=None) -> list[int]:
    """Tiles that each device works on, forward and backward."""
    executed.clear()
    rule = Counting(causal, SCALE, softcap=0.0, query_chunk=T)
    with on_mesh(context=size):
        value_and_gradients(partial(ring, rule), order_T, window=window)
        jax.effects_barrier()
    return [executed[device] for device in range(size)]


def test_masked_tiles_are_skipped_and_the_zigzag_shares_the_others_evenly():
    """Of (2 c)^2 tiles of half a device's tokens each, c (2 c + 1) are not masked: 2 c + 1 for each device."""
    assert tiles(zigzag(T, 4), 4) == [2 * 9] * 4
    assert tiles(np.arange(T), 4) == [2 * n for n in (3, 7, 11, 15)]


def test_a_window_skips_what_lies_behind_it():
    assert sum(tiles(zigzag(T, 4), 4, window=jnp.int32(3))) == 2 * (8 + 7)  # the diagonal, and the tiles beside it


# ------------------------------------------------------------------------------------------------------------- results


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_ring_equals_one_device(size):
    """Three too: the backward ring is put together in its own way for each size up to four."""
    with on_mesh(context=size):
        ours = value_and_gradients(STYLES["ring"], zigzag(T, size))
    assert_equal(ours, value_and_gradients(one_device, np.arange(T)))


@pytest.mark.parametrize("tokens", [T, 6, 14])
def test_ring_is_right_in_any_order_and_with_an_odd_number_of_tokens_on_a_device(tokens):
    order_T = np.random.default_rng(0).permutation(tokens)
    with on_mesh(context=2, data=2):
        ours = value_and_gradients(STYLES["ring"], order_T)
    assert_equal(ours, value_and_gradients(one_device, np.arange(tokens)))


@pytest.mark.parametrize("style", ["ulysses", "gather"])
@pytest.mark.parametrize("axes", [{"context": 2}, {"context": 4}, {"context": 2, "tensor": 2, "data": 2}], ids=str)
def test_exchanges_equal_one_device(style, axes):
    """On 4 devices each of the 2 key-value heads serves two of them."""
    with on_mesh(**axes):
        ours = value_and_gradients(STYLES[style], np.arange(T))
    assert_equal(ours, value_and_gradients(one_device, np.arange(T)))


def test_ulysses_copies_no_more_heads_than_it_needs():
    """6 key-value heads of 12 on 4 devices: 12 after copying, 3 each."""
    shapes = []

    def attend(q, k, v, *rest):
        shapes.append((q.shape, k.shape))
        return dense(q, k, v, *rest)

    with on_mesh(context=4):
        ours = value_and_gradients(partial(ulysses, attend), np.arange(T), heads=(12, 6, 6))
    assert set(shapes) == {((B, T, 3, H), (B, T, 3, H))}
    assert_equal(ours, value_and_gradients(one_device, np.arange(T), heads=(12, 6, 6)))


def test_ulysses_refuses_heads_that_do_not_divide():
    with on_mesh(context=8), pytest.raises(ValueError, match=r"4 heads .* do not divide by mesh.context=8"):
        value_and_gradients(STYLES["ulysses"], np.arange(T))


# --------------------------------------------------------------------------------------------------- memory and bytes


def compiled(style: str, tokens: int, N: int, K: int, *, gradients: bool):
    """The attention of one sequence of `tokens`, forward or both ways, compiled for the mesh in context."""
    attend = partial(ring, Rule(causal, SCALE, 0.0, 1024)) if style == "ring" else STYLES[style]
    tokens_split = NamedSharding(jax.sharding.get_mesh(), PartitionSpec(None, "context"))
    spec = lambda h: jax.ShapeDtypeStruct((1, tokens, h, H), jnp.float32, sharding=tokens_split)
    marks = jax.ShapeDtypeStruct((1, tokens), jnp.int32, sharding=tokens_split)

    def run(q, k, v, marks):
        out, pull = jax.vjp(lambda *arrays: attend(*arrays, marks, None), q, k, v)
        return pull(out) if gradients else out

    return jax.jit(run, out_shardings=tokens_split).lower(spec(N), spec(K), spec(K), marks).compile()


def test_memory_of_a_long_sequence_falls_with_the_context_axis():
    """32k tokens, forward and backward: temporary bytes a device, compiled and not run."""
    found = {}
    for size in (2, 4, 8):
        with on_mesh(context=size):
            found[size] = compiled("ring", 2**15, 2, 1, gradients=True).memory_analysis().temp_size_in_bytes
    assert found[4] < 0.55 * found[2]
    assert found[8] < 0.55 * found[4]


def test_backward_pass_keeps_no_scores():
    """Arguments, result and one logarithm for each row are all that waits."""
    arrays = [jnp.ones((B, T, heads, H)) for heads in (N, K, K)]
    marks = jnp.arange(T)[None]
    with on_mesh(context=4):
        pull = jax.eval_shape(lambda *arrays: jax.vjp(lambda *a: STYLES["ring"](*a, marks, None), *arrays)[1], *arrays)
    kept = Counter(leaf.shape for leaf in jax.tree.leaves(pull))
    assert kept == {(B, T, N, H): 2, (B, T, K, H): 2, (B, T, N): 1, (1, T): 1}


@pytest.mark.parametrize("size", [4, 8])
def test_bytes_are_those_of_the_textbook(size):
    """(c - 1) / c of keys and values; in the backward pass again, and as much for their gradients."""
    volume = (size - 1) / size * 2 * 256 * K * H * 4
    with on_mesh(context=size):
        mesh = jax.sharding.get_mesh()
        for style, gradients, passes in (("gather", False, 1), ("ring", False, 1), ("ring", True, 3)):
            found = collectives(compiled(style, 256, N, K, gradients=gradients).as_text(), mesh)
            assert {c.axes for c in found} == {("context",)}
            assert sum(c.bytes for c in found) == pytest.approx(passes * volume, rel=0.05)


def test_chunks_of_a_ring_bound_its_scores(monkeypatch):
    """Fewer queries at a time where there are many sequences, heads or keys."""
    q_BTNH, marks_BT = jnp.zeros((4, 64, 8, 2)), jnp.zeros((4, 64), jnp.int32)
    rule = Rule(causal, SCALE, softcap=0.0, query_chunk=32)
    chunk = lambda: context._queries(rule, (q_BTNH, marks_BT), 8)[0].shape[2]
    assert chunk() == 32
    monkeypatch.setattr(context, "SMALLEST_CHUNK", 4)
    for most, expected in ((4 * 8 * 32 * 32, 32), (4 * 8 * 32 * 31, 16), (4 * 8 * 32 * 8, 8), (1, 4)):
        monkeypatch.setattr(context, "MOST_SCORES", most)
        assert chunk() == expected


def test_a_ring_of_small_chunks_whose_arrays_travel_as_they_are(monkeypatch):
    """As on accelerators, where CPUs send one message."""
    monkeypatch.setattr(context, "platform", lambda: "tpu")
    monkeypatch.setattr(context, "MOST_SCORES", 1)
    monkeypatch.setattr(context, "SMALLEST_CHUNK", 2)
    ring_of_chunks = partial(ring, Rule(causal, SCALE, softcap=0.0, query_chunk=6))
    with on_mesh(context=4):
        ours = value_and_gradients(ring_of_chunks, zigzag(T, 4))
    assert_equal(ours, value_and_gradients(one_device, np.arange(T)))
