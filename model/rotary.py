"""Rotary positions (arXiv 2104.09864): how far each pair of a head's dims turns at a position."""

import math
import sys

import jax
import jax.numpy as jnp
import numpy as np

from model.attention_rule import TokenInfo
from model.config import ModelConfig, RopeScaling
from model.platforms import choices

ROPE_BLOCK = 4096  # tokens whose rotary angles are plain float32 products


def rope_frequencies(pairs, rotary_dims: int, theta: float, scaling: RopeScaling, *, long: bool = False):
    """Radians a token of each pair of dims, and the factor for sines and cosines.

    `pairs` counts the pairs, from 0, as a float32 array of JAX or as float64 of NumPy; the radians are of its kind.
    Scalings: linear (arXiv 2306.15595); Llama 3 by wavelength (Llama 3.1 model card); YaRN (arXiv 2309.00071,
    equations 19-22); LongRoPE (arXiv 2402.13753), which has other factors for `long` sequences.
    """
    half = rotary_dims // 2
    frequency = theta ** -(pairs / half)
    if scaling.kind == "longrope":
        factors = np.asarray(scaling.long_factors if long else scaling.short_factors, pairs.dtype)
        longer = math.log(scaling.factor) / math.log(scaling.original_length)
        return frequency / factors, scaling.attention_factor or math.sqrt(1 + longer)
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
        last = min(math.ceil(pair_that_turns(scaling.beta_slow)), rotary_dims - 1)
        ramp = ((pairs - first) / max(last - first, 1e-3)).clip(0, 1)
        factor = scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1
        return (1 - ramp) * frequency + ramp * slowed, factor
    return frequency, 1.0


def alike_up_to(config: ModelConfig) -> int:
    """Tokens of the longest sequence whose angles do not depend on its length."""
    scaled = config.positions == "rotary" and config.rope_scaling.kind in ("dynamic", "longrope")
    return config.rope_scaling.original_length if scaled else sys.maxsize


@jax.named_scope("rope")
def rope_angles(
    config: ModelConfig, positions_BT: jax.Array, *, local: bool = False, lengths_BT: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, each (B, T, 1, R/2) float32, for token positions (B may be 1); R dims of a head turn.

    `local` asks for those of local layers, where the config has others for them. Scalings that depend on the length of
    a sequence take `lengths_BT` for each token's, by default the longest of the batch for all.

    A product of position and frequency has 24 bits, of which a large one leaves few to the fraction of a turn. A
    position therefore turns by its whole blocks first, in integers that wrap around as angles do.
    """

    scaling = RopeScaling() if local else config.rope_scaling
    rope = (config.rotary_dims, config.rope_theta_local if local else config.rope_theta, scaling)

    def turns(*, long: bool):
        """The radians of a token, the part of a turn that a block of tokens makes in units of 2^-32, and the factor."""
        pairs = config.rotary_dims // 2
        frequency, factor = rope_frequencies(jnp.arange(pairs, dtype=jnp.float32), *rope, long=long)
        exact, _ = rope_frequencies(np.arange(pairs, dtype=np.float64), *rope, long=long)
        a_block = np.rint(exact * ROPE_BLOCK / (2 * np.pi) % 1 * 2**32).astype(np.uint64).astype(np.uint32)
        return frequency, a_block, factor

    lengths = positions_BT.max() + 1 if lengths_BT is None else lengths_BT[:, :, None, None]
    if scaling.kind == "dynamic":
        angles = positions_BT[:, :, None, None].astype(jnp.float32) * _dynamic_frequency(rope, lengths)
        return _apart(jnp.cos(angles), jnp.sin(angles))
    frequency, a_block, factor = turns(long=False)
    if scaling.kind == "longrope":
        is_long = lengths > scaling.original_length
        there = turns(long=True)
        frequency, a_block = (jnp.where(is_long, b, a) for a, b in ((frequency, there[0]), (a_block, there[1])))
    positions = positions_BT[:, :, None, None]
    angles = (positions % ROPE_BLOCK).astype(jnp.float32) * frequency
    turned = jax.lax.bitcast_convert_type((positions // ROPE_BLOCK).astype(jnp.uint32) * a_block, jnp.int32)
    before = turned.astype(jnp.float32) * (2 * math.pi / 2**32)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    cos_before, sin_before = jnp.cos(before), jnp.sin(before)
    return _apart((cos * cos_before - sin * sin_before) * factor, (sin * cos_before + cos * sin_before) * factor)


def _apart(cos: jax.Array, sin: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same two, where the platform likes it from a loop: nothing that is computed before one is computed again."""
    if not choices().angles_apart:
        return cos, sin
    both = jax.lax.map(lambda which: jnp.where(which == 0, cos, sin), jnp.arange(2))
    return both[0], both[1]


def _dynamic_frequency(rope: tuple[int, float, RopeScaling], lengths: jax.Array) -> jax.Array:
    """Radians a token of each pair, by a base that grows with the length of the sequence ("dynamic NTK" scaling)."""
    rotary_dims, theta, scaling = rope
    beyond = jnp.maximum(lengths / scaling.original_length, 1)
    base = theta * (scaling.factor * beyond - (scaling.factor - 1)) ** (rotary_dims / max(rotary_dims - 2, 1))
    return base ** -(jnp.arange(rotary_dims // 2, dtype=jnp.float32) / (rotary_dims // 2))


@jax.named_scope("rope")
def rotate(x_BTNH: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns each pair (i, i + R/2) of the first R dims of every head by the position's angle, in float32."""
    cos, sin = angles
    half = cos.shape[-1]
    a, b = (x_BTNH[..., i * half : (i + 1) * half].astype(jnp.float32) for i in (0, 1))
    turned = [part.astype(x_BTNH.dtype) for part in (a * cos - b * sin, b * cos + a * sin)]
    return jnp.concatenate([*turned, x_BTNH[..., 2 * half :]], axis=-1)


def angles_of_layer(info: TokenInfo, window: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """The angles that a layer turns by, as of `rope_angles`; local layers, those with a window, may have their own."""
    if info.local_angles is None or window is None:
        return info.angles
    return jax.tree.map(lambda local, other: jnp.where(window > 0, local, other), info.local_angles, info.angles)
