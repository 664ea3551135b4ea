"""Published weights straight onto a mesh: one layer of one parameter at a time, and of that only what a device needs.

Host memory holds a layer's part and no more; what has been read lies on the devices.
"""

import logging
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from checkpoint.huggingface.opened import Pretrained
from checkpoint.huggingface.places import Place
from model.specs import LAYERS, ParameterSpec, leaves, map_specs
from model.transformer import Description
from parallel.sharding import parameter_sharding

log = logging.getLogger("isomesh.checkpoint")


def load(pretrained: Pretrained, description: Description, mesh: Mesh, dtype=jnp.float32) -> dict:
    """The parameters of a published model, as `description` lays them out, in `dtype`."""
    if others := pretrained.left_out():
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        log.warning("%s: the model has no place for %s%s", pretrained.path, ", ".join(others[:3]), more)
    loaded = map_specs(lambda spec: None, description.specs)
    places = pretrained.places
    for path, spec in leaves(description.specs):
        _, place = places[path]
        reader = _Reader(pretrained, place, np.dtype(dtype))
        stacked = spec.axes[0] == LAYERS
        value = _stacked(reader, spec, description.slots, mesh) if stacked else _owned(reader.array(spec, 0, mesh))
        branch = loaded
        for name in path[:-1]:
            branch = branch[name]
        branch[path[-1]] = value
    return loaded


def _stacked(reader: "_Reader", spec: ParameterSpec, slots: tuple[int, ...], mesh: Mesh) -> jax.Array:
    """The layers of a parameter, each written into its row of an array that begins as zeros."""
    sharding = parameter_sharding(mesh, spec.shape, spec.axes)
    stack = jax.jit(lambda: jnp.zeros(spec.shape, reader.dtype), out_shardings=sharding)()
    put = jax.jit(partial(jax.lax.dynamic_update_index_in_dim, axis=0), donate_argnums=0, out_shardings=sharding)
    for row, layer in enumerate(slots):
        if layer >= 0:
            stack = put(stack, reader.array(spec.of_one_layer(), layer, mesh), np.int32(row))
            jax.block_until_ready(stack)  # else the host would run ahead, and hold many layers
    return stack


def _owned(array: jax.Array) -> jax.Array:
    """The same in memory of the device's own: on CPUs an array may otherwise lie in the mapped file itself."""
    return jax.jit(jnp.copy, out_shardings=array.sharding)(array)


class _Reader:
    """Reads one parameter, a layer at a time."""

    def __init__(self, pretrained: Pretrained, place: Place, dtype: np.dtype):
        self.pretrained, self.place, self.dtype = pretrained, place, dtype

    def array(self, spec: ParameterSpec, layer: int, mesh: Mesh) -> jax.Array:
        """One layer of the parameter on the mesh; each device reads its own part."""
        sharding = parameter_sharding(mesh, spec.shape, spec.axes)
        parts: dict[tuple, np.ndarray] = {}

        def part(index: tuple[slice, ...]) -> np.ndarray:
            bounds = tuple(s.indices(size)[:2] for s, size in zip(index, spec.shape, strict=True))
            if bounds not in parts:  # replicas share what was read
                parts[bounds] = self._read(spec, layer, index)
            return parts[bounds]

        return jax.make_array_from_callback(spec.shape, sharding, part)

    def _read(self, spec: ParameterSpec, layer: int, index: tuple[slice, ...]) -> np.ndarray:
        if not self.place.by_expert:
            return self._cut(self._view(spec, layer, 0), spec, index)
        first, last, _ = index[0].indices(spec.shape[0])
        experts = (self._view(spec, layer, expert)[index[1:]] for expert in range(first, last))
        return np.stack([np.asarray(expert, self.dtype) for expert in experts])

    def _view(self, spec: ParameterSpec, layer: int, expert: int) -> np.ndarray:
        tensor = self.pretrained.source.tensor(self.pretrained.find(self.place.of(layer, expert)))
        return self.place.ours(tensor, spec)

    def _cut(self, view: np.ndarray, spec: ParameterSpec, index: tuple[slice, ...]) -> np.ndarray:
        """The part of a parameter, in our dtype; rows of padding, which no tensor of theirs has, are zero."""
        cut = np.ascontiguousarray(view[index]).astype(self.dtype, copy=False)
        shape = tuple(len(range(*s.indices(size))) for s, size in zip(index, spec.shape, strict=True))
        if cut.shape == shape:
            return cut
        assert spec.rows is not None, f"{shape} wanted, {cut.shape} read"
        padded = np.zeros(shape, self.dtype)
        padded[: len(cut)] = cut
        return padded
