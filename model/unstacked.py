"""The stack with every layer's parameters and cache in arrays of their own: what generates a token at a time.

A scan over stacked layers copies what it takes of them and what it puts back: in training that is little beside the
work, and for one token it is more. The blocks are those of model/transformer.py.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from model.forms import of_block, put_in
from model.heads import Embedding
from model.kv_cache import Cache
from model.matmul import project_by_output
from model.platforms import choices
from model.projection import Projection
from model.specs import LAYERS, ParameterSpec, Specs, map_specs
from model.transformer import Block, Description, Transformer, block_of, rows_of
from parallel.sharding import cast_and_gather, pin_parameter


class ByOutput(nnx.Module):
    """A Projection whose weight is a matrix (outputs, inputs): each output's weights lie together in memory."""

    def __init__(self, projection: Projection, spec: ParameterSpec):
        """spec: that of its weight in one layer."""
        inputs, weight = len(spec.contracted), projection.weight.get_value()
        self.into, self.out = spec.shape[:inputs], spec.shape[inputs:]
        shape = math.prod(self.out), math.prod(spec.shape[:inputs])
        if isinstance(weight, jax.Array):
            weight = weight.reshape(shape[::-1]).T
        else:
            weight = jax.ShapeDtypeStruct(shape, weight.dtype)
        # of dims that became one, the first is the one that a mesh splits
        self.weight, self.bias = nnx.Param(weight, axes=(spec.axes[inputs], spec.axes[0])), projection.bias

    def matrix(self, dtype) -> jax.Array:
        """The weight (...in, ...out), as that of a Projection."""
        return cast_and_gather(self.weight, dtype).T.reshape(*self.into, *self.out)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x (B, T, ...in) to (B, T, ...out), in x's dtype."""
        x_BTI = x.reshape(*x.shape[:2], -1)
        y = project_by_output(x_BTI, cast_and_gather(self.weight, x.dtype)).reshape(*x.shape[:2], *self.out)
        return y if self.bias is None else (y + cast_and_gather(self.bias, jnp.float32)).astype(y.dtype)


def unstack(description: Description, params: dict, mesh: Mesh, dtype) -> tuple[dict, nnx.GraphDef, list[dict]]:
    """The parameters outside of the layers; the modules of one layer, and the parameters of each: matrices and tables
    in `dtype`, and as the platform likes them.
    """
    specs = map_specs(lambda spec: spec.of_one_layer(), description.specs[LAYERS])
    block = put_in(Block(description.config, specs), specs, of_block(description.forms))
    graphdef = nnx.graphdef(_turned(block, specs))

    def of_layer(stacked, row):
        block = nnx.merge(description.block, jax.tree.map(lambda p: p[row], stacked))
        layer = nnx.state(_turned(_in_dtype(block, dtype), specs))
        place = lambda p: pin_parameter(p.get_value(), p.axes[-p.get_value().ndim :])
        return nnx.to_pure_dict(jax.tree.map(place, layer, is_leaf=lambda p: isinstance(p, nnx.Variable)))

    def others(params):
        return without_layers(nnx.to_pure_dict(nnx.state(_in_dtype(description.bind(params), dtype))))

    def without_layers(tree: dict) -> dict:
        return {name: branch for name, branch in tree.items() if name != LAYERS}

    cut = jax.jit(of_layer)
    layers = [cut(params[LAYERS], row) for row in range(description.config.layers)]
    placed = without_layers(description.shardings(mesh))
    return jax.jit(others, out_shardings=placed)(without_layers(params)), graphdef, layers


def _turned(block: Block, specs: Specs) -> Block:
    """The block with the matrices that all tokens are multiplied with as the platform likes them."""
    if not choices().by_output or block.config.matmul_dtype:
        return block
    for name in ("attention", "ffn"):
        half = getattr(block, name)
        for part, spec in specs.get(name, {}).items():
            if type(projection := getattr(half, part)) is Projection:  # an adapter's is one, and more
                setattr(half, part, ByOutput(projection, spec["weight"]))
    return block


def run(
    model: Transformer,
    block: nnx.GraphDef,
    layers: Sequence[dict],
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    places_BT: jax.Array,
    lengths_BT: jax.Array,
    caches: Sequence[Cache],
    dtype,
) -> tuple[jax.Array, list[Cache]]:
    """Final hidden x_BTD (for `model.logits`), and the caches with these tokens written.

    Positions say where in the caches, places what positions embed: of padding, which lies beyond a cache, some place of
    its row. Lengths are those of the sequences, by which some rotary positions scale. `model` needs no parameters of
    layers; `block` and `layers` are those of `unstack`.
    """
    info = model.info(tokens_BT, positions_BT, places_BT=places_BT, lengths_BT=lengths_BT)
    x_BTD, written = model.embed(tokens_BT, info, dtype), []
    of_layer = jax.jit(block_of(block))  # traced and lowered once, for all layers
    for index, (layer, cache) in enumerate(zip(layers, caches, strict=True)):
        row = jax.tree.map(lambda x: x[0], rows_of(model.config, [index]))
        x_BTD, cache, _ = of_layer(layer, x_BTD, row, info, cache)
        written.append(cache)
    return model.finish(x_BTD), written


def _in_dtype(module: nnx.Module, dtype) -> nnx.Module:
    """The module with those of its parameters in `dtype` that it would cast to it when it computes."""
    for _, part in nnx.iter_modules(module):
        if type(part) in (Projection, Embedding) and isinstance(part.weight.get_value(), jax.Array):
            part.weight.set_value(cast_and_gather(part.weight, dtype))
    return module
