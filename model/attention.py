"""The one attention function: who sees whom, and which kernel or exchange computes it."""

from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from model import attention_kernels
from model.attention_kernels import Case
from model.plain_attention import plain
from parallel.context import Rule, gather, ring, ulysses
from parallel.manual import per_device
from parallel.sharding import shard, splits

QUERY_CHUNK = 1024  # queries whose scores exist at once


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenInfo:
    """What every layer knows of the tokens besides their vectors."""

    positions_BT: jax.Array  # int32; B may be 1
    segments_BT: jax.Array | None = None  # int32 document of each token: attention stays inside it
    angles: tuple[jax.Array, jax.Array] | None = None  # of rotary positions
    dropout_keys_B: jax.Array | None = None
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


@jax.named_scope("core")
def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    q_info: TokenInfo,
    k_info: TokenInfo,
    *,
    causal: bool,
    window: jax.Array | None,
    scale: float,
    softcap: float = 0.0,
    windows: tuple[int, ...] | None = None,
    kernel: str = "auto",
) -> jax.Array:
    """Softmax attention with grouped heads; returns (B, T, N, H). Scores and softmax are float32.

    `windows` are the values that `window` may take, if that is known; fused kernels need it. `kernel` is one of
    model.config.ATTENTION_KERNELS; raises the ValueErrors of `choose`.

    Where tokens are split over the context axis, it is crossed in the style of `k_info`, and queries and keys must be
    those of the same tokens; without a style, as for a cache, the compiler gathers as it sees fit.
    """
    N, style = q_BTNH.shape[2], k_info.context_style
    if k_BSKH.shape[2] % splits("kv_heads"):  # fewer kv heads than tensor shards: a copy for each query head
        k_BSKH, v_BSKH = (jnp.repeat(x, N // x.shape[2], axis=2) for x in (k_BSKH, v_BSKH))
        k_BSKH, v_BSKH = (shard(x, "batch", "tokens", "heads", "head_dim") for x in (k_BSKH, v_BSKH))
    in_order = q_info.in_order and k_info.in_order and (window is None or windows is not None)
    case = Case(causal, (0,) if window is None else windows or (), scale, softcap, in_order)
    q_info, k_info = (TokenInfo(i.positions_BT, i.segments_BT) for i in (q_info, k_info))  # what `visible` reads
    rule = Rule(partial(visible, causal=causal), scale, softcap, QUERY_CHUNK)
    attend = partial(_attend, rule, kernel, case)
    if style is None or splits("tokens") == 1:
        return attend(q_BTNH, k_BSKH, v_BSKH, q_info, k_info, window)
    if style == "ring":
        if kernel == "fused":
            raise ValueError("model.attention_kernel=fused: no kernel covers context.style=ring; use auto or ulysses")
        return ring(rule, q_BTNH, k_BSKH, v_BSKH, q_info, window)  # which names what a remat policy may keep
    across = {"ulysses": ulysses, "gather": gather}[style]
    return checkpoint_name(across(attend, q_BTNH, k_BSKH, v_BSKH, q_info, window), "attention")


def _attend(rule: Rule, kernel: str, case: Case, q_BTNH, k_BSKH, v_BSKH, q_info, k_info, window) -> jax.Array:
    """Attention by a fused kernel, which names what a remat policy may keep, where one covers the case, or plain."""
    segments_BT = q_info.segments_BT
    fused = attention_kernels.choose(kernel, case, q_BTNH, k_BSKH, segments_BT)
    if fused is None:
        return checkpoint_name(plain(rule, case, q_BTNH, k_BSKH, v_BSKH, q_info, k_info, window), "attention")
    if segments_BT is not None:
        segments_BT = jnp.broadcast_to(segments_BT, q_BTNH.shape[:2])
    tokens, heads, kv_heads = ("batch", "tokens"), ("heads", "head_dim"), ("kv_heads", "head_dim")
    dims = ((*tokens, *heads), (*tokens, *kv_heads), (*tokens, *kv_heads), tokens, ())
    return per_device(fused, dims, q_BTNH, k_BSKH, v_BSKH, segments_BT, window)
