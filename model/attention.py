"""The one attention function: who sees whom, and which kernel or exchange computes it."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from model import attention_kernels
from model.attention_kernels import Case
from model.attention_rule import Rule, TokenInfo, visible
from model.plain_attention import plain
from parallel.context import gather, ring, ulysses
from parallel.manual import per_device
from parallel.sharding import shard, splits

QUERY_CHUNK = 1024  # queries whose scores exist at once


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
    if style is None or splits("tokens") == 1:
        return _on_device(rule, kernel, case, q_BTNH, k_BSKH, q_info)(q_BTNH, k_BSKH, v_BSKH, q_info, k_info, window)
    if style == "ring":
        if kernel == "fused":
            raise ValueError("model.attention_kernel=fused: no kernel covers context.style=ring; use auto or ulysses")
        return ring(rule, q_BTNH, k_BSKH, v_BSKH, q_info, window)  # which names what a remat policy may keep

    def attend(q_BTNH, k_BSKH, v_BSKH, q_info, k_info, window):
        return _on_device(rule, kernel, case, q_BTNH, k_BSKH, q_info)(q_BTNH, k_BSKH, v_BSKH, q_info, k_info, window)

    across = {"ulysses": ulysses, "gather": gather}[style]
    return checkpoint_name(across(attend, q_BTNH, k_BSKH, v_BSKH, q_info, window), "attention")


def _on_device(rule: Rule, kernel: str, case: Case, q_BTNH, k_BSKH, q_info: TokenInfo) -> Callable:
    """What computes attention of such queries and keys, (q, k, v, q_info, k_info, window) -> out_BTNH: a fused kernel
    where one covers the case, or the plain form. Either names what a remat policy may keep."""
    fused = attention_kernels.choose(kernel, case, q_BTNH, k_BSKH, q_info.segments_BT)
    return partial(plain, rule, case) if fused is None else partial(_fused, fused)


def _fused(kernel: Callable, q_BTNH, k_BSKH, v_BSKH, q_info, k_info, window) -> jax.Array:
    segments_BT = q_info.segments_BT
    if segments_BT is not None:
        segments_BT = jnp.broadcast_to(segments_BT, q_BTNH.shape[:2])
    tokens, heads, kv_heads = ("batch", "tokens"), ("heads", "head_dim"), ("kv_heads", "head_dim")
    dims = ((*tokens, *heads), (*tokens, *kv_heads), (*tokens, *kv_heads), tokens, ())
    return per_device(kernel, dims, q_BTNH, k_BSKH, v_BSKH, segments_BT, window)
