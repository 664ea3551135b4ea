"""The parts of a block: norms, attention with its projections, the feed-forward half, rotary positions, dropout."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from model import parametrization
from model.attention import attention
from model.attention_rule import TokenInfo
from model.config import ModelConfig, RopeScaling
from model.kv_cache import LayerCache
from model.normalise import normalise
from model.platforms import choices
from model.projection import Projection, param
from model.specs import Specs
from parallel.sharding import cast_and_gather, shard

ROPE_BLOCK = 4096  # tokens whose rotary angles are plain float32 products


class Norm(nnx.Module):
    """RMS or layer norm over the last dim, computed in float32; `kind` is the config's if it is not said."""

    def __init__(self, config: ModelConfig, specs: Specs, kind: str | None = None):
        self.kind, self.eps = kind or config.norm, config.norm_eps
        self.scale = param(specs["scale"])
        self.bias = param(specs["bias"]) if "bias" in specs else None

    @jax.named_scope("norm")
    def __call__(self, x: jax.Array) -> jax.Array:
        """Any (..., size) to the same shape and dtype."""
        scale, bias = (
            cast_and_gather(self.scale, jnp.float32),
            None if self.bias is None else cast_and_gather(self.bias, jnp.float32),
        )
        return normalise(x, scale, bias, self.kind, self.eps)


def times(x: jax.Array, multiplier: float) -> jax.Array:
    """x times a constant, in x's dtype."""
    return x if multiplier == 1 else x * jnp.asarray(multiplier, x.dtype)


def activate(kind: str, up: jax.Array, gate: jax.Array | None) -> jax.Array:
    """The hidden vector of a feed-forward block: `gate` is None where the kind has none."""
    return jax.checkpoint(partial(_activate, kind), prevent_cse=choices().recompute_apart)(up, gate)


def _activate(kind: str, up: jax.Array, gate: jax.Array | None) -> jax.Array:
    x = up.astype(jnp.float32)
    if gate is not None:
        gate = gate.astype(jnp.float32)
        y = x * (jax.nn.silu(gate) if kind == "swiglu" else jax.nn.gelu(gate))
    else:
        y = jax.nn.gelu(x) if kind == "gelu" else jnp.square(jax.nn.relu(x))
    return y.astype(up.dtype)


class Attention(nnx.Module):
    """Multi-head, grouped-query or multi-query attention over x_BTD."""

    def __init__(self, config: ModelConfig, specs: Specs):
        c = self.config = config
        # without anything after it, a key bias adds the same to all scores of a query, which softmax does not see: its
        # gradient is rounding noise, which an optimizer that normalises would follow, differently on every mesh
        idle_bias = c.positions != "rotary" and not c.qk_norm and not c.attention_softcap
        self.query = Projection(specs["query"], c.matmul_dtype)
        self.key = Projection(specs["key"], c.matmul_dtype, frozen_bias=idle_bias)
        self.value = Projection(specs["value"], c.matmul_dtype)
        self.out = Projection(specs["out"], c.matmul_dtype)
        self.query_norm = Norm(c, specs["query_norm"], "rms") if c.qk_norm else None
        self.key_norm = Norm(c, specs["key_norm"], "rms") if c.qk_norm else None

    def __call__(
        self, x_BTD: jax.Array, info: TokenInfo, window: jax.Array | None, cache: LayerCache | None = None
    ) -> tuple[jax.Array, LayerCache | None]:
        """y_BTD, and the cache with this call's keys and values written at their positions."""
        c = self.config
        q_BTNH = shard(self.query(x_BTD), "batch", "tokens", "heads", "head_dim")
        k_BSKH = shard(self.key(x_BTD), "batch", "tokens", "kv_heads", "head_dim")
        v_BSKH = shard(self.value(x_BTD), "batch", "tokens", "kv_heads", "head_dim")
        if c.qk_norm:
            q_BTNH, k_BSKH = self.query_norm(q_BTNH), self.key_norm(k_BSKH)
        if info.angles is not None:
            q_BTNH, k_BSKH = rotate(q_BTNH, info.angles), rotate(k_BSKH, info.angles)
        k_info = info
        if cache is not None:
            cache = cache.write(info.positions_BT, k_BSKH, v_BSKH)
            k_BSKH, v_BSKH = cache.k_BSKH.astype(x_BTD.dtype), cache.v_BSKH.astype(x_BTD.dtype)
            # slot s holds position s, and the causal mask hides slots that are not written yet
            k_info = TokenInfo(jnp.arange(k_BSKH.shape[1], dtype=jnp.int32)[None])
        out_BTNH = attention(
            q_BTNH, k_BSKH, v_BSKH, info, k_info,
            causal=c.causal, window=window, scale=parametrization.attention_scale(c), softcap=c.attention_softcap,
            windows=c.windows(), kernel=c.attention_kernel if cache is None else "plain",
        )  # fmt: skip
        return self.out(shard(out_BTNH, "batch", "tokens", "heads", "head_dim")), cache


