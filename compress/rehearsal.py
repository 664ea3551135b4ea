"""Matrices that compute as if they were quantised while they are trained: quantisation-aware training.

The parameters stay floats. In each step the matrix is rounded to the grid on which its form would keep it, exactly as
python -m compress rounds it, and the gradient passes as if it had not been (Bengio et al., arXiv 1308.3432).
"""

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from compress.forms import Int4, Int8
from compress.rounding import rounded
from model.matmul import project
from model.projection import Projection, biased, param
from model.specs import LAYERS, Specs
from parallel.sharding import cast_and_gather, shard


@dataclass(frozen=True)
class Rehearsed:
    """A matrix of floats that computes as `form` would."""

    form: Int8 | Int4

    def specs(self, specs: Specs) -> Specs:
        """The same. Raises ValueError as those of the form."""
        self.form.specs(specs)
        return specs

    def module(self, part: Projection, specs: Specs) -> nnx.Module:
        """The matrix, rounded as it is used."""
        return RehearsedProjection(part, specs, self.form)


class RehearsedProjection(nnx.Module):
    """What model.projection.Projection is, with a weight that is rounded before it is used.

    It is none itself: a scan casts the matrices of those to the compute dtype beforehand, and rounding wants float32.
    """

    def __init__(self, part: Projection, specs: Specs, form: Int8 | Int4):
        """`specs` are those of the part."""
        self.weight, self.bias, self.frozen_bias = param(specs["weight"]), part.bias, part.frozen_bias
        self.form, self.inputs = form, len(specs["weight"].contracted)

    @property
    def axes(self) -> tuple[str, ...]:
        """As that of Projection."""
        return tuple(name for name in self.weight.axes if name != LAYERS)

    def matrix(self, dtype) -> jax.Array:
        """The weight as a matmul in `dtype` needs it."""
        # whole, as a matmul takes it: groups of inputs do not end where a mesh cuts them
        weight = shard(cast_and_gather(self.weight, jnp.float32), *self.axes)
        batch = sum(name == "experts" for name in self.axes)
        return through(weight, self.form, self.inputs, batch).astype(dtype)

    def product(self, x: jax.Array) -> jax.Array:
        """x times the weight, in x's dtype, before the bias."""
        return project(x, self.matrix(x.dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """The product in x's dtype."""
        return biased(self.product(x), self.bias, frozen=self.frozen_bias)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def through(weight: jax.Array, form: Int8 | Int4, inputs: int, batch: int) -> jax.Array:
    """A matrix (*batch, *in, *out) on the grid of a form, float32; its gradient is that of what it is on the grid."""
    into = weight.shape[batch : batch + inputs]
    group = math.gcd(into[-1], form.group) if isinstance(form, Int4) else 0

    def one(matrix: jax.Array) -> jax.Array:
        grid, codes = rounded(form, matrix.reshape(math.prod(into), -1), group)
        return grid.decode(codes).reshape(matrix.shape)

    for _ in range(batch):
        one = jax.vmap(one)
    return one(weight.astype(jnp.float32))


def _forward(weight, form, inputs, batch):
    return through(weight, form, inputs, batch), None


def _backward(form, inputs, batch, _, gradient):
    return (gradient,)


through.defvjp(_forward, _backward)
