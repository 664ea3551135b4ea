"""The adapters of several models beside one matrix: each row of a batch has one of them, or none.

There are places for so many adapters, all of the largest rank. Their thin matrices stand beside each other as if they
were those of one adapter whose rank is the sum, and between the two every row keeps the ranks of its own place alone.
So one program serves any mix, a place is filled without another program, and a row without an adapter has zero added
to what the matrix gives.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from finetune.adapters.matrices import ADAPTER, SHORTEST, Lora, Thin, dims_of, length_of, outputs_of, some_dims
from model.config import ModelConfig
from model.forms import Path, branch, replaced
from model.projection import biased, param
from model.specs import ParameterSpec, Specs, map_specs, parameter_specs
from parallel.sharding import cast_and_gather, parameter_sharding, shard


@dataclass(frozen=True)
class Places:
    """What there is room for beside a model."""

    count: int  # adapters
    rank: int  # of the largest
    paths: tuple[Path, ...]  # of the matrices that may have one
    stretched: bool = False  # whether outputs may be scaled to a trained length (DoRA)

    def specs(self, weight: ParameterSpec) -> Specs:
        """The parameters beside one matrix of one layer: a (*in, count x rank), b, and a factor for each output.

        They are split over a mesh as the matrix is, in its dims. The first row of factors is of rows without adapter.
        """
        found = Lora(self.count * self.rank, 1.0).specs({"weight": weight})[ADAPTER]
        if self.stretched:
            one = some_dims(weight, outputs_of(weight), 1.0)
            found["stretch"] = replace(one, shape=(self.count + 1, *one.shape), axes=("rank", *one.axes))
        return found

    def matrices(self, config: ModelConfig) -> dict[Path, ParameterSpec]:
        """The matrices in one layer, by their paths in a block."""
        specs = parameter_specs(config)
        return {path[1:]: branch(specs, path)["weight"].of_one_layer() for path in self.paths}


class Switched(nnx.Module):
    """A matrix, in whatever form it is kept, with the adapters of all places."""

    def __init__(self, part: nnx.Module, weight: ParameterSpec, places: Places):
        specs = places.specs(weight)
        self.part, self.places, self.dims = part, places, dims_of(weight)
        self.a, self.b = Thin(specs["a"]), Thin(specs["b"])
        self.stretch = param(specs["stretch"]) if places.stretched else None
        self.bias = part.bias if places.stretched else None
        if places.stretched:  # what is scaled is the product with the matrix alone: its bias comes behind
            part.bias = None
        self.places_B = nnx.Variable(jax.ShapeDtypeStruct((1,), jnp.int32))  # of each row; 0: none

    def __call__(self, x: jax.Array) -> jax.Array:
        """x (B, T, ...in) to (B, T, ...out), in x's dtype."""
        places_B = self.places_B[...]
        # fewer rows than places: each one's own matrices are less to read than all of them
        added = self._of_rows if len(places_B) < self.places.count else self._of_all
        y = self.part(x) + added(x, places_B)
        if self.stretch is None:
            return y
        stretch = cast_and_gather(self.stretch, jnp.float32)[places_B]
        return biased(y * stretch[:, None].astype(y.dtype), self.bias)

    def _of_all(self, x: jax.Array, places_B: jax.Array) -> jax.Array:
        """What is added to the product, by way of the ranks of all places."""
        owner_R = 1 + jnp.arange(self.places.count * self.places.rank) // self.places.rank
        h_BTR = shard(self.a(x), "batch", "tokens", "rank")
        return self.b(jnp.where((owner_R == places_B[:, None])[:, None], h_BTR, 0))

    def _of_rows(self, x: jax.Array, places_B: jax.Array) -> jax.Array:
        """The same, by way of the matrices of each row's own place."""
        N, R, (B, T) = self.places.count, self.places.rank, x.shape[:2]
        a, b = (shard(thin.matrix(x.dtype), *thin.axes) for thin in (self.a, self.b))
        at_B = jnp.maximum(places_B - 1, 0)
        a_IBR = jnp.take(a.reshape(-1, N, R), at_B, axis=1)
        b_BRO = jnp.take(b.reshape(N, R, -1), at_B, axis=0)
        summed = {"preferred_element_type": jnp.float32}
        h_BTR = jnp.einsum("BTI,IBR->BTR", x.reshape(B, T, -1), a_IBR, **summed)
        h_BTR = shard(jnp.where(places_B[:, None, None] > 0, h_BTR, 0).astype(x.dtype), "batch", "tokens", "rank")
        y_BTO = jnp.einsum("BTR,BRO->BTO", h_BTR, b_BRO, **summed).astype(x.dtype)
        return y_BTO.reshape(B, T, *b.shape[1:])

    def filled(self, place: jax.Array, values: dict) -> dict:
        """The parameters beside the matrix once a place (1 first) holds an adapter: a (*in, R) and b (R, *out), with
        `magnitude` (*out), the lengths that the outputs' weights are scaled to; all zero: none are.
        """
        kept, R = {}, self.places.rank
        for name, thin, dim in (("a", self.a, self.dims[0]), ("b", self.b, 0)):
            stack = thin.weight[...]
            new = values[name].astype(stack.dtype)
            kept[name] = {"weight": jax.lax.dynamic_update_slice_in_dim(stack, new, (place - 1) * R, dim)}
        if self.stretch is not None:
            wide = lambda name: values[name].astype(jnp.float32)
            added = jnp.tensordot(wide("a"), wide("b"), 1)
            length = length_of(self.part.matrix(jnp.float32) + added, self.dims)
            magnitude = wide("magnitude")
            stretch = jnp.where(jnp.any(magnitude != 0), magnitude / jnp.maximum(length, SHORTEST), 1)
            kept["stretch"] = jax.lax.dynamic_update_slice_in_dim(self.stretch[...], stretch[None], place, 0)
        return kept


