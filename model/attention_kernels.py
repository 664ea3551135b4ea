"""Fused attention kernels of accelerators, forward and backward, that never have scores (T, S) in memory.

On TPUs splash attention (Pallas, ships with JAX) covers every mask of the model; on GPUs cuDNN's flash attention does
what is one document, and a Triton kernel (Pallas, ships with JAX) packed documents. What a kernel does not cover is
left to model/plain_attention.py. A window must be static to them: since layers that are scanned are one program, a
layer chooses between its model's two windows when it runs. They are imported where they are used: it takes a second
that a CPU need not spend.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import jax
import jax.numpy as jnp

from runtime.platform import platform

log = logging.getLogger("isomesh.model")

LANES = 128  # of a TPU's vector registers; also the tile of the Triton kernel
SPLASH_BLOCK = 512  # queries, and keys, of a tile: at most
CUDNN = "dot_product_attention_fwd_wrapper"  # as a jaxpr has it
INTERPRET = False  # for tests: Pallas kernels without their hardware


@dataclass(frozen=True)
class Case:
    """What is static of an attention: kernels are compiled for it."""

    causal: bool
    windows: tuple[int, ...]  # that layers of this program may have; 0: all tokens
    scale: float
    softcap: float  # 0: off
    in_order: bool  # query and key t are the same token, and within a document each token follows the one before


def choose(choice: str, case: Case, q_BTNH: jax.Array, k_BSKH: jax.Array, segments_BT) -> Callable | None:
    """The kernel (q_BTNH, k_BSKH, v_BSKH, segments_BT, window) -> out_BTNH of one device; None for the plain form.

    `choice` is one of model.config.ATTENTION_KERNELS. Raises ValueError if `fused` is asked for and no kernel covers
    the case.
    """
    on = platform()
    if choice == "plain" or (choice == "auto" and on not in ("gpu", "tpu")):
        return None
    T, S, H = q_BTNH.shape[1], k_BSKH.shape[1], q_BTNH.shape[3]
    kernel, obstacles = None, {f"{T} queries with {S} keys": T != S, "tokens with positions": not case.in_order}
    if on == "tpu":
        kernel = _splash
        obstacles |= {f"{T} tokens, not a multiple of {LANES}": T % LANES, "float64": q_BTNH.dtype.itemsize > 4}
    elif on == "gpu":
        kernel = _cudnn if segments_BT is None else _triton
        obstacles |= {
            f"{q_BTNH.dtype}, not bfloat16 or float16": q_BTNH.dtype not in (jnp.bfloat16, jnp.float16),
            f"heads of {H}, not a multiple of 8 up to 128": H % 8 or H > 128,
            "a soft-cap": case.softcap,
            "windows that look ahead": _windows(case, T) != (0,) and not case.causal,
        }
        if segments_BT is not None:
            obstacles |= {
                "packed documents with windows": _windows(case, T) != (0,),
                f"packed documents and {T} tokens, not a multiple of {LANES}": T % LANES,
            }
    else:
        obstacles = {f"the platform {on}": True}
    found = [name for name, there in obstacles.items() if there]
    if found and choice == "fused":
        raise ValueError(f"model.attention_kernel=fused: no kernel covers {found[0]}; use auto or plain")
    if found and T == S and case.in_order:  # else it is generation, which no kernel is made for
        _tell_plain(on, found[0])
    return None if found else partial(_by_window, kernel, case)


def is_kernel(primitive, *_, **__) -> bool:
    """A remat policy that keeps what cuDNN's forward kernel returns: the backward kernel reads its softmax sums, which
    have no name.
    """
    return primitive.name == CUDNN


@cache  # once, however often a program is traced
def _tell_plain(on: str, reason: str) -> None:
    log.warning("attention has its plain form on this %s, with all scores in memory: no kernel covers %s", on, reason)


def _windows(case: Case, T: int) -> tuple[int, ...]:
    """The different windows, without those that all T tokens fit in."""
    return tuple(sorted({window if window < T else 0 for window in case.windows}))


def _by_window(kernel: Callable, case: Case, q_BTNH, k_BSKH, v_BSKH, segments_BT, window) -> jax.Array:
    options = _windows(case, q_BTNH.shape[1])
    run = [partial(kernel, case, static) for static in options]
    if len(options) == 1:
        return run[0](q_BTNH, k_BSKH, v_BSKH, segments_BT)
    whole, local = run  # one window, besides none
    return jax.lax.cond(window == options[1], local, whole, q_BTNH, k_BSKH, v_BSKH, segments_BT)


# ---------------------------------------------------------------------------------------------------------- the kernels


def _splash(case: Case, window: int, q_BTNH, k_BSKH, v_BSKH, segments_BT) -> jax.Array:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    T, N = q_BTNH.shape[1:3]
    back, ahead = (window - 1 if window else None), (0 if case.causal else window - 1 if window else None)
    if window:
        mask = splash.LocalMask((T, T), (back, ahead), 0)
    else:
        mask = splash.CausalMask((T, T)) if case.causal else splash.FullMask((T, T))
    size = next(n for n in range(SPLASH_BLOCK, 0, -LANES) if T % n == 0)
    blocks = splash.BlockSizes(
        **dict.fromkeys(("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"), size)
    )
    attend = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * N),
        block_sizes=blocks,
        attn_logits_soft_cap=case.softcap or None,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name="attention",  # what a remat policy may keep
        interpret=INTERPRET,
    )
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q_BTNH * jnp.asarray(case.scale, q_BTNH.dtype), k_BSKH, v_BSKH))
    documents = None if segments_BT is None else splash.SegmentIds(segments_BT, segments_BT)
    return jnp.swapaxes(jax.vmap(attend)(q, k, v, documents), 1, 2)


def _cudnn(case: Case, window: int, q_BTNH, k_BSKH, v_BSKH, segments_BT) -> jax.Array:
    return jax.nn.dot_product_attention(
        *(q_BTNH, k_BSKH, v_BSKH),
        scale=case.scale,
        is_causal=case.causal,
        local_window_size=(window - 1, 0) if window else None,
        implementation="cudnn",
    )


def _triton(case: Case, window: int, q_BTNH, k_BSKH, v_BSKH, segments_BT) -> jax.Array:
    from jax.experimental.pallas.ops.gpu import attention as triton

    k, v = (jnp.repeat(x, q_BTNH.shape[2] // x.shape[2], axis=2) for x in (k_BSKH, v_BSKH))
    return triton.mha(q_BTNH, k, v, segments_BT, sm_scale=case.scale, causal=case.causal, interpret=INTERPRET)
