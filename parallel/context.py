"""Attention over sequences that are split over the `context` axis: a ring, all-to-all (Ulysses), or gathered keys.

Here is what travels between devices; softmax, mask, soft-cap and window are in model/attention_rule.py. Queries, keys
and values come after rotary positions, with their `marks`: a pytree of (B, T) arrays (B may be 1), positions and
documents. Each device works on its own part: batch, heads and tokens are manual here, as far as the caller has not made
them so.

A picture of the ring (arXiv 2310.01889), on four devices with the parts 0 to 3 of a sequence:

    device         0        1        2        3
    queries        0        1        2        3       stay
    keys, step 0   0        1        2        3       each device folds the block that it holds into its softmax,
    keys, step 1   3        0        1        2       while the next one, its neighbour's, is already under way
    keys, step 2   2        3        0        1
    keys, step 3   1        2        3        0

A block is the keys, values and marks of one device. In the backward pass it goes round again, and the gradient of a
block travels one step behind it, so that every device adds its share. In a causal model late tokens see more than early
ones, so `zigzag` gives each device an early and a late chunk of the sequence, and tiles that the mask hides are
skipped: then all devices have the same work in every step.

Blocks travel in one of two ways, with the same bytes and the same memory:
- From neighbour to neighbour (collective-permute), which any network carries best.
- In a pipeline, where stages take different branches, a permutation would wait for devices that never come. There step
  i gathers the i-th slice of every device's block (all-gather, back by reduce-scatter): collectives whose groups lie
  inside one stage.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from parallel.manual import vary
from parallel.sharding import ACTIVATION_AXES, in_pipeline
from runtime.platform import platform

AXIS = "context"
MOST_SCORES = 2**28  # of a tile of a ring; 1 GiB in float32
SMALLEST_CHUNK = 128  # queries, as many as a matrix unit has rows


def zigzag(T: int, shards: int) -> np.ndarray:
    """The order of T tokens in which each of `shards` contiguous parts has the same causal work: int32 (T,).

    Of 2 * shards chunks, part i holds chunks i and 2 * shards - 1 - i. Raises ValueError if T does not divide so.
    """
    if T % (2 * shards):
        raise ValueError(f"{T} tokens do not divide by 2 * mesh.context={shards} = {2 * shards} chunks of a ring")
    chunks = np.arange(T, dtype=np.int32).reshape(2 * shards, -1)
    return np.stack([chunks[:shards], chunks[::-1][:shards]], axis=1).reshape(T)


# ------------------------------------------------------------------------------------------------ parts of the devices


def _on_parts(body: Callable, arguments: tuple, results):
    """`body(*arguments)` on each device's parts; `results` are arrays or shapes like those that it returns.

    The dims of an array, as many as it has, are batch, tokens, heads, head_dim; a scalar is whole.
    """
    mesh, manual = jax.sharding.get_abstract_mesh(), set()

    def spec(x) -> PartitionSpec:
        dims = []
        for name, size in zip(("batch", "tokens", "heads", "head_dim"), x.shape, strict=False):
            axes = tuple(axis for axis in ACTIVATION_AXES[name] if axis in mesh.auto_axes)
            dims.append(axes if size % math.prod(mesh.shape[axis] for axis in axes) == 0 else ())
        manual.update(*dims)
        return PartitionSpec(*dims)

    specs = jax.tree.map(spec, (arguments, results))
    return jax.shard_map(body, in_specs=specs[0], out_specs=specs[1], axis_names=manual)(*arguments)


def _constant(shape: tuple[int, ...], value: float, like: jax.Array) -> jax.Array:
    """A float32 accumulator at its beginning, typed as different on the devices on which `like` is."""
    return vary(jnp.full(shape, value, jnp.float32), jax.typeof(like).manual_axis_type.varying)


def _cut(x: jax.Array, parts: int) -> jax.Array:
    """(B, T, ...) to (parts, B, T / parts, ...)."""
    return jnp.moveaxis(x.reshape(x.shape[0], parts, x.shape[1] // parts, *x.shape[2:]), 1, 0)


def _join(x: jax.Array) -> jax.Array:
    """(parts, B, T / parts, ...) to (B, T, ...)."""
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], x.shape[0] * x.shape[2], *x.shape[3:])


# ----------------------------------------------------------------------------------------------- how the blocks travel


def _to_next(tree):
    """The arrays of the device before this one.

    On CPUs in one message: XLA mixes up permutations there that do not wait for each other, once a program comes out of
    its compile cache. Elsewhere as they are: a message's float32 as pairs of 16 bits takes 64 times its memory on TPUs,
    where a last dim of 2 is padded to 128. Without the barrier their compiler wants 200 GB for a step of 34.
    """
    size = jax.lax.axis_size(AXIS)
    neighbours = [(i, (i + 1) % size) for i in range(size)]
    if platform() != "cpu":
        return jax.lax.optimization_barrier(jax.lax.ppermute(tree, AXIS, neighbours))
    leaves, structure = jax.tree.flatten(tree)
    unit = jnp.uint16 if any(x.dtype.itemsize == 2 for x in leaves) else jnp.uint32
    bits = [jax.lax.bitcast_convert_type(x, unit) for x in leaves]
    message = jax.lax.ppermute(jnp.concatenate([x.ravel() for x in bits]), AXIS, neighbours)
    parts = jnp.split(message, np.cumsum([x.size for x in bits])[:-1])
    arrived = [
        jax.lax.bitcast_convert_type(part.reshape(sent.shape), x.dtype)
        for part, sent, x in zip(parts, bits, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, arrived)


def _gather(tree, number, slices: int):
    """Slice `number` of every device's arrays (pieces, B, S, ...): (pieces * devices, B, S / slices, ...)."""

    def one(x: jax.Array) -> jax.Array:
        size = x.shape[2] // slices
        part = jax.lax.dynamic_slice_in_dim(x, number * size, size, axis=2)
        return jax.lax.all_gather(part, AXIS, tiled=True)

    return jax.tree.map(one, tree)