class FeedForward(nnx.Module):
    """SwiGLU, GeGLU (three matrices), GELU or squared ReLU (two)."""

    def __init__(self, config: ModelConfig, specs: Specs):
        self.activation, dtype = config.activation, config.matmul_dtype
        self.gate = Projection(specs["gate"], dtype) if "gate" in specs else None
        self.up, self.down = Projection(specs["up"], dtype), Projection(specs["down"], dtype)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """x_BTD to y_BTD."""
        gate_BTF = None if self.gate is None else shard(self.gate(x_BTD), "batch", "tokens", "ffn")
        up_BTF = shard(self.up(x_BTD), "batch", "tokens", "ffn")
        return self.down(activate(self.activation, up_BTF, gate_BTF))


# -------------------------------------------------------------------------------------------------- rotary positions


def rope_frequencies(pairs, head_dim: int, theta: float, scaling: RopeScaling):
    """Radians a token of each pair of dims, and the factor for sines and cosines.

    `pairs` counts the pairs, 0 to H/2 - 1, as a float32 array of JAX or as float64 of NumPy; the radians are of its
    kind. Scalings: linear (arXiv 2306.15595); Llama 3 by wavelength (Llama 3.1 model card); YaRN (arXiv 2309.00071,
    equations 19-22).
    """
    half = head_dim // 2
    frequency = theta ** -(pairs / half)
    slowed, length = frequency / scaling.factor, scaling.original_length
    if scaling.kind == "linear":
        return slowed, 1.0
    if scaling.kind == "llama3":
        turns = length * frequency / (2 * math.pi)
        kept = (turns - scaling.low_frequency) / (scaling.high_frequency - scaling.low_frequency)
        kept = kept.clip(0, 1)
        return kept * frequency + (1 - kept) * slowed, 1.0
    if scaling.kind == "yarn":

        def pair_that_turns(times: float) -> float:
            return half * math.log(length / (times * 2 * math.pi)) / math.log(theta)

        first = max(math.floor(pair_that_turns(scaling.beta_fast)), 0)
        last = min(math.ceil(pair_that_turns(scaling.beta_slow)), head_dim - 1)
        ramp = ((pairs - first) / max(last - first, 1e-3)).clip(0, 1)
        return (1 - ramp) * frequency + ramp * slowed, 0.1 * math.log(scaling.factor) + 1
    return frequency, 1.0


@jax.named_scope("rope")
def rope_angles(config: ModelConfig, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, each (B, T, 1, H/2) float32, for token positions (B may be 1).

    A product of position and frequency has 24 bits, of which a large one leaves few to the fraction of a turn. A
    position therefore turns by its whole blocks first, in integers that wrap around as angles do.
    """
    rope = (config.head_dim, config.rope_theta, config.rope_scaling)
    half = config.head_dim // 2
    frequency, factor = rope_frequencies(jnp.arange(half, dtype=jnp.float32), *rope)
    positions = positions_BT[:, :, None, None]
    angles = (positions % ROPE_BLOCK).astype(jnp.float32) * frequency
    exact, _ = rope_frequencies(np.arange(half, dtype=np.float64), *rope)
    a_block = np.rint(exact * ROPE_BLOCK / (2 * np.pi) % 1 * 2**32).astype(np.uint64).astype(np.uint32)  # of a turn
    turned = jax.lax.bitcast_convert_type((positions // ROPE_BLOCK).astype(jnp.uint32) * a_block, jnp.int32)
    before = turned.astype(jnp.float32) * (2 * math.pi / 2**32)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    cos_before, sin_before = jnp.cos(before), jnp.sin(before)
    return (cos * cos_before - sin * sin_before) * factor, (sin * cos_before + cos * sin_before) * factor


@jax.named_scope("rope")
def rotate(x_BTNH: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns each pair (i, i + H/2) of dims of every head by the position's angle, in float32."""
    cos, sin = angles
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)


# ----------------------------------------------------------------------------------------------------------- dropout


@jax.named_scope("dropout")
def dropout(
    x_BTD: jax.Array, rate: float, keys_B: jax.Array | None, site: int | jax.Array, positions_BT: jax.Array
) -> jax.Array:
    """Zeroes a share `rate` of the entries and scales up the rest; the identity without keys.

    There is one key a sequence, so that a token's mask depends on the sequence, its position in it, the step and the
    site alone: not on the mesh, nor on the order of the tokens, nor on how the batch was cut into microbatches.
    """
    if keys_B is None or rate == 0:
        return x_BTD

    def keep(key, position):
        return jax.random.bernoulli(jax.random.fold_in(key, position), 1 - rate, x_BTD.shape[2:])

    keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, site)
    positions_BT = jnp.broadcast_to(positions_BT, x_BTD.shape[:2])
    mask_BTD = jax.vmap(jax.vmap(keep, (None, 0)))(keys_B, positions_BT)
    mask_BTD = shard(mask_BTD, "batch", "residual", "width")
    return jnp.where(mask_BTD, x_BTD / (1 - rate), 0).astype(x_BTD.dtype)
