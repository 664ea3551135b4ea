"""How every tensor lies on the mesh: the functions that apply the two tables of parallel/axes.py to arrays.

Outside parallel/ nothing spells a sharding: it is asked for here, by the names of dims. Inside, code that is manual
over some axes (pipeline, context, experts) splits its own arguments over these, and asks here how the rest lies.

A parameter or an activation names its dims once, with logical names; the tables map names to mesh axes. To change how
the model is sharded, change a row. A mesh axis of size 1 is a no-op, so one device and a pod run the same code.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from parallel.axes import ACTIVATION_AXES, PARAMETER_AXES, REPLICATED_IF_UNDIVIDED

# --------------------------------------------------------------------------------------------------- specs and lookups


def _sizes() -> Mapping[str, int]:
    """The axes that the compiler partitions over: in manual code, such as a pipeline's, the others are spoken for."""
    mesh = jax.sharding.get_abstract_mesh()
    return {} if mesh.empty else {axis: mesh.shape[axis] for axis in mesh.auto_axes}


def _entry(table: Mapping[str, tuple[str, ...]], name: str | None, size: int, sizes: Mapping[str, int]):
    axes = tuple(axis for axis in table[name] if axis in sizes) if name is not None else ()
    if size == 1:  # the one token of a decoding step: splitting it would only add exchanges
        return None
    if name in REPLICATED_IF_UNDIVIDED and size % math.prod(sizes.get(axis, 1) for axis in axes):
        return None
    return axes or None


def _spec(table, names: Sequence[str | None], shape: Sequence[int], sizes: Mapping[str, int]) -> PartitionSpec:
    assert len(names) == len(shape), f"{len(names)} dim names {tuple(names)} for shape {tuple(shape)}"
    return PartitionSpec(*(_entry(table, name, size, sizes) for name, size in zip(names, shape, strict=True)))


def splits(name: str, *, stored: bool = False) -> int:
    """Into how many parts the mesh in context splits the dim `name` of activations, or of stored parameters."""
    sizes = _sizes()
    return math.prod(sizes.get(axis, 1) for axis in (PARAMETER_AXES if stored else ACTIVATION_AXES)[name])


# --------------------------------------------------------------------------------------------------------- parameters


def cast_and_gather(parameter: nnx.Param, dtype) -> jax.Array:
    """The parameter as a computation needs it, in `dtype`; the compiler gathers it over fsdp where it is multiplied.

    The gather moves `dtype` (half the bytes in bfloat16), and is not pinned here: its result would then be kept for the
    backward pass, for all layers at once. The gradient comes back in the stored layout and dtype, so that the compiler
    can reduce and scatter at once.
    """
    value, sizes = parameter[...], _sizes()
    names = parameter.axes[-value.ndim :]  # of a layer's part of stacked parameters, those without the stack
    stored = _spec(PARAMETER_AXES, names, value.shape, sizes)
    return _cast(value, jnp.dtype(dtype), stored) if sizes else value.astype(dtype)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _cast(value, dtype, stored):
    return jax.lax.with_sharding_constraint(value.astype(dtype), stored)


def _cast_forward(value, dtype, stored):
    return _cast(value, dtype, stored), jnp.zeros((), value.dtype)


def _cast_backward(dtype, stored, witness, gradient):
    return (jax.lax.with_sharding_constraint(gradient, stored).astype(witness.dtype),)


_cast.defvjp(_cast_forward, _cast_backward)


def pin_parameter(value: jax.Array, axes: Sequence[str]) -> jax.Array:
    """Pins the layout of a parameter with these dims, named by rows of PARAMETER_AXES, in a program that makes it."""
    sizes = _sizes()
    return jax.lax.with_sharding_constraint(value, _spec(PARAMETER_AXES, axes, value.shape, sizes)) if sizes else value


def parameter_sharding(mesh: Mesh, shape: Sequence[int], axes: Sequence[str]) -> NamedSharding:
    """The NamedSharding of a parameter with these dims, named by rows of PARAMETER_AXES."""
    return NamedSharding(mesh, _spec(PARAMETER_AXES, axes, shape, mesh.shape))


