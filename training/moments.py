"""Moments stored in bfloat16, rounded at random so that small changes are not lost (see training.rounding)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from training.rounding import random_bits, rounded


class StoredMoments(NamedTuple):
    """A transformation's state with its moments rounded, and the number of updates, which the rounding depends on."""

    count: jax.Array
    inner: optax.OptState


def in_bfloat16(transformation: optax.GradientTransformation) -> optax.GradientTransformation:
    """`transformation` with its moments, an array for each parameter, kept in bfloat16; it computes in float32."""

    def init(params) -> StoredMoments:
        state = jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf.astype(jnp.bfloat16) if _is_moment(path, leaf) else leaf,
            transformation.init(params),
        )
        return StoredMoments(jnp.zeros((), jnp.int32), state)

    def update(updates, state: StoredMoments, params=None):
        widen = lambda path, leaf: leaf.astype(jnp.float32) if _is_moment(path, leaf) else leaf
        inner = jax.tree_util.tree_map_with_path(widen, state.inner)
        updates = jax.tree.map(lambda u: u.astype(jnp.float32), updates)
        updates, inner = transformation.update(updates, inner, params)

        def narrow(path, leaf):
            return rounded(leaf, random_bits(path, leaf.shape, state.count)) if _is_moment(path, leaf) else leaf

        return updates, StoredMoments(state.count + 1, jax.tree_util.tree_map_with_path(narrow, inner))

    return optax.GradientTransformation(init, update)


def _is_moment(path, leaf) -> bool:
    """Moments are dicts like the parameters; counters and coefficients stand beside them."""
    return isinstance(path[-1], jax.tree_util.DictKey) and jnp.issubdtype(leaf.dtype, jnp.floating)
