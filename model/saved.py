"""What layers keep for their backward pass, in a form that CPUs stack well.

XLA for CPUs (jaxlib 0.10) computes on 16-bit floats by widening them to float32. Where a scan over layers writes one
layer's values into the stack of all layers' values, it widens the whole stack and narrows it again, for every layer.
Integers of the same bits are left alone.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax.lax import bitcast_convert_type

from runtime.platform import platform


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Bits:
    """A 16-bit float array as integers of the same bits."""

    bits: jax.Array
    dtype: jnp.dtype = field(metadata={"static": True})

    def floats(self) -> jax.Array:
        """The array, bit for bit."""
        return bitcast_convert_type(self.bits, self.dtype)


def is_half(x: jax.Array) -> bool:
    """Whether x is of a 16-bit float dtype."""
    return jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize == 2


def stackable(function: Callable) -> Callable:
    """`function(parameters, x, *rest)`, to be scanned over: where x is 16-bit, on CPUs, it keeps Bits for gradients.

    Then parameters and x alone have gradients. Elsewhere it is the function itself.
    """

    @jax.custom_vjp
    def kept(parameters, x, rest):
        return function(parameters, x, *rest)

    def forward(parameters, x, rest):
        out, pull = jax.vjp(lambda parameters, x: function(parameters, x, *rest), parameters, x)
        keep = lambda leaf: Bits(bitcast_convert_type(leaf, jnp.uint16), leaf.dtype) if is_half(leaf) else leaf
        return out, jax.tree.map(keep, pull)

    def backward(pull, gradient):
        is_bits = lambda leaf: isinstance(leaf, Bits)
        pull = jax.tree.map(lambda leaf: leaf.floats() if is_bits(leaf) else leaf, pull, is_leaf=is_bits)
        return *pull(gradient), None

    kept.defvjp(forward, backward)

    def call(parameters, x, *rest):
        return kept(parameters, x, rest) if is_half(x) and platform() == "cpu" else function(parameters, x, *rest)

    return call
