"""Attention by matmuls, some queries at a time: what runs where no fused kernel does.

Dims beside those of docs: P parts of the queries, R rows of a part, which are its queries for each head of a group.
"""

from functools import partial

import jax
import jax.numpy as jnp

from model.attention_kernels import Case
from model.matmul import in_memory
from parallel.context import MASKED, Rule
from parallel.manual import alike

SMALLEST_PART = 128  # queries that are given keys of their own


def plain(rule: Rule, case: Case, q_BTNH, k_BSKH, v_BSKH, q_info, k_info, window) -> jax.Array:
    """Attention (B, T, N, H) by `rule`, of queries and keys with their marks (model.attention.TokenInfo).

    Where queries and keys are the same tokens in order, each part of the queries is given no keys after its own. Long
    sequences go through part by part, recomputed in the backward pass, so that the scores of all queries never exist at
    once.
    """
    (B, T, _, H), (S, K), G = q_BTNH.shape, k_BSKH.shape[1:3], q_BTNH.shape[2] // k_BSKH.shape[2]
    in_turn = rule.query_chunk * 2 < T and T % rule.query_chunk == 0
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

    def attend(q_BKPRH: jax.Array, q_marks, ends: tuple[int, ...]) -> jax.Array:
        return _attend(rule, ends, q_BKPRH, k_BKSH, v_BKSH, q_marks, k_info, window)

    if in_turn:
        cut = lambda axis: lambda x: jnp.moveaxis(jnp.expand_dims(x, axis), axis + 1, 0)  # one part an entry
        one = jax.checkpoint(lambda part: attend(*part, (S,)))
        out = jax.lax.map(one, (cut(2)(q_BKPRH), jax.tree.map(cut(1), q_marks)))
        out_BKPRH = jnp.moveaxis(out, 0, 3).squeeze(2)
    else:
        out_BKPRH = attend(q_BKPRH, q_marks, tuple((p + 1) * S // P for p in range(P)))
    out_BPTKGH = out_BKPRH.reshape(B, K, P, G, T // P, H).transpose(0, 2, 4, 1, 3, 5)
    return out_BPTKGH.reshape(q_BTNH.shape)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(rule: Rule, ends: tuple[int, ...], q_BKPRH, k_BKSH, v_BKSH, q_marks, k_marks, window) -> jax.Array:
    """out_BKPRH; each part sees the keys before its end."""
    return _attend_forward(rule, ends, q_BKPRH, k_BKSH, v_BKSH, q_marks, k_marks, window)[0]


def _attend_forward(rule, ends, q_BKPRH, k_BKSH, v_BKSH, q_marks, k_marks, window):
    outs, kept = [], []
    for p, end in enumerate(ends):
        scores = rule.capped(_score(q_BKPRH[:, :, p], k_BKSH[:, :, :end]))
        marks = _at(q_marks, p), _at(k_marks, slice(end))
        seen_BTS = rule.visible(*marks, window)
        seen_BRS = jnp.tile(seen_BTS, (1, scores.shape[2] // seen_BTS.shape[1], 1))
        weights = jax.nn.softmax(jnp.where(seen_BRS[:, None], scores, MASKED))
        outs.append(_weigh(weights.astype(v_BKSH.dtype), v_BKSH[:, :, :end]))
        kept.append(weights)
    return jnp.stack(outs, axis=2).astype(q_BKPRH.dtype), (q_BKPRH, k_BKSH, v_BKSH, kept)


def _attend_backward(rule, ends, residuals, dout_BKPRH):
    q_BKPRH, k_BKSH, v_BKSH, kept = residuals
    dtype, S = q_BKPRH.dtype, k_BKSH.shape[2]
    dqs, all_dscores, all_weights = [], [], []
    for p, (end, weights) in enumerate(zip(ends, kept, strict=True)):
        weighted = weights * _score(dout_BKPRH[:, :, p], v_BKSH[:, :, :end])
        dcapped = weighted - weights * weighted.sum(-1, keepdims=True)
        # the scores are computed again if there is a soft-cap: nothing else reads them
        uncap = jax.vjp(rule.cap, rule.scale * _score(q_BKPRH[:, :, p], k_BKSH[:, :, :end]))[1]
        dscores = uncap(dcapped)[0].astype(dtype)
        dqs.append(rule.scale * _weigh(dscores, k_BKSH[:, :, :end]))
        rest = ((0, 0),) * 3 + ((0, S - end),)
        all_dscores.append(jnp.pad(dscores, rest))
        all_weights.append(jnp.pad(weights.astype(dtype), rest))
    dq_BKPRH = jnp.stack(dqs, axis=2).astype(dtype)
    dk_BKSH = _over_rows(all_dscores, q_BKPRH, rule.scale)
    return dq_BKPRH, dk_BKSH, _over_rows(all_weights, dout_BKPRH), None, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _at(marks, tokens: int | slice):
    return jax.tree.map(lambda x: x[:, tokens], marks)


def _score(q_BKRH: jax.Array, k_BKSH: jax.Array) -> jax.Array:
    return jnp.einsum("BKRH,BKSH->BKRS", q_BKRH, k_BKSH, preferred_element_type=jnp.float32)


def _weigh(weights_BKRS: jax.Array, v_BKSH: jax.Array) -> jax.Array:
    return jnp.einsum("BKRS,BKSH->BKRH", weights_BKRS, v_BKSH, preferred_element_type=jnp.float32)


def _over_rows(parts_BKRS: list[jax.Array], x_BKPRH: jax.Array, scale: float = 1.0) -> jax.Array:
    """The transpose of all parts below one another, times x and `scale`: (B, K, S, H).

    One matmul, though half of its first argument may be zeros: adding parts of the result in memory takes longer.
    """
    weights_BKRS = jnp.concatenate(parts_BKRS, axis=2)
    x_BKHR = in_memory(x_BKPRH.reshape(*weights_BKRS.shape[:3], -1).transpose(0, 1, 3, 2))
    y_BKHS = jnp.einsum("BKHR,BKRS->BKHS", x_BKHR, weights_BKRS, preferred_element_type=jnp.float32)
    return in_memory((scale * y_BKHS).astype(x_BKPRH.dtype)).transpose(0, 1, 3, 2)
