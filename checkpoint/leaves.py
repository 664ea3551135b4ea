"""The leaves of a state by path: compared with what a checkpoint holds, and fitted to the shapes of another mesh."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def by_path(state: Any) -> dict[str, Any]:
    """Leaves by '/'-joined path, in the order of the tree; Orbax sees this flat dict, whatever the containers are."""
    leaves = jax.tree.leaves_with_path(state)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    assert len(named) == len(leaves), "two leaves of the state have the same path"
    for path, leaf in named.items():
        assert isinstance(leaf, jax.Array | jax.ShapeDtypeStruct), f"{path} is a {type(leaf).__name__}, not an array"
        assert not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key), f"{path}: give jax.random.key_data of it"
    return named


def check_leaves(
    step: int, saved: dict, wanted: dict, resize: Callable[[str], bool] | None, part: bool = False
) -> None:
    """Raise a ValueError that names the first leaf in which a checkpoint of another model differs.

    part: leaves that are saved and not wanted are no difference.
    """
    for path in [*wanted, *(path for path in saved if path not in wanted and not part)]:
        there = f"{saved[path][0]} {tuple(saved[path][1])}" if path in saved else "missing"
        here = f"{wanted[path].dtype} {wanted[path].shape}" if path in wanted else "missing"
        if there == here:
            continue
        both = path in saved and path in wanted
        same_kind = both and saved[path][0] == str(wanted[path].dtype) and len(saved[path][1]) == wanted[path].ndim
        if not (same_kind and resize is not None and resize(path)):
            raise ValueError(
                f"the checkpoint of step {step} is of another model: {path} is {there} there and {here} here; "
                "choose the model and the optimizer that it was saved with, or another run directory"
            )


def shape_to_read(saved: list[int], leaf: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    """Large enough for what was saved and what is wanted, and divisible by the sharding in every dim."""
    if tuple(saved) == leaf.shape:
        return leaf.shape
    shards = [size // part for size, part in zip(leaf.shape, leaf.sharding.shard_shape(leaf.shape), strict=True)]
    return tuple(-(-max(old, new) // n) * n for old, new, n in zip(saved, leaf.shape, shards, strict=True))


def fit(path: str, array: jax.Array | None, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """Cut what was read to the shape wanted. None stands for an array of size 0, of which nothing was stored.

    Raises ValueError where what would be cut off is not zero.
    """
    if array is None:
        return jax.jit(lambda: jnp.zeros(leaf.shape, leaf.dtype), out_shardings=leaf.sharding)()
    if array.shape == leaf.shape:
        return array

    def cut(array):
        beyond = [jax.lax.slice_in_dim(array, size, None, axis=dim) for dim, size in enumerate(leaf.shape)]
        return array[tuple(map(slice, leaf.shape))], jnp.array([jnp.any(part != 0) for part in beyond]).any()

    kept, lost = jax.jit(cut, out_shardings=(leaf.sharding, None))(array)
    if bool(lost):
        raise ValueError(f"{path} cannot be cut to {leaf.shape}: there are values beyond it")
    return kept
