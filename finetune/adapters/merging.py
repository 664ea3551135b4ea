"""Adapters folded into the matrices that they stand beside, and taken out again."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from compress.rehearsal import Rehearsed, through
from finetune.adapters.matrices import (
    ADAPTER,
    SHORTEST,
    Lora,
    Narrow,
    Scaled,
    beside,
    dims_of,
    is_coded,
    length_of,
    numbers,
    thin_product,
)
from finetune.adapters.parts import Bottleneck, Prefix
from finetune.adapters.tables import Frozen
from model.forms import Form, Path, branch, replaced
from model.specs import ParameterSpec
from model.transformer import Description, describe


@dataclass(frozen=True)
class Merged:
    """A model without adapters that computes what it did with them."""

    description: Description
    params: dict  # float32 where there was an adapter or a quantised matrix
    lengths: dict[Path, jax.Array]  # of DoRA: how long each output's weights were, which unmerging needs


def merge(description: Description, params: dict, mesh: Mesh) -> Merged:
    """Folds all adapters in; codes of quantised matrices become numbers. The mesh is in context.

    Raises ValueError for adapters that are no matrix.
    """
    _check(description)
    plain = describe(description.config)
    shardings, lengths = plain.shardings(mesh), {}
    with jax.default_matmul_precision("float32"):
        for path, form in description.forms.items():
            weight = branch(plain.specs, path)["weight"]
            fold = jax.jit(
                lambda ours, form=form, weight=weight: _folded(form, weight, ours),
                out_shardings=(branch(shardings, path), None),
            )
            folded, length = fold(branch(params, path))
            params = replaced(params, path, folded)
            if length is not None:
                lengths[path] = length
    return Merged(plain, params, lengths)


def unmerge(merged: Merged, description: Description, adapters: dict) -> dict:
    """The parameters before `merge`: `description` is that of the model with adapters, which `adapters` hold.

    Raises ValueError for quantised matrices, whose codes are gone, and for factors of zero.
    """
    params = merged.params
    with jax.default_matmul_precision("float32"):
        for path, form in description.forms.items():
            if isinstance(form, Narrow | Frozen):
                continue
            if not isinstance(form, Lora | Scaled) or is_coded(form.base):
                raise ValueError(f"{'/'.join(path)} was kept in codes, which are gone: read the base again")
            weight, adapter = branch(merged.description.specs, path)["weight"], branch(adapters, path)[ADAPTER]
            if isinstance(form, Scaled) and not bool(jnp.all(adapter["factors"] != 0)):
                raise ValueError(f"{'/'.join(path)} has a factor of zero: what it multiplied is gone")
            unfold = jax.jit(
                lambda ours, adapter, length, form=form, weight=weight: _unfolded(form, weight, ours, adapter, length)
            )
            ours = unfold(branch(params, path), adapter, merged.lengths.get(path))
            params = replaced(params, path, ours | {ADAPTER: adapter})
    return params


def _check(description: Description) -> None:
    for path, form in description.forms.items():
        if isinstance(form, Bottleneck | Prefix):
            raise ValueError(f"the adapter of {'/'.join(path)} is no matrix, and cannot be merged into one")


def _folded(form: Form, weight: ParameterSpec, ours: dict) -> tuple[dict, jax.Array | None]:
    """The parameters of a matrix without its adapter; and the lengths of its outputs' weights before DoRA's."""
    adapter, dims, length = ours.get(ADAPTER), dims_of(weight), None
    kept = {name: value for name, value in ours.items() if name == "bias"}
    matrix = numbers(ours, weight)
    if isinstance(form, Rehearsed):
        matrix = through(matrix, form.form, dims[0], len(weight.batch))
    elif isinstance(form, Lora):
        matrix = matrix + _delta(form, dims, adapter)
        if form.magnitude:
            length = jnp.maximum(length_of(matrix, dims), SHORTEST)
            matrix = matrix * beside(adapter["magnitude"] / length, matrix, dims, inputs=False)
    elif isinstance(form, Scaled):
        matrix = matrix * beside(adapter["factors"], matrix, dims, inputs=form.inputs)
        if "bias" in kept and not form.inputs:
            kept["bias"] = kept["bias"] * adapter["factors"]
    return kept | {"weight": matrix}, length


def _unfolded(form: Form, weight: ParameterSpec, ours: dict, adapter: dict, length: jax.Array | None) -> dict:
    matrix, dims = ours["weight"], dims_of(weight)
    kept = {name: value for name, value in ours.items() if name == "bias"}
    if isinstance(form, Lora):
        if length is not None:
            matrix = matrix * beside(length / adapter["magnitude"], matrix, dims, inputs=False)
        matrix = matrix - _delta(form, dims, adapter)
    else:
        matrix = matrix / beside(adapter["factors"], matrix, dims, inputs=form.inputs)
        if "bias" in kept and not form.inputs:
            kept["bias"] = kept["bias"] / adapter["factors"]
    return kept | {"weight": matrix}


def _delta(form: Lora, dims: tuple[int, int], adapter: dict) -> jax.Array:
    numbers = jax.tree.map(lambda p: p.astype(jnp.float32), adapter)
    return form.scale * thin_product(numbers["a"]["weight"], numbers["b"]["weight"], numbers.get("values"), dims[0])