def _slices(tokens: int) -> int:
    """Into how many slices a piece is cut: as many as there are devices, or the most below that divide it."""
    return next(n for n in range(jax.lax.axis_size(AXIS), 0, -1) if tokens % n == 0)


def _fold(work: Callable, state, own):
    """`work(state, block) -> state` for all blocks; the next one is under way during the work on one."""
    slices = _slices(jax.tree.leaves(own)[0].shape[2])
    if in_pipeline():
        first, following, steps = _gather(own, 0, slices), lambda _, number: _gather(own, number, slices), slices
    else:
        first, following, steps = own, lambda block, _: _to_next(block), jax.lax.axis_size(AXIS)

    def step(carry, number):
        block, state = carry
        return (following(block, number), work(state, block)), None

    (block, state), _ = jax.lax.scan(step, (first, state), jnp.arange(1, steps))
    return work(state, block)


def _fold_back_gathered(work: Callable, dq, own):
    """`work(dq, block) -> dq, dkv of the block` for all blocks: dq, and dkv of the own block from all devices."""
    slices = _slices(jax.tree.leaves(own)[0].shape[2])

    def step(carry, number):
        block, dq = carry
        following = _gather(own, number, slices)
        dq, dkv = work(dq, block)
        return (following, dq), jax.lax.psum_scatter(dkv, AXIS, tiled=True)

    (block, dq), dkvs = jax.lax.scan(step, (_gather(own, 0, slices), dq), jnp.arange(1, slices))
    dq, dkv = work(dq, block)
    last = jax.lax.psum_scatter(dkv, AXIS, tiled=True)

    def whole(parts: jax.Array, last: jax.Array) -> jax.Array:  # (slices - 1, pieces, B, S / slices, ...) and one more
        return jax.vmap(_join, in_axes=1)(jnp.concatenate([parts, last[None]]))

    return dq, jax.tree.map(whole, dkvs, last)


