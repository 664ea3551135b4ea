"""`jax.shard_map` over some axes inside a program that is already manual over others, with gradients.

A program is manual over an axis when it is written for one device's part along it, and spells the exchanges. Such maps
nest here: a pipeline is manual over `pipe` and `data`, and inside a stage attention is manual over `context`.

    program for the whole mesh
      └ map over pipe, data             one stage, one share of the batch
          └ map over context, tensor    one device's tokens and heads          <- `differentiable_map`

JAX splits the values that an inner map keeps for its backward pass over every axis on which they differ, those of the
outer map too, and the partitioner refuses that. Here what is kept is handed over explicitly: the forward map returns it
with one more dim in front, an entry for each device of the inner axes, and the backward map takes it in again.
JAX also types each value by the axes along which devices hold different ones ("varying"); `vary` and `alike` say so
where it does not follow by itself.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
from jax.sharding import PartitionSpec

from parallel.sharding import layout


def vary(tree, axes) -> jax.Array:
    """The same pytree, its arrays typed as different on every device of `axes`."""

    def one(x):
        missing = tuple(axis for axis in axes if axis not in jax.typeof(x).manual_axis_type.varying)
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(one, tree)


def alike(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The same values, typed as different on every device of the axes of any of them.

    For functions with a backward pass of their own: a sum over devices that an argument's gradient needs is outside.
    """
    axes = {axis for x in arrays for axis in jax.typeof(x).manual_axis_type.varying}
    return tuple(vary(list(arrays), sorted(axes)))


def _bare(tree):
    """The same values without their types: in a map that is not checked, the result of any operation has none."""
    return jax.tree.map(lambda x: jax.lax.squeeze(jax.lax.expand_dims(x, (0,)), (0,)), tree)


def differentiable_map(
    body: Callable, in_specs: tuple, out_specs, axes: tuple[str, ...], *, typed: bool = True
) -> Callable:
    """As `jax.shard_map(body, in_specs, out_specs, axis_names=axes)`, also where it is nested and differentiated.

    A body that is not `typed` may hold kernels, of whose results JAX does not know on which devices they differ: then
    each argument that is whole on some axes must be given the same gradient by all of their devices.
    """
    mapped = partial(jax.shard_map, axis_names=set(axes), check_vma=typed)
    kept = PartitionSpec(axes)  # a first dim of one entry a device

    def call(*arguments):
        around = {axis for x in jax.tree.leaves(arguments) for axis in jax.typeof(x).manual_axis_type.varying}
        same = lambda tree: tree
        # what goes in and comes out is typed in the program around this one, but kernels know no types
        bare, known = (same, same) if typed else (_bare, partial(vary, axes=sorted(around)))

        @jax.custom_vjp
        def function(*arguments):
            return known(mapped(body, in_specs=in_specs, out_specs=out_specs)(*arguments))

        def forward(*arguments):
            def body_and_pull(*arguments):
                y, pull = jax.vjp(body, *bare(arguments))
                return y, jax.tree.map(lambda leaf: (vary(leaf, axes) if typed else leaf)[None], pull)

            return known(mapped(body_and_pull, in_specs=in_specs, out_specs=(out_specs, kept))(*arguments))

        def backward(pull, dy):
            pulled = lambda pull, dy: jax.tree.map(lambda leaf: leaf[0], pull)(bare(dy))
            return known(mapped(pulled, in_specs=(kept, out_specs), out_specs=in_specs)(pull, dy))

        function.defvjp(forward, backward)
        return function(*known(arguments))

    return call


def per_device(kernel: Callable, dims: Sequence[Sequence[str]], *arguments: jax.Array | None) -> jax.Array:
    """`kernel(*arguments)` on each device's part, where the compiler cannot partition a kernel; result like the first.

    `dims` name the dims of each argument, as for `parallel.sharding.shard`. None of the parts needs those of other
    devices. Where a mesh is in context all its axes are manual inside.
    """
    axes = tuple(jax.sharding.get_abstract_mesh().auto_axes)
    if not axes:
        return kernel(*arguments)
    spec = lambda x, names: PartitionSpec() if x is None else PartitionSpec(*layout(x.shape, *names))
    specs = tuple(spec(x, names) for x, names in zip(arguments, dims, strict=True))
    return differentiable_map(kernel, specs, specs[0], axes, typed=False)(*arguments)