def make_room(
    places: Places, config: ModelConfig, block: nnx.GraphDef, layers: list[dict], mesh: Mesh, dtype
) -> tuple[nnx.GraphDef, list[dict]]:
    """The block and the layers of model.unstacked.unstack with empty places beside their matrices."""
    matrices = places.matrices(config)
    modules = nnx.merge(block, layers[0])
    for path, weight in matrices.items():
        parent = modules
        for name in path[:-1]:
            parent = getattr(parent, name)
        setattr(parent, path[-1], Switched(getattr(parent, path[-1]), weight, places))

    def begin() -> dict:
        def empty(spec):
            return jnp.full(spec.shape, spec.value, dtype if spec.is_matrix else jnp.float32)

        return {path: map_specs(empty, specs) for path, specs in specs_of.items()}

    specs_of = {path: places.specs(weight) for path, weight in matrices.items()}
    lies = lambda spec: parameter_sharding(mesh, spec.shape, spec.axes)
    begin = jax.jit(begin, out_shardings={path: map_specs(lies, specs) for path, specs in specs_of.items()})
    return nnx.graphdef(modules), [_around(layer, begin()) for layer in layers]


def _around(layer: dict, empty: Mapping[Path, dict]) -> dict:
    """A layer's parameters as those of Switched, without the rows' places."""
    for path, own in empty.items():
        part = branch(layer, path)
        if "stretch" in own and "bias" in part:
            own = own | {"bias": part["bias"]}
            part = {name: value for name, value in part.items() if name != "bias"}
        layer = replaced(layer, path, {"part": part, **own})
    return layer


def with_rows(places: Places, layer: dict, places_B: jax.Array) -> dict:
    """A layer's parameters where row b has the adapter of place `places_B[b]`; 0: none."""
    for path in places.paths:
        layer = replaced(layer, path[1:], branch(layer, path[1:]) | {"places_B": places_B})
    return layer


def fill(places: Places, block: nnx.GraphDef, layer: dict, place: jax.Array, values: Mapping[str, dict]) -> dict:
    """What `filled` gives for each matrix of a layer, by its path in the layer, '/'-joined, as `values` are."""
    block, kept = nnx.merge(block, with_rows(places, layer, jnp.zeros(1, jnp.int32))), {}
    for name, value in values.items():
        module = block
        for part in name.split("/"):
            module = getattr(module, part)
        kept[name] = module.filled(place, value)
    return kept


def beside(places: Places, layer: dict) -> dict[str, dict]:
    """A layer's parameters that `fill` makes anew, in its order."""
    found = {}
    for path in places.paths:
        own = branch(layer, path[1:])
        found["/".join(path[1:])] = {name: own[name] for name in ("a", "b", "stretch") if name in own}
    return found


def put(layer: dict, kept: Mapping[str, dict]) -> dict:
    """The layer's parameters with those that `fill` has given."""
    for name, own in kept.items():
        path = tuple(name.split("/"))
        layer = replaced(layer, path, branch(layer, path) | own)
    return layer


def of_layer(places: Places, config: ModelConfig, values: Mapping[str, dict], layer: int) -> dict[str, dict]:
    """What an adapter adds to the matrices of one layer, as `fill` takes it: zeros where it has less rank, or nothing.

    `values` are those of all layers, by the matrices' '/'-joined paths in a layer.
    """
    made = {}
    for path, weight in places.matrices(config).items():
        into, out = weight.shape[: len(weight.contracted)], weight.shape[len(weight.contracted) :]
        shapes = {"a": (*into, places.rank), "b": (places.rank, *out)}
        shapes |= {"magnitude": out} if places.stretched else {}
        own, name = {}, "/".join(path)
        for kind, shape in shapes.items():
            own[kind] = np.zeros(shape, np.float32)
            if (given := values.get(name, {}).get(kind)) is not None:
                own[kind][tuple(map(slice, given.shape[1:]))] = given[layer]
        made[name] = own
    return made
