"""Weights of few bits: the grid of numbers that codes stand for, and codes packed two to a byte.

Everything here is about one matrix w_nm, whose n inputs are multiplied with a token's vector and whose m outputs come
out. A code q stands for the number (q - zero) * step. In int8 there is one step for each output and no zero; in int4 a
step and a zero for each group of inputs of an output (Q4_1 of llama.cpp is of this kind).

Steps are kept in bfloat16, zeros in sixteenths in a byte. Codes are chosen with what is kept, so its rounding costs
nothing but a slightly other grid.
"""

import itertools
from dataclasses import dataclass

import jax
import jax.numpy as jnp

LARGEST_INT8 = 127
LARGEST_INT4 = 15
FLOAT8 = jnp.float8_e4m3fn
LARGEST_FLOAT8 = float(jnp.finfo(FLOAT8).max)
ZERO_PARTS = 16  # a zero is counted in these parts of a step
# NF4: means of quantiles of the normal distribution, over the largest of them (arXiv 2305.14314, appendix E)
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
    *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Grid:
    """Which numbers codes stand for: the codes low ... high, a step and a zero for each group of n // G inputs."""

    step_Gm: jax.Array  # bfloat16
    zero_Gm: jax.Array  # uint8, in ZERO_PARTS of a step
    low: int = 0
    high: int = LARGEST_INT4

    def rows(self, n: int) -> tuple[jax.Array, jax.Array]:
        """The step and the zero of each weight, float32 (n, m)."""
        each = n // self.step_Gm.shape[0]
        step, zero = self.step_Gm.astype(jnp.float32), self.zero_Gm.astype(jnp.float32) / ZERO_PARTS
        return jnp.repeat(step, each, axis=0), jnp.repeat(zero, each, axis=0)

    def encode(self, w_nm: jax.Array) -> jax.Array:
        """The nearest codes, int32 (n, m)."""
        return nearest(w_nm, *self.rows(w_nm.shape[0]), self.low, self.high).astype(jnp.int32)

    def decode(self, q_nm: jax.Array) -> jax.Array:
        """What codes stand for, float32 (n, m)."""
        step_nm, zero_nm = self.rows(q_nm.shape[0])
        return (q_nm - zero_nm) * step_nm


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Levels:
    """As a Grid, with the levels of NF4 times the step of each group of n // G inputs."""

    step_Gm: jax.Array  # bfloat16

    def encode(self, w_nm: jax.Array) -> jax.Array:
        """The nearest codes, int32 (n, m)."""
        middles = jnp.asarray([(a + b) / 2 for a, b in itertools.pairwise(NF4)])
        return jnp.searchsorted(middles, w_nm / self._rows(w_nm.shape[0])).astype(jnp.int32)

    def decode(self, q_nm: jax.Array) -> jax.Array:
        """What codes stand for, float32 (n, m)."""
        return jnp.asarray(NF4)[q_nm] * self._rows(q_nm.shape[0])

    def _rows(self, n: int) -> jax.Array:
        return jnp.repeat(self.step_Gm.astype(jnp.float32), n // self.step_Gm.shape[0], axis=0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Floats:
    """As a Grid, with the numbers of FLOAT8 times the step of each output; codes are their bytes."""

    step_Gm: jax.Array  # bfloat16, (1, m)

    def encode(self, w_nm: jax.Array) -> jax.Array:
        """The nearest codes, uint8 (n, m)."""
        scaled_nm = jnp.clip(w_nm / self.step_Gm.astype(jnp.float32), -LARGEST_FLOAT8, LARGEST_FLOAT8)
        return jax.lax.bitcast_convert_type(scaled_nm.astype(FLOAT8), jnp.uint8)

    def decode(self, q_nm: jax.Array) -> jax.Array:
        """What codes stand for, float32 (n, m)."""
        numbers_nm = jax.lax.bitcast_convert_type(q_nm, FLOAT8).astype(jnp.float32)
        return numbers_nm * self.step_Gm.astype(jnp.float32)


def nearest(w: jax.Array, step: jax.Array, zero: jax.Array, low: int, high: int) -> jax.Array:
    """The codes, still floats, whose numbers are nearest to w."""
    return jnp.clip(jnp.round(w / step + zero), low, high)


def int8_grid(w_nm: jax.Array) -> Grid:
    """One step for each output, such that its largest weight is code 127."""
    step_1m = _step(jnp.max(jnp.abs(w_nm), axis=0, keepdims=True) / LARGEST_INT8)
    return Grid(step_1m, jnp.zeros(step_1m.shape, jnp.uint8), -LARGEST_INT8, LARGEST_INT8)


def fp8_floats(w_nm: jax.Array) -> Floats:
    """One step for each output, such that its largest weight is the largest number."""
    return Floats(_step(jnp.max(jnp.abs(w_nm), axis=0, keepdims=True) / LARGEST_FLOAT8))


def int4_grid(w_nm: jax.Array, group: int, shrink_Gm: jax.Array | float = 1.0) -> Grid:
    """A step and a zero for each `group` inputs of an output: from their smallest weight, or 0, to their largest, or 0.

    `shrink_Gm` makes the range smaller: what lies beyond is clipped, and the rest has finer steps.
    """
    w_Ggm = w_nm.reshape(-1, group, w_nm.shape[1])
    low_Gm = jnp.minimum(jnp.min(w_Ggm, axis=1), 0) * shrink_Gm
    high_Gm = jnp.maximum(jnp.max(w_Ggm, axis=1), 0) * shrink_Gm
    return grid_of((high_Gm - low_Gm) / LARGEST_INT4, -low_Gm)


def grid_of(step_Gm: jax.Array, offset_Gm: jax.Array) -> Grid:
    """The grid of int4 nearest to these steps and offsets (the zero times the step), as it is kept."""
    kept_Gm = _step(step_Gm)
    zero_Gm = jnp.round(offset_Gm / kept_Gm.astype(jnp.float32) * ZERO_PARTS)
    return Grid(kept_Gm, jnp.clip(zero_Gm, 0, LARGEST_INT4 * ZERO_PARTS).astype(jnp.uint8))


def output_error(change_nm: jax.Array, gram_nn: jax.Array) -> jax.Array:
    """The squared change of each output, summed over the tokens of the gram: (m,)."""
    return jnp.sum(change_nm * (gram_nn @ change_nm), axis=0)


def nf4_levels(w_nm: jax.Array, group: int) -> Levels:
    """For each `group` inputs of an output their largest weight, which is code 0 or 15."""
    return Levels(_step(jnp.max(jnp.abs(w_nm.reshape(-1, group, w_nm.shape[1])), axis=1)))


def _step(step: jax.Array) -> jax.Array:
    """As it is kept; where all weights are zero any will do."""
    kept = step.astype(jnp.bfloat16)
    return jnp.where(kept > 0, kept, jnp.ones_like(kept))


def pack(q: jax.Array, axis: int) -> jax.Array:
    """Codes 0 to 15, two neighbours along `axis` in a byte: uint8, half as long there. The first is in the low half."""
    pairs = jnp.moveaxis(q, axis, -1).astype(jnp.uint8)
    return jnp.moveaxis(pairs[..., ::2] | (pairs[..., 1::2] << 4), -1, axis)


def unpack(packed: jax.Array, axis: int) -> jax.Array:
    """The inverse of `pack`: uint8."""
    axis %= packed.ndim
    halves = jnp.stack([packed & 15, packed >> 4], axis=axis + 1)
    return halves.reshape(*packed.shape[:axis], 2 * packed.shape[axis], *packed.shape[axis + 1 :])
