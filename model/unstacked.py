"""The stack with every layer's parameters and cache in arrays of their own: what generates a token at a time.

A scan over stacked layers copies what it takes of them and what it puts back: in training that is little beside the
work, and for one token it is more. The blocks are those of model/transformer.py.
"""

from collections.abc import Sequence

import jax
from flax import nnx
from jax.sharding import Mesh

from model.heads import Embedding
from model.kv_cache import Cache
from model.projection import Projection
from model.specs import LAYERS, map_specs
from model.transformer import Description, Transformer, block_of, rows_of
from parallel.sharding import cast_and_gather, parameter_sharding


def unstack(description: Description, params: dict, mesh: Mesh, dtype) -> tuple[dict, list[dict]]:
    """The parameters outside of the layers, and those of each layer, matrices and tables in `dtype`."""

    def of_layer(stacked, row):
        layer = jax.tree.map(lambda p: p[row], stacked)
        return _in_dtype(nnx.merge(description.block, layer), dtype)

    specs = map_specs(lambda spec: spec.of_one_layer(), description.specs[LAYERS])
    placed = map_specs(lambda spec: parameter_sharding(mesh, spec.shape, spec.axes), specs)
    cut = jax.jit(of_layer, out_shardings=placed)
    around = {name: branch for name, branch in params.items() if name != LAYERS}
    shardings = {name: branch for name, branch in description.shardings(mesh).items() if name != LAYERS}
    cast = jax.jit(lambda around: _outside(_in_dtype(description.bind(around), dtype)), out_shardings=shardings)
    layers = [cut(params[LAYERS], row) for row in range(description.config.layers)]
    return cast(around), layers


def run(
    model: Transformer,
    block: nnx.GraphDef,
    layers: Sequence[dict],
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    caches: Sequence[Cache],
    dtype,
) -> tuple[jax.Array, list[Cache]]:
    """Final hidden x_BTD (for `model.logits`), and the caches with these tokens written.

    `model` needs no parameters of layers; `block` is `Description.block`.
    """
    info = model.info(tokens_BT, positions_BT)
    x_BTD, written = model.embed(tokens_BT, info, dtype), []
    for index, (layer, cache) in enumerate(zip(layers, caches, strict=True)):
        row = jax.tree.map(lambda x: x[0], rows_of(model.config, [index]))
        x_BTD, cache, _ = block_of(block)(layer, x_BTD, row, info, cache)
        written.append(cache)
    return model.finish(x_BTD), written


def _in_dtype(module: nnx.Module, dtype) -> dict:
    """The parameters of a module, those in `dtype` that it would cast to it when it computes."""
    for _, part in nnx.iter_modules(module):
        if isinstance(part, Projection | Embedding) and isinstance(part.weight.get_value(), jax.Array):
            part.weight.set_value(cast_and_gather(part.weight, dtype))
    return nnx.to_pure_dict(nnx.state(module))


def _outside(params: dict) -> dict:
    return {name: branch for name, branch in params.items() if name != LAYERS}
