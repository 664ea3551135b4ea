"""Norms, the feed-forward block, rotary positions, dropout."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from model import low_precision, parametrization
from model.config import GATED, ModelConfig, RopeScaling
from model.matmul import project
from parallel.sharding import param, shard, use


class Norm(nnx.Module):
    """RMS or layer norm over the last dim, computed in float32.

    `dim` names that dim ("norm" for model width, "head_dim" for a head) and `size` is its size.
    """

    def __init__(self, config: ModelConfig, key: jax.Array, size: int, *, dim: str = "norm", kind: str | None = None):
        self.kind, self.eps = kind or config.norm, config.norm_eps
        self.scale = param(key, (size,), (dim,), parametrization.ones)
        biased = self.kind == "layer" and config.bias == "all"
        self.bias = param(key, (size,), (dim,), parametrization.zeros) if biased else None

    @jax.named_scope("norm")
    def __call__(self, x: jax.Array) -> jax.Array:
        """Any (..., size) to the same shape and dtype."""
        scale, bias = use(self.scale, jnp.float32), None if self.bias is None else use(self.bias, jnp.float32)
        return jax.checkpoint(self._normalised, prevent_cse=False)(x, scale, bias)

    def _normalised(self, x, scale, bias):
        y = x.astype(jnp.float32)
        if self.kind == "layer":
            y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        y = y * scale
        if bias is not None:
            y = y + bias
        return y.astype(x.dtype)


def linear(x: jax.Array, matrix: jax.Array, matmul_dtype: str) -> jax.Array:
    """x (B, T, ...in) times matrix (...in, ...out): (B, T, ...out) in x's dtype; `matmul_dtype` as in ModelConfig."""
    return low_precision.dot(x, matrix) if matmul_dtype == "float8" else project(x, matrix)


def add(y: jax.Array, bias: nnx.Param) -> jax.Array:
    """y + bias in y's dtype. The bias's gradient is a sum over all tokens, which is wanted in float32."""
    return (y + use(bias, jnp.float32)).astype(y.dtype)


def activate(kind: str, up: jax.Array, gate: jax.Array | None) -> jax.Array:
    """The hidden vector of a feed-forward block: `gate` is None where the kind has none."""
    return jax.checkpoint(partial(_activate, kind), prevent_cse=False)(up, gate)


def _activate(kind: str, up: jax.Array, gate: jax.Array | None) -> jax.Array:
    x = up.astype(jnp.float32)
    if gate is not None:
        gate = gate.astype(jnp.float32)
        y = x * (jax.nn.silu(gate) if kind == "swiglu" else jax.nn.gelu(gate))
    else:
        y = jax.nn.gelu(x) if kind == "gelu" else jnp.square(jax.nn.relu(x))
    return y.astype(up.dtype)


class FeedForward(nnx.Module):
    """SwiGLU, GeGLU (three matrices), GELU or squared ReLU (two)."""

    def __init__(self, config: ModelConfig, key: jax.Array):
        gate, up, down = jax.random.split(key, 3)
        d, f = config.width, config.ffn
        self.activation, self.matmul_dtype = config.activation, config.matmul_dtype
        into, out = parametrization.matrix(config, d), parametrization.matrix(config, f, residual=True)
        self.gate = param(gate, (d, f), ("width", "ffn"), into, inputs=1) if config.activation in GATED else None
        self.up = param(up, (d, f), ("width", "ffn"), into, inputs=1)
        self.down = param(down, (f, d), ("ffn", "width"), out, inputs=1)
        biased, zeros = config.bias == "all", parametrization.zeros
        self.gate_bias = param(key, (f,), ("ffn",), zeros) if biased and self.gate is not None else None
        self.up_bias = param(key, (f,), ("ffn",), zeros) if biased else None
        self.down_bias = param(key, (d,), ("norm",), zeros) if biased else None

    def _project(self, x_BTD: jax.Array, matrix: nnx.Param, bias: nnx.Param | None) -> jax.Array:
        y_BTF = linear(x_BTD, use(matrix, x_BTD.dtype), self.matmul_dtype)
        if bias is not None:
            y_BTF = add(y_BTF, bias)
        return shard(y_BTF, "batch", "tokens", "ffn")

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """x_BTD to y_BTD."""
        gate_BTF = None if self.gate is None else self._project(x_BTD, self.gate, self.gate_bias)
        h_BTF = activate(self.activation, self._project(x_BTD, self.up, self.up_bias), gate_BTF)
        y_BTD = linear(h_BTF, use(self.down, x_BTD.dtype), self.matmul_dtype)
        return y_BTD if self.down_bias is None else add(y_BTD, self.down_bias)


# -------------------------------------------------------------------------------------------------- rotary positions


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling) -> tuple[jax.Array, float]:
    """Radians a token of each pair of dims, (H/2,) float32, and the factor for sines and cosines.

    Scalings: linear (arXiv 2306.15595); Llama 3 by wavelength (Llama 3.1 model card); YaRN (arXiv 2309.00071,
    equations 19-22).
    """
    half = head_dim // 2
    frequency = theta ** -(jnp.arange(half, dtype=jnp.float32) / half)
    slowed, length = frequency / scaling.factor, scaling.original_length
    if scaling.kind == "linear":
        return slowed, 1.0
    if scaling.kind == "llama3":
        turns = length * frequency / (2 * math.pi)
        kept = (turns - scaling.low_frequency) / (scaling.high_frequency - scaling.low_frequency)
        kept = jnp.clip(kept, 0, 1)
        return kept * frequency + (1 - kept) * slowed, 1.0
    if scaling.kind == "yarn":

        def pair_that_turns(times: float) -> float:
            return half * math.log(length / (times * 2 * math.pi)) / math.log(theta)

        first = max(math.floor(pair_that_turns(scaling.beta_fast)), 0)
        last = min(math.ceil(pair_that_turns(scaling.beta_slow)), head_dim - 1)
        ramp = jnp.clip((jnp.arange(half) - first) / max(last - first, 1e-3), 0, 1)
        return (1 - ramp) * frequency + ramp * slowed, 0.1 * math.log(scaling.factor) + 1
    return frequency, 1.0


@jax.named_scope("rope")
def rope_angles(config: ModelConfig, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, each (B, T, 1, H/2) float32, for token positions (B may be 1)."""
    frequency, factor = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    angles = positions_BT.astype(jnp.float32)[:, :, None, None] * frequency
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


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
