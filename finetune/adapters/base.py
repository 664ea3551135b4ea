"""The model that adapters stand on: its weights as a run keeps them, and what of its adapters follows from them."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from compress.layers import quantise
from finetune.adapters.adaptation import Adaptation
from finetune.adapters.matrices import ADAPTER, Lora, Narrow, dims_of, length_of, numbers
from model.forms import branch, replaced
from model.specs import parameter_specs
from model.transformer import Description
from parallel.sharding import parameter_sharding


def in_base_forms(adaptation: Adaptation, description: Description, params: dict, mesh: Mesh) -> dict:
    """A model's own parameters, floats, as they are kept beneath adapters; the mesh is in context.

    `description` is that of the model without any form, its layers in their own order.
    """
    forms = adaptation.base_forms
    if all(isinstance(form, Narrow) for form in forms.values()):
        for path in forms:
            kept = branch(params, path)
            params = replaced(params, path, kept | {"weight": kept["weight"].astype(jnp.bfloat16)})
        return params
    return quantise(description, params, mesh, forms, "round")[1]


def begun(description: Description, params: dict, mesh: Mesh) -> dict:
    """The parameters of a run that begins, with what of its adapters follows from the base: the lengths of DoRA."""
    specs = parameter_specs(description.config)
    for path, form in description.forms.items():
        if not (isinstance(form, Lora) and form.magnitude):
            continue
        weight, ours = branch(specs, path)["weight"], branch(params, path)
        spec = branch(description.specs, path)[ADAPTER]["magnitude"]
        measure = jax.jit(
            lambda ours, weight=weight: length_of(numbers(ours, weight), dims_of(weight)),
            out_shardings=parameter_sharding(mesh, spec.shape, spec.axes),
        )
        length = measure(ours)
        magnitude = length.astype(ours[ADAPTER]["magnitude"].dtype)
        params = replaced(params, path, ours | {ADAPTER: ours[ADAPTER] | {"magnitude": magnitude}})
    return params
