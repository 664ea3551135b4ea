"""Attention by matmuls, some queries at a time: what runs where no fused kernel does.

Here P are parts of the queries, and R the rows of a part, which are its queries for each head of a group; other dims
are those of model/config.py.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from model.attention_kernels import Case
from model.attention_rule import MASKED, Rule
from model.matmul import in_memory, lays_out
from parallel.manual import alike

SMALLEST_PART = 128  # queries that are given keys of their own


def plain(rule: Rule, case: Case, q_BTNH, k_BSKH, v_BSKH, q_info, k_info, window) -> jax.Array:
    """Attention (B, T, N, H) by `rule`, of queries and keys with their marks (model.attention_rule.TokenInfo).

    Where queries and keys are the same tokens in order, each part of the queries is given no keys after its own. Long
    sequences that `rule.query_chunk` divides go through part by part, recomputed in the backward pass, so that the
    scores of all queries never exist at once.
    """
    (B, T, _, H), (S, K), G = q_BTNH.shape, k_BSKH.shape[1:3], q_BTNH.shape[2] // k_BSKH.shape[2]
    in_turn = T % rule.query_chunk == 0 and rule.query_chunk * 2 < T  # never of a length that is not known yet
    ordered = case.causal and case.in_order and T == S
    if in_turn:
        P = T // rule.query_chunk
    else:
        P = next(n for n in (8, 4, 2, 1) if T % n == 0 and T // n >= min(T, SMALLEST_PART)) if ordered else 1
    # heads before tokens, as matmuls want them, once and not in each part
    q_BKPGTH = q_BTNH.reshape(B, P, T // P, K, G, H).transpose(0, 3, 1, 4, 2, 5)
    q_BKPRH = in_memory(q_BKPGTH.reshape(B, K, P, G * T // P, H))
    k_BKSH, v_BKSH = (in_memory(x.transpose(0, 2, 1, 3)) for x in (k_BSKH, v_BSKH))
    q_marks = jax.tree.map(lambda x: x.reshape(x.shape[0], P, T // P), q_info)
    # for the backward pass, which sums no gradient over the devices on which an argument is the same
    q_BKPRH, k_BKSH, v_BKSH, *_ = alike(q_BKPRH, k_BKSH, v_BKSH, *jax.tree.leaves((q_info, k_info, window)))

    if in_turn:
        q_parts, marks_parts = jnp.moveaxis(q_BKPRH, 2, 0), jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), q_marks)
        one_part = lambda q_BKRH, marks: _attend(
            rule, (S,), q_BKRH[:, :, None], k_BKSH, v_BKSH, jax.tree.map(lambda x: x[:, None], marks), k_info, window
        )[0]
        out_PBKRH = jax.lax.map(jax.checkpoint(lambda part: one_part(*part)[:, :, 0]), (q_parts, marks_parts))
        out_BKPRH = jnp.moveaxis(out_PBKRH, 0, 2)
    else:
        ends = tuple((p + 1) * S // P for p in range(P))
        out_BKPRH, _ = _attend(rule, ends, q_BKPRH, k_BKSH, v_BKSH, q_marks, k_info, window)
    out_BPTKGH = out_BKPRH.reshape(B, K, P, G, T // P, H).transpose(0, 2, 4, 1, 3, 5)
    return checkpoint_name(out_BPTKGH.reshape(q_BTNH.shape), "attention")


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(rule: Rule, ends: tuple[int, ...], q_BKPRH, k_BKSH, v_BKSH, q_marks, k_marks, window):
    """out_BKPRH, each part of which sees the keys before its end; and the weights of each part, without a gradient."""
    outs, kept = [], []
    for p, end in enumerate(ends):
        scores = rule.cap(rule.scale * _score(q_BKPRH[:, :, p], k_BKSH[:, :, :end]))
        marks = _at(q_marks, p), _at(k_marks, slice(end))
        seen_BTS = rule.visible(*marks, window)
        seen_BRS = jnp.tile(seen_BTS, (1, scores.shape[2] // seen_BTS.shape[1], 1))
        weights = jax.nn.softmax(jnp.where(seen_BRS[:, None], scores, MASKED))
        outs.append(_weigh(weights.astype(v_BKSH.dtype), v_BKSH[:, :, :end]))
        kept.append(weights)
    return jnp.stack(outs, axis=2).astype(q_BKPRH.dtype), kept


def _attend_forward(rule, ends, q_BKPRH, k_BKSH, v_BKSH, q_marks, k_marks, window):
    out_BKPRH, kept = _attend.fun(rule, ends, q_BKPRH, k_BKSH, v_BKSH, q_marks, k_marks, window)
    return (out_BKPRH, kept), (q_BKPRH, k_BKSH, v_BKSH, kept)


def _attend_backward(rule, ends, residuals, gradients):
    dout_BKPRH, _ = gradients
    q_BKPRH, k_BKSH, v_BKSH, kept = residuals
    dtype = q_BKPRH.dtype
    dqs, all_dscores = [], []
    for p, (end, weights) in enumerate(zip(ends, kept, strict=True)):
        weighted = weights * _score(dout_BKPRH[:, :, p], v_BKSH[:, :, :end])
        dcapped = weighted - weights * weighted.sum(-1, keepdims=True)
        # the scores are computed again if there is a soft-cap: nothing else reads them
        dscores = rule.uncap(rule.scale * _score(q_BKPRH[:, :, p], k_BKSH[:, :, :end]), dcapped)
        all_dscores.append(dscores.astype(dtype))
        dqs.append(rule.scale * _weigh(all_dscores[-1], k_BKSH[:, :, :end]))
    dq_BKPRH = jnp.stack(dqs, axis=2).astype(dtype)
    dk_BKSH = (rule.scale * _over_rows(all_dscores, q_BKPRH)).astype(dtype)
    dv_BKSH = _over_rows([weights.astype(dtype) for weights in kept], dout_BKPRH).astype(dtype)
    return dq_BKPRH, dk_BKSH, dv_BKSH, None, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _at(marks, tokens: int | slice):
    return jax.tree.map(lambda x: x[:, tokens], marks)


def _score(q_BKRH: jax.Array, k_BKSH: jax.Array) -> jax.Array:
    return jnp.einsum("BKRH,BKSH->BKRS", q_BKRH, k_BKSH, preferred_element_type=jnp.float32)


def _weigh(weights_BKRS: jax.Array, v_BKSH: jax.Array) -> jax.Array:
    return jnp.einsum("BKRS,BKSH->BKRH", weights_BKRS, v_BKSH, preferred_element_type=jnp.float32)


def _over_rows(parts_BKRS: list[jax.Array], x_BKPRH: jax.Array) -> jax.Array:
    """Sum over parts of part^T x: float32 (B, K, S, H) for the keys of the last part, which has all."""
    S = parts_BKRS[-1].shape[3]
    missing = lambda part_BKRS: (0, S - part_BKRS.shape[3])
    if not (lays_out() and x_BKPRH.dtype.itemsize == 2):
        sums = 0.0
        for p, part_BKRS in enumerate(parts_BKRS):
            y_BKSH = jnp.einsum("BKRS,BKRH->BKSH", part_BKRS, x_BKPRH[:, :, p], preferred_element_type=jnp.float32)
            sums += jnp.pad(y_BKSH, ((0, 0), (0, 0), missing(part_BKRS), (0, 0)))
        return sums
    # one matmul with x^T laid out in memory, though half of what it reads are zeros: twice as fast in 16 bits
    all_BKRS = jnp.concatenate([jnp.pad(x, ((0, 0), (0, 0), (0, 0), missing(x))) for x in parts_BKRS], axis=2)
    x_BKHR = in_memory(x_BKPRH.reshape(*all_BKRS.shape[:3], -1).transpose(0, 1, 3, 2))
    y_BKHS = jnp.einsum("BKHR,BKRS->BKHS", x_BKHR, all_BKRS, preferred_element_type=jnp.float32)
    # laid out before it is transposed: else XLA makes both one matmul, for which it has no 16-bit kernel
    return in_memory(y_BKHS).transpose(0, 1, 3, 2)