def sharding_like(sharding: NamedSharding, shape: Sequence[int], like: Sequence[int]) -> NamedSharding:
    """How an array of shape `like` lies beside one of `shape` that lies as `sharding` says.

    As that one, or as what is left of it where `like` lacks one dim, as a mean over it does; else on every device.
    """
    spec = tuple(sharding.spec) + (None,) * (len(shape) - len(sharding.spec))
    if tuple(like) == tuple(shape):
        return sharding
    for dim in range(len(shape)):
        if (*shape[:dim], *shape[dim + 1 :]) == tuple(like) and math.prod(like) > 1:
            return NamedSharding(sharding.mesh, PartitionSpec(*spec[:dim], *spec[dim + 1 :]))
    return replicated(sharding.mesh)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of scalars and other small state: a copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


# -------------------------------------------------------------------------------------------------------- activations


def shard(x: jax.Array, *names: str | None) -> jax.Array:
    """Pins the layout of an activation: one name of ACTIVATION_AXES (or None: whole) for each dim.

    Without a mesh in context this is the identity.
    """
    sizes = _sizes()
    return jax.lax.with_sharding_constraint(x, _spec(ACTIVATION_AXES, names, x.shape, sizes)) if sizes else x


def layout(shape: Sequence[int], *names: str | None) -> tuple[tuple[str, ...], ...]:
    """The axes of more than one device that `shard` would split each dim over: for code that is manual over them."""
    sizes = {axis: size for axis, size in _sizes().items() if size > 1}
    return tuple(_entry(ACTIVATION_AXES, name, size, sizes) or () for name, size in zip(names, shape, strict=True))


# ----------------------------------------------------------------------------------------------- the stages' vocabulary
#
# In a pipeline no stage owns the token tables: each holds a slice of the rows, and all work on a microbatch together.
# Outside a pipeline there is one slice, the whole, and these are identities.


def in_pipeline() -> bool:
    """Whether the code being traced is a pipeline's, in which stages may take different branches."""
    return "pipe" in jax.sharding.get_abstract_mesh().manual_axes


def first_row(rows: int) -> jax.Array | int:
    """The token of row 0 in this stage's slice of a table, `rows` long."""
    return jax.lax.axis_index("pipe") * rows if in_pipeline() else 0


def sum_over_stages(x: jax.Array) -> jax.Array:
    """The sum over stages of what each found in its slice, entry by entry, and the same on all of them."""
    return jax.lax.psum(x, "pipe") if in_pipeline() else x


def max_over_stages(x: jax.Array) -> jax.Array:
    """The largest of what the stages found, entry by entry, and the same on all of them; it has no gradient."""
    x = jax.lax.stop_gradient(x)
    return jax.lax.pmax(x, "pipe") if in_pipeline() else x


def stored_over_stages(axes: Sequence[str]) -> PartitionSpec:
    """The PartitionSpec over `pipe` alone of a parameter with these dims, for a pipeline's manual code."""
    return PartitionSpec(*("pipe" if "pipe" in PARAMETER_AXES[name] else None for name in axes))


# -------------------------------------------------------------------------------------------------------------- batch


def batch_sharding(mesh: Mesh, *, tokens: bool = True) -> NamedSharding:
    """The layout of a (B, T) batch: sequences over the batch axes, tokens over context; or of what has no tokens."""
    return NamedSharding(mesh, PartitionSpec(ACTIVATION_AXES["batch"], ACTIVATION_AXES["tokens"] if tokens else None))


def local_rows(mesh: Mesh, batch_size: int) -> slice:
    """The rows of the global batch that the devices of this process need."""
    indices = NamedSharding(mesh, PartitionSpec(ACTIVATION_AXES["batch"])).addressable_devices_indices_map(
        (batch_size,)
    )
    bounds = [index[0].indices(batch_size)[:2] for index in indices.values()]
    return slice(min(start for start, _ in bounds), max(stop for _, stop in bounds))


def put_batch(mesh: Mesh, rows: Mapping[str, np.ndarray], batch_size: int) -> dict[str, jax.Array]:
    """Global arrays (B, T, ...) from the rows that this process holds (those of `local_rows`).

    Those whose names end in _BX, values X of a whole sequence, are split over sequences only.
    """
    first = local_rows(mesh, batch_size).start

    def put(name: str, local: np.ndarray) -> jax.Array:
        def cut(index):
            start, stop, _ = index[0].indices(batch_size)
            return local[start - first : stop - first, index[1]]

        sharding = batch_sharding(mesh, tokens=not name.endswith("_BX"))
        return jax.make_array_from_callback((batch_size, *local.shape[1:]), sharding, cut)

    return {name: put(name, local) for name, local in rows.items()}
