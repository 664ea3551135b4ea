"""The model that adapters stand on: its weights as a run keeps them, and what of its adapters follows from them."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from compress.forms import numbers_of
from compress.layers import quantise
from finetune.adapters.adaptation import Adaptation
from finetune.adapters.matrices import ADAPTER, Lora, dims_of, length_of
from model.forms import branch, replaced
from model.specs import parameter_specs
from model.transformer import Description
from parallel.sharding import parameter_sharding


def in_base_forms(adaptation: Adaptation, description: Description, params: dict, mesh: Mesh) -> dict:
    """A model's own parameters, floats, as they are kept beneath adapters; the mesh is in context.

    `description` is that of the model without any form, its layers in their own order.
    """
    if not adaptation.base_forms:
        return params
    return quantise(description, params, mesh, adaptation.base_forms, "round")[1]


def begun(description: Description, params: dict, mesh: Mesh) -> dict:
    """The parameters of a run that begins, with what of its adapters follows from the base: the lengths of DoRA."""
    specs = parameter_specs(description.config)
    for path, form in description.forms.items():
        if not (isinstance(form, Lora) and form.magnitude):
            continue
        weight, ours = branch(specs, path)["weight"], branch(params, path)
        spec = branch(description.specs, path)[ADAPTER]["magnitude"]
        kept = {name: value for name, value in ours.items() if name not in ("bias", ADAPTER)}

        def measure(kept, weight=weight, form=form):
            matrix = numbers_of(kept, weight, jnp.float32) if form.base else kept["weight"]
            return length_of(matrix, dims_of(weight))

        length = jax.jit(measure, out_shardings=parameter_sharding(mesh, spec.shape, spec.axes))(kept)
        magnitude = length.astype(ours[ADAPTER]["magnitude"].dtype)
        params = replaced(params, path, ours | {ADAPTER: ours[ADAPTER] | {"magnitude": magnitude}})
    return params
