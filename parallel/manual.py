"""`jax.shard_map` over some axes inside a program that is already manual over others, with gradients.

JAX splits the values that such a map keeps for its backward pass over every axis on which they differ, those of the
program around it too, and the partitioner refuses that. Here what is kept is handed over explicitly.
"""

from collections.abc import Callable
from functools import partial

import jax
from jax.sharding import PartitionSpec


def vary(tree, axes) -> jax.Array:
    """The same values, typed as different on every device of `axes`."""

    def one(x):
        missing = tuple(axis for axis in axes if axis not in jax.typeof(x).manual_axis_type.varying)
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(one, tree)


def differentiable_map(body: Callable, in_specs: tuple, out_specs, axes: tuple[str, ...]) -> Callable:
    """As `jax.shard_map(body, in_specs, out_specs, axis_names=axes)`, also where it is nested and differentiated."""
    mapped = partial(jax.shard_map, axis_names=set(axes))
    kept = PartitionSpec(axes)  # a first dim of one entry a device

    @jax.custom_vjp
    def function(*arguments):
        return mapped(body, in_specs=in_specs, out_specs=out_specs)(*arguments)

    def forward(*arguments):
        def body_and_pull(*arguments):
            y, pull = jax.vjp(body, *arguments)
            return y, jax.tree.map(lambda leaf: vary(leaf, axes)[None], pull)

        return mapped(body_and_pull, in_specs=in_specs, out_specs=(out_specs, kept))(*arguments)

    def backward(pull, dy):
        pulled = lambda pull, dy: jax.tree.map(lambda leaf: leaf[0], pull)(dy)
        return mapped(pulled, in_specs=(kept, out_specs), out_specs=in_specs)(pull, dy)

    function.defvjp(forward, backward)
    return function
