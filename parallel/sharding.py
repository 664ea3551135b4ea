"""How every tensor lies on the mesh: two tables, and the only functions that spell Flax and JAX sharding.

A parameter or an activation names its dims once, with logical names; the tables map names to mesh axes. To change how
the model is sharded, change a row. A mesh axis of size 1 is a no-op, so one device and a pod run the same code.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from parallel.mesh import Requirement

# Where stored parameters, their gradients and their optimizer moments live.
PARAMETER_AXES = {
    "width": ("fsdp",),  # every matrix has one width dim: shard it, gather it just before use
    "heads": ("tensor",),  # a device computes whole heads
    "kv_heads": ("tensor",),  # as heads; replicated when there are fewer than tensor shards
    "head_dim": (),  # never split: rotary positions and norms need whole heads
    "ffn": ("tensor",),  # first matrix by column, second by row: one exchange a block
    "vocab": ("tensor",),  # the two largest tables; logits come out split by vocabulary
    "positions": (),  # learned positions: looked up by a contiguous slice
    "norm": (),  # vectors: too small to be worth a gather
    "layers": (),  # the stacking dim of scanned layers
}

# Where activations live between operations.
ACTIVATION_AXES = {
    "batch": ("data", "fsdp", "expert"),  # sequences go to every axis that holds a copy of the weights' work
    "tokens": ("context",),  # inside a block: whole sequences, or context shards of them
    "residual": ("context", "tensor"),  # between blocks: sequence parallelism, so no token is stored twice
    "width": (),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "ffn": ("tensor",),
    "vocab": ("tensor",),
}

# Dims that stay whole, instead of being refused, when the mesh does not divide them.
REPLICATED_IF_UNDIVIDED = frozenset({"kv_heads"})


# --------------------------------------------------------------------------------------------------- specs and lookups


def _sizes() -> Mapping[str, int]:
    mesh = jax.sharding.get_abstract_mesh()
    return {} if mesh.empty else mesh.shape


def _entry(table: Mapping[str, tuple[str, ...]], name: str | None, size: int, sizes: Mapping[str, int]):
    axes = table[name] if name is not None else ()
    if size == 1:  # the one token of a decoding step: splitting it would only add exchanges
        return None
    if name in REPLICATED_IF_UNDIVIDED and size % math.prod(sizes.get(axis, 1) for axis in axes):
        return None
    return axes or None


def _spec(table, names: Sequence[str | None], shape: Sequence[int], sizes: Mapping[str, int]) -> PartitionSpec:
    assert len(names) == len(shape), f"{len(names)} dim names {tuple(names)} for shape {tuple(shape)}"
    return PartitionSpec(*(_entry(table, name, size, sizes) for name, size in zip(names, shape, strict=True)))


def splits(name: str) -> int:
    """Into how many parts the mesh in context splits the activation dim `name`."""
    sizes = _sizes()
    return math.prod(sizes.get(axis, 1) for axis in ACTIVATION_AXES[name])


def requirement(name: str, size: int, dim: str, *, stored: bool = False) -> Requirement:
    """What the tables ask of a config field `name` with value `size`: it becomes `dim` of activations or parameters."""
    table = PARAMETER_AXES if stored else ACTIVATION_AXES
    return Requirement(name, size, table[dim], or_divisor=dim in REPLICATED_IF_UNDIVIDED)


# --------------------------------------------------------------------------------------------------------- parameters


def param(key: jax.Array, shape: Sequence[int], axes: Sequence[str], init: Callable, *, inputs: int = 0) -> nnx.Param:
    """A parameter whose dims are named by `axes`; `init(key, shape, dtype)` draws it.

    `inputs` counts the leading dims that a matrix contracts with (0 for vectors and tables), for initialisers and
    optimizers that treat matrices in their own way.
    """
    return nnx.Param(init(key, tuple(shape), jnp.float32), axes=tuple(axes), inputs=inputs)


def use(parameter: nnx.Param, dtype) -> jax.Array:
    """The parameter as a computation needs it: in `dtype`, gathered over fsdp, still split over tensor.

    The gather moves `dtype` (half the bytes in bfloat16); the gradient comes back in the stored layout and dtype,
    so that the compiler can reduce and scatter at once.
    """
    value, axes = parameter[...], parameter.axes
    sizes = _sizes()
    stored = _spec(PARAMETER_AXES, axes, value.shape, sizes)
    gathered = PartitionSpec(*(None if entry == ("fsdp",) else entry for entry in stored))
    return _use(value, jnp.dtype(dtype), stored, gathered) if sizes else value.astype(dtype)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _use(value, dtype, stored, gathered):
    value = jax.lax.with_sharding_constraint(value.astype(dtype), stored)
    return jax.lax.with_sharding_constraint(value, gathered)


def _use_forward(value, dtype, stored, gathered):
    return _use(value, dtype, stored, gathered), jnp.zeros((), value.dtype)


def _use_backward(dtype, stored, gathered, witness, gradient):
    return (jax.lax.with_sharding_constraint(gradient, stored).astype(witness.dtype),)


_use.defvjp(_use_forward, _use_backward)


def parameter_shardings(mesh: Mesh, shapes, axes):
    """The NamedSharding of each parameter.

    `shapes` is a pytree of arrays or ShapeDtypeStructs, `axes` the same tree with a tuple of dim names at each leaf;
    a leaf with one dim more than names is a stack of layers.
    """

    def one(leaf, names):
        names = ("layers",) * (len(leaf.shape) - len(names)) + tuple(names)
        return NamedSharding(mesh, _spec(PARAMETER_AXES, names, leaf.shape, mesh.shape))

    return jax.tree.map(one, shapes, axes)


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


# -------------------------------------------------------------------------------------------------------------- batch


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The layout of a (B, T) batch: sequences over the batch axes, tokens over context."""
    return NamedSharding(mesh, PartitionSpec(ACTIVATION_AXES["batch"], ACTIVATION_AXES["tokens"]))


def local_rows(mesh: Mesh, batch_size: int) -> slice:
    """The rows of the global batch that the devices of this process need."""
    indices = NamedSharding(mesh, PartitionSpec(ACTIVATION_AXES["batch"])).addressable_devices_indices_map(
        (batch_size,)
    )
    bounds = [index[0].indices(batch_size)[:2] for index in indices.values()]
    return slice(min(start for start, _ in bounds), max(stop for _, stop in bounds))


def put_batch(mesh: Mesh, rows: Mapping[str, np.ndarray], batch_size: int) -> dict[str, jax.Array]:
    """Global (B, T) arrays from the rows that this process holds (those of `local_rows`)."""
    sharding, first = batch_sharding(mesh), local_rows(mesh, batch_size).start

    def put(local: np.ndarray) -> jax.Array:
        def cut(index):
            start, stop, _ = index[0].indices(batch_size)
            return local[start - first : stop - first, index[1]]

        return jax.make_array_from_callback((batch_size, local.shape[1]), sharding, cut)

    return {name: put(local) for name, local in rows.items()}
