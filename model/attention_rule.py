"""Which keys a query sees, and with what weight: mask, window, documents, soft-cap and softmax in one place.

Whole sequences go through model/plain_attention.py; where a sequence is split over devices, parallel/context.py brings
keys and values by, tile by tile, and an online softmax (arXiv 2205.14135) adds them up. Kernels of accelerators
(model/attention_kernels.py) have their own form of the same.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

MASKED = -1e30  # finite: a row's maximum must not be -inf - -inf


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenInfo:
    """What every layer knows of the tokens besides their vectors."""

    positions_BT: jax.Array  # int32 order of the tokens in their row; B may be 1
    segments_BT: jax.Array | None = None  # int32 document of each token: attention stays inside it
    places_BT: jax.Array | None = None  # int32 place of each token in its document: what positions embed
    angles: tuple[jax.Array, jax.Array] | None = None  # of rotary positions
    local_angles: tuple[jax.Array, jax.Array] | None = None  # of local layers, where theirs are others
    types_BT: jax.Array | None = None  # int32 kind of each token, of a model that knows kinds
    dropout_keys_B: jax.Array | None = None
    mask_BT: jax.Array | None = None  # float32: 1 where a token counts in the loss, 0 where not; None: all count
    counted_B: jax.Array | None = None  # tokens of each sequence that count
    context_style: str | None = field(default=None, metadata={"static": True})  # None: as the compiler likes
    in_order: bool = field(default=False, metadata={"static": True})  # a document's tokens follow one another


def visible(q: TokenInfo, k: TokenInfo, window: jax.Array | None, *, causal: bool) -> jax.Array:
    """Which key each query sees: bool (B, T, S), B may be 1.

    `window` is an int32 scalar, the number of newest tokens that a query sees (0: all), or None.
    """
    distance_BTS = q.positions_BT[:, :, None] - k.positions_BT[:, None, :]
    seen_BTS = distance_BTS >= 0 if causal else jnp.ones_like(distance_BTS, bool)
    if window is not None:
        seen_BTS &= (jnp.abs(distance_BTS) < window) | (window == 0)
    if q.segments_BT is not None and k.segments_BT is not None:
        seen_BTS &= q.segments_BT[:, :, None] == k.segments_BT[:, None, :]
    return seen_BTS


@dataclass(frozen=True)
class Rule:
    """What makes weights of queries and keys; static."""

    visible: Callable[[Any, Any, jax.Array | None], jax.Array]  # (query marks, key marks, window) -> bool (B, T, S)
    scale: float
    softcap: float  # c * tanh(scores / c); 0 off
    query_chunk: int  # queries whose scores exist at once, at most
    lowest: ClassVar[float] = MASKED

    def scores(self, q_BTKGH: jax.Array, k_BSKH: jax.Array) -> jax.Array:
        """Float32 scores (B, K, G, T, S) before the soft-cap and the mask."""
        return self.scale * jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)

    def cap(self, scores: jax.Array) -> jax.Array:
        """The scores after the soft-cap, c tanh(scores / c), if there is one (Gemma 2, arXiv 2408.00118, section 2)."""
        return self.softcap * jnp.tanh(scores / self.softcap) if self.softcap else scores

    def uncap(self, scores: jax.Array, dcapped: jax.Array) -> jax.Array:
        """The gradient of the scores, from that of the scores after the soft-cap."""
        return jax.vjp(self.cap, scores)[1](dcapped)[0] if self.softcap else dcapped

    def meet(self, window, state, q_BTKGH, q_marks, k_BSKH, v_BSKH, k_marks):
        """The online softmax after one tile more; its state is sums of weighted values, maxima, sums of weights."""
        seen_BTS = self.visible(q_marks, k_marks, window)

        def tile():
            out_BKGTH, top_BKGT, total_BKGT = state
            seen = seen_BTS[:, None, None]
            scores = jnp.where(seen, self.cap(self.scores(q_BTKGH, k_BSKH)), MASKED)
            higher_BKGT = jnp.maximum(top_BKGT, scores.max(-1))
            kept_BKGT = jnp.exp(top_BKGT - higher_BKGT)
            # masked again: where a row has seen nothing yet, its maximum is MASKED too
            weights = jnp.where(seen, jnp.exp(scores - higher_BKGT[..., None]), 0)
            values_BKGTH = jnp.einsum(
                "BKGTS,BSKH->BKGTH", weights.astype(v_BSKH.dtype), v_BSKH, preferred_element_type=jnp.float32
            )
            out_BKGTH = out_BKGTH * kept_BKGT[..., None] + values_BKGTH
            return out_BKGTH, higher_BKGT, total_BKGT * kept_BKGT + weights.sum(-1)

        return jax.lax.cond(seen_BTS.any(), tile, lambda: state)

    def differentiate(
        self, window, dq_BTKGH, dkv_BSKH, q_BTKGH, dout_BTKGH, log_BTKG, delta_BTKG, q_marks, k_BSKH, v_BSKH, k_marks
    ):
        """dq, and (dk, dv), after one tile more, whose weights are computed again from the logarithm of their sum."""
        seen_BTS = self.visible(q_marks, k_marks, window)

        def tile():
            dk_BSKH, dv_BSKH = dkv_BSKH
            product = partial(jnp.einsum, preferred_element_type=jnp.float32)
            raw = self.scores(q_BTKGH, k_BSKH)
            weights = jnp.where(seen_BTS[:, None, None], jnp.exp(self.cap(raw) - _rows(log_BTKG)[..., None]), 0)
            dscores = weights * (product("BTKGH,BSKH->BKGTS", dout_BTKGH, v_BSKH) - _rows(delta_BTKG)[..., None])
            dscores = (self.uncap(raw, dscores) * self.scale).astype(q_BTKGH.dtype)
            dk_BSKH = dk_BSKH + product("BKGTS,BTKGH->BSKH", dscores, q_BTKGH)
            dv_BSKH = dv_BSKH + product("BKGTS,BTKGH->BSKH", weights.astype(dout_BTKGH.dtype), dout_BTKGH)
            return dq_BTKGH + product("BKGTS,BSKH->BTKGH", dscores, k_BSKH), (dk_BSKH, dv_BSKH)

        return jax.lax.cond(seen_BTS.any(), tile, lambda: (dq_BTKGH, dkv_BSKH))


def _rows(x_BTKG: jax.Array) -> jax.Array:
    return jnp.moveaxis(x_BTKG, 1, 3)