def _fold_back_ring(work: Callable, dq, own):
    """As `_fold_back_gathered`; dkv of a block travels one step behind it, from the device that it visits first.

    So it makes size - 1 hops, as the block does, and every hop but the last overlaps with work.
    """
    size = jax.lax.axis_size(AXIS)
    add = partial(jax.tree.map, jnp.add)

    def step(block, dkv, dq, more: bool):
        sent = (block if more else None, dkv)
        following, arrived = _to_next(sent) if more or dkv is not None else sent
        dq, here = work(dq, block)
        return following, here if arrived is None else add(arrived, here), dq

    block, home, dq = step(own, None, dq, more=True)
    block, dkv, dq = step(block, None, dq, more=size > 2)
    if size > 2:
        carry = block, dkv, dq
        block, dkv, dq = jax.lax.scan(lambda c, _: (step(*c, more=True), None), carry, length=size - 3)[0]
        _, dkv, dq = step(block, dkv, dq, more=False)
    return dq, add(home, _to_next(dkv))


# ---------------------------------------------------------------------------------------------------------------- ring


class Softmax(Protocol):
    """The mathematics that goes round the ring, of which nothing is known here; model.attention_rule.Rule is one.

    Queries come as (B, T, K, G, H), keys and values as (B, S, K, H), marks as (B, T) and (B, S). A state is weighted
    values (B, K, G, T, H), maxima and sums of weights (B, K, G, T), float32.
    """

    query_chunk: int  # queries whose scores exist at once, at most
    lowest: float  # the maximum of a softmax that has met no key

    def meet(self, window, state, q_BTKGH, q_marks, k_BSKH, v_BSKH, k_marks):
        """The state after these keys too."""

    def differentiate(
        self, window, dq_BTKGH, dkv_BSKH, q_BTKGH, dout_BTKGH, log_BTKG, delta_BTKG, q_marks, k_BSKH, v_BSKH, k_marks
    ):
        """dq, and (dk, dv), after these keys too; log_BTKG is the logarithm of the softmax's sum."""


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def ring(rule: Softmax, q_BTNH, k_BTKH, v_BTKH, marks, window: jax.Array | None) -> jax.Array:
    """Attention (B, T, N, H) of tokens in any order, that of `zigzag` being the fastest; accumulators are float32.

    The backward pass keeps the arguments, the result and the logarithm of each softmax's sum. What exists of the scores
    at a time is those of at most `query_chunk` queries and half a device's keys.
    """
    return _ring_forward(rule, q_BTNH, k_BTKH, v_BTKH, marks, window)[0]


def _ring_forward(rule, q_BTNH, k_BTKH, v_BTKH, marks, window):
    arguments = q_BTNH, k_BTKH, v_BTKH, marks, window
    results = q_BTNH, jax.ShapeDtypeStruct(q_BTNH.shape[:3], jnp.float32)
    out_BTNH, log_BTN = _on_parts(partial(_attend, rule), arguments, results)
    # named, so that a remat policy can keep both instead of going round again
    out_BTNH, log_BTN = (checkpoint_name(x, "attention") for x in (out_BTNH, log_BTN))
    return out_BTNH, (*arguments, out_BTNH, log_BTN)


def _ring_backward(rule, residuals, dout_BTNH):
    gradients = _on_parts(partial(_differentiate, rule), (*residuals, dout_BTNH), residuals[:3])
    return *gradients, None, None


ring.defvjp(_ring_forward, _ring_backward)


def _pieces(T: int) -> int:
    """How many contiguous pieces a device's tokens are taken for: the two chunks of the zig-zag."""
    return 2 if T % 2 == 0 else 1


