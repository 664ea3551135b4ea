"""What a training token costs: the FLOPs that the model needs, and those that are computed again to save memory."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from model import attention_kernels
from model.attention import QUERY_CHUNK
from model.config import GATED, ModelConfig
from model.counts import active_size, flops_per_token, keys_seen
from model.heads import vocabulary_parts
from model.specs import Specs, leaves, parameter_specs
from runtime.platform import platform
from training.config import TrainConfig


@dataclass(frozen=True)
class Flops:
    """FLOPs of forward and backward for one token; the numerators of perf/mfu, perf/mfu_full_attention and perf/hfu."""

    model: float  # attention as the mask has it
    full_attention: float  # as if each token saw all others, as PaLM and nanoGPT count
    hardware: float  # those of `model`, and what the backward pass computes again


def count_flops(
    model: ModelConfig,
    train: TrainConfig,
    mesh: jax.sharding.Mesh,
    context_style: str,
    *,
    packed: bool,
    specs: Specs | None = None,
    trained: Callable[[str], bool] | None = None,
) -> Flops:
    """The FLOPs of a token in training on `mesh`, which must be in context: kernels depend on its platform.

    context_style: how attention crosses the context axis, if that is not 1. packed: documents are kept apart. trained:
    whether a parameter, by its '/'-joined names in `specs`, is; None: all are.
    By arithmetic, because XLA's own count takes the body of a loop once, however often it runs, and so misses most of
    scanned layers, of accumulated gradients and of pipelines.
    """
    more = 0.0 if trained is None else _of_a_choice(model, specs, trained)
    needed = flops_per_token(model, train.seq_len) + more
    scores = 2 * model.heads * model.head_dim * keys_seen(model, train.seq_len)  # of all layers; as much as the values
    again = 2 * model.layers * _weights_again(model, train.remat)
    across = context_style if mesh.shape["context"] > 1 else None
    again += scores * _attention_again(model, train, packed, across)
    if vocabulary_parts(train.loss_chunk, train.seq_len) > 1:
        again += 2 * model.vocab_size * model.width  # the logits
    return Flops(needed, flops_per_token(model, train.seq_len, full_attention=True) + more, needed + again)


def _of_a_choice(model: ModelConfig, specs: Specs, trained: Callable[[str], bool]) -> float:
    """How many FLOPs more a token costs where some parameters alone are trained: no gradients of the others' matrices,
    and the matrices of adapters, which the model does not count.
    """
    found, plain = 0.0, parameter_specs(model)
    own = {"/".join(path): spec for path, spec in leaves(plain)}
    found -= 2.0 * sum(active_size(model, spec) for name, spec in own.items() if spec.is_matrix and not trained(name))
    table = "tokens/weight" if model.tied_embeddings else "head/weight"
    found -= 0.0 if trained(table) else 2.0 * model.vocab_size * model.width
    beside = {"/".join(path): spec for path, spec in leaves(specs) if spec.is_matrix}
    return found + 6.0 * sum(active_size(model, spec) for name, spec in beside.items() if name not in own)


def _weights_again(model: ModelConfig, remat: str) -> int:
    """How many parameters of a layer multiply a token once more in the backward pass."""
    c, gated = model, model.activation in GATED
    into = (2 if gated else 1) * c.width * c.ffn
    # What ends a residual branch is computed again only if something reads its output: a norm, or the weights with
    # which the outputs of several experts are mixed.
    normed = c.norm_position != "pre"
    down = c.width * c.ffn * normed
    mixed = c.width * c.ffn * (normed or c.experts_per_token > 1 or not c.router_normalize)
    routed = c.experts_per_token * (into + mixed)
    if remat == "none":
        return 0
    if remat == "dots":  # the policy keeps products with one matrix, not those with a stack of them
        return routed if c.experts else 0
    attention = c.width * c.head_dim * (2 * c.heads + 2 * c.kv_heads)
    if c.experts:
        return attention + c.experts * c.width + routed + c.shared_experts * (into + down)
    return attention + into + down


def _attention_again(model: ModelConfig, train: TrainConfig, packed: bool, context_style: str | None) -> int:
    """How many of attention's two matmuls, scores and values, are done once more in the backward pass; both may be
    twice.
    """
    fused = _fused(model, train, packed) and context_style != "ring"
    chunked = train.seq_len > 2 * QUERY_CHUNK and train.seq_len % QUERY_CHUNK == 0
    # without remat: all but the plain form compute the scores again, rather than keep them
    inside = 1 if fused or chunked or context_style else 0
    if train.remat == "none" and not inside and model.attention_softcap and model.scan_layers:
        return 1  # weights, which layers keep, do not tell its gradient; XLA merges what else computes scores again
    if fused and context_style:  # what goes through an all-to-all or a gather runs its forward pass again
        inside += 2
    if train.remat == "none":
        return inside
    if train.remat == "full":
        return inside + 2
    gpu = platform() == "gpu"
    if fused and not context_style and gpu:  # cuDNN's results are kept by both policies, not those of packed documents
        return inside + (2 if packed else 0)
    if train.remat == "dots":
        return inside + 2
    # remat=attention: the result is kept, but not the plain form's weights
    return inside if fused and not context_style else max(inside, 1)


def _fused(model: ModelConfig, train: TrainConfig, packed: bool) -> bool:
    """Whether attention runs in a fused kernel."""
    shape = (1, train.seq_len, model.heads, model.head_dim)
    q_BTNH = jax.ShapeDtypeStruct(shape, jnp.dtype(train.compute_dtype_on(platform())))
    segments_BT = jax.ShapeDtypeStruct(shape[:2], jnp.int32) if packed else None
    scale = model.head_dim**-0.5
    case = attention_kernels.Case(model.causal, model.windows(), scale, model.attention_softcap, in_order=True)
    return attention_kernels.choose(model.attention_kernel, case, q_BTNH, q_BTNH, segments_BT) is not None
