"""bfloat16 rounded at random, so that small changes are not lost.

bfloat16 has eight bits of precision. Rounded to the nearest, a second moment that should shrink by a thousandth a step
(beta2 = 0.999) stays where it is for ever, and so does a norm's scale of 1 that a step of 0.001 should move. Rounded up
with the probability that makes the mean right, both follow.
"""

import zlib

import jax
import jax.numpy as jnp


def random_bits(path, shape: tuple[int, ...], step: jax.Array) -> jax.Array:
    """Random uint16 for each entry of an array of a pytree, by its path and the step; stacked layers share them.

    The order of layers on the devices depends on the pipeline, and the rounding must not. JAX's random bits depend on
    an entry's place in its array alone, neither on the mesh nor on how far a vocabulary is padded.
    """
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    key = jax.random.fold_in(jax.random.key(zlib.crc32(name.encode())), step)
    stacked = any(isinstance(part, jax.tree_util.DictKey) and part.key == "layers" for part in path)
    return jax.random.bits(key, shape[1:] if stacked else shape, jnp.uint16)


def rounded(x: jax.Array, bits: jax.Array) -> jax.Array:
    """Float32 to one of its two neighbours in bfloat16, each with the probability that makes the mean right.

    bfloat16 is the upper half of a float32: uniform bits added to the lower half carry into the upper just so often.
    """
    whole = jax.lax.bitcast_convert_type(x, jnp.uint32) + bits.astype(jnp.uint32)
    return jax.lax.bitcast_convert_type((whole >> 16).astype(jnp.uint16), jnp.bfloat16)


def stored_as(old, new, step: jax.Array):
    """The float32 arrays of the pytree `new` in the dtypes of those of `old`, bfloat16 rounded at random."""

    def one(path, old: jax.Array, new: jax.Array) -> jax.Array:
        if old.dtype != jnp.bfloat16:
            return new.astype(old.dtype)
        new = new.astype(jnp.float32)
        near = rounded(new, random_bits(path, new.shape, step))
        return jnp.where(jnp.isfinite(new), near, new.astype(jnp.bfloat16))  # bits could make a number of what is none

    return jax.tree_util.tree_map_with_path(one, old, new)