def _queries(rule: Softmax, tree, K: int):
    """(B, T, ...) arrays, the first of which has all heads, in chunks of queries, none of which lies in two pieces;
    heads (N) become (K, G).

    Scores of a chunk and a piece of keys exist several times while they are differentiated: chunks are halved while one
    of these arrays has more than MOST_SCORES entries.
    """
    B, T, N = jax.tree.leaves(tree)[0].shape[:3]
    piece, most = T // _pieces(T), rule.query_chunk
    while most > SMALLEST_CHUNK and B * N * most * piece > MOST_SCORES:
        most //= 2
    chunks = next(n for n in range(1, piece + 1) if piece % n == 0 and piece // n <= most)

    def one(x: jax.Array) -> jax.Array:
        x = x if x.ndim == 2 else x.reshape(*x.shape[:2], K, x.shape[2] // K, *x.shape[3:])
        return _cut(x, chunks * _pieces(x.shape[1]))

    return jax.tree.map(one, tree)


def _keys(k_BTKH, v_BTKH, marks):
    """Keys, values and their marks in pieces: the block that travels."""
    pieces = jax.tree.map(lambda x: _cut(x, _pieces(x.shape[1])), (k_BTKH, v_BTKH, marks))
    return vary(pieces, jax.typeof(k_BTKH).manual_axis_type.varying)


def _attend(rule: Softmax, q_BTNH, k_BTKH, v_BTKH, marks, window):
    """On one device: out_BTNH of its queries and all keys, and the logarithm of the softmax's sums, (B, T, N)."""
    queries = _queries(rule, (q_BTNH, marks), k_BTKH.shape[2])
    chunks, B, T, K, G, H = queries[0].shape
    state = (
        _constant((chunks, B, K, G, T, H), 0, q_BTNH),
        _constant((chunks, B, K, G, T), rule.lowest, q_BTNH),
        _constant((chunks, B, K, G, T), 0, q_BTNH),
    )

    def work(state, block):
        def chunk(x):
            state, queries = x
            tile = lambda state, keys: (rule.meet(window, state, *queries, *keys), None)
            return jax.lax.scan(tile, state, block)[0]

        return jax.lax.map(chunk, (state, queries))

    out, top, total = _fold(work, state, _keys(k_BTKH, v_BTKH, marks))
    back = lambda x: _join(jnp.moveaxis(x, 4, 2)).reshape(q_BTNH.shape[: x.ndim - 2])
    return back(out / total[..., None]).astype(q_BTNH.dtype), back(top + jnp.log(total))


def _differentiate(rule: Softmax, q_BTNH, k_BTKH, v_BTKH, marks, window, out_BTNH, log_BTN, dout_BTNH):
    """On one device: dq_BTNH of its queries, dk_BTKH and dv_BTKH of its keys."""
    delta_BTN = (out_BTNH.astype(jnp.float32) * dout_BTNH).sum(-1)
    queries = _queries(rule, (q_BTNH, dout_BTNH, log_BTN, delta_BTN, marks), k_BTKH.shape[2])
    own = _keys(k_BTKH, v_BTKH, marks)

    def work(dq, block):
        def chunk(dkv, x):
            dq, queries = x

            def tile(dq, x):
                keys, dkv = x
                return rule.differentiate(window, dq, dkv, *queries, *keys)

            dq, dkv = jax.lax.scan(tile, dq, (block, dkv))
            return dkv, dq

        zeros = tuple(_constant(x.shape, 0, q_BTNH) for x in block[:2])
        dkv, dq = jax.lax.scan(chunk, zeros, (dq, queries))
        return dq, dkv

    fold_back = _fold_back_gathered if in_pipeline() else _fold_back_ring
    dq, dkv = fold_back(work, _constant(queries[0].shape, 0, q_BTNH), own)
    like = lambda x, y: _join(x).reshape(y.shape).astype(y.dtype)
    return like(dq, q_BTNH), like(dkv[0], k_BTKH), like(dkv[1], v_BTKH)


# ---------------------------------------------------------------------------------------------- all-to-all, and gather


def ulysses(attend: Callable, q_BTNH, k_BTKH, v_BTKH, marks, window: jax.Array | None) -> jax.Array:
    """Attention (B, T, N, H) by `attend(q, k, v, q_marks, k_marks, window)` with whole sequences of some heads.

    One all-to-all turns parts of the tokens into parts of the heads, another turns the result back (DeepSpeed Ulysses,
    arXiv 2309.14509). Key-value heads that do not divide are copied as far as needed. Raises ValueError if the query
    heads of a device do not divide by the context axis.
    """
    return _exchanged(partial(_by_heads, attend), q_BTNH, k_BTKH, v_BTKH, marks, window)


def gather(attend: Callable, q_BTNH, k_BTKH, v_BTKH, marks, window: jax.Array | None) -> jax.Array:
    """Attention (B, T, N, H) by `attend`, as for `ulysses`, of each device's queries and the gathered keys.

    One exchange and plain kernels, but memory and work do not fall as the ring's do: for short sequences.
    """
    return _exchanged(partial(_by_queries, attend), q_BTNH, k_BTKH, v_BTKH, marks, window)


def _by_heads(attend: Callable, q_BTNH, k_BTKH, v_BTKH, marks, window):
    size, N, K = jax.lax.axis_size(AXIS), q_BTNH.shape[2], k_BTKH.shape[2]
    if N % size:
        raise ValueError(f"{N} heads of a tensor shard do not divide by mesh.context={size}, as ulysses needs")
    k_BTKH, v_BTKH = (jnp.repeat(x, size // math.gcd(K, size), axis=2) for x in (k_BTKH, v_BTKH))
    q, k, v = (jax.lax.all_to_all(x, AXIS, 2, 1, tiled=True) for x in (q_BTNH, k_BTKH, v_BTKH))
    marks = _all_tokens(marks)
    return jax.lax.all_to_all(attend(q, k, v, marks, marks, window), AXIS, 1, 2, tiled=True)


def _by_queries(attend: Callable, q_BTNH, k_BTKH, v_BTKH, marks, window):
    return attend(q_BTNH, _all_keys(k_BTKH), _all_keys(v_BTKH), marks, _all_tokens(marks), window)


def _all_tokens(tree):
    return jax.lax.all_gather(tree, AXIS, axis=1, tiled=True)


@jax.custom_vjp
def _all_keys(x_BTKH: jax.Array) -> jax.Array:
    """As `_all_tokens`, with gradients that are added up in float32 (a sum in bfloat16 crashes XLA's CPU compiler)."""
    return _all_tokens(x_BTKH)


def _all_keys_backward(_, dx_BSKH):
    dx_BTKH = jax.lax.psum_scatter(dx_BSKH.astype(jnp.float32), AXIS, scatter_dimension=1, tiled=True)
    return (dx_BTKH.astype(dx_BSKH.dtype),)


_all_keys.defvjp(lambda x_BTKH: (_all_tokens(x_BTKH), None), _all_keys_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _exchanged(body: Callable, q_BTNH, k_BTKH, v_BTKH, marks, window):
    """`body` on each device's parts; it is run again in the backward pass instead of keeping weights (B, N, T, S)."""
    return _on_parts(body, (q_BTNH, k_BTKH, v_BTKH, marks, window), q_BTNH)


def _exchanged_backward(body, arguments, dout_BTNH):
    def pull(q_BTNH, k_BTKH, v_BTKH, marks, window, dout_BTNH):
        return jax.vjp(lambda q, k, v: body(q, k, v, marks, window), q_BTNH, k_BTKH, v_BTKH)[1](dout_BTNH)

    return *_on_parts(pull, (*arguments, dout_BTNH), arguments[:3]), None, None


_exchanged.defvjp(lambda body, *arguments: (_exchanged(body, *arguments), arguments), _exchanged_backward)
