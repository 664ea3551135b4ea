"""Adapters beside the models of engines.py: as an engine takes them, and merged, as `generate` takes them."""

import functools
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from engines import opened

from finetune.adapter_config import AdaLoraConfig, LoraConfig
from finetune.adapters.adaptation import adaptation, is_adapter
from finetune.adapters.base import begun, in_base_forms
from finetune.adapters.merging import merge
from inference.adapter_books import Adapter
from inference.adapters import values_of
from inference.opening import Opened
from model.transformer import describe
from training.trainable import chosen, joined

KINDS = {
    "lora": LoraConfig(rank=3),
    "attention": LoraConfig(rank=2, targets=("attention/*",)),
    "dora": LoraConfig(rank=4, scaling="rslora", dora=True),
    "adalora": AdaLoraConfig(rank=2, initial_rank=3),
    "qlora": LoraConfig(rank=3, base="nf4", group=8),
    "qdora": LoraConfig(rank=2, base="nf4", group=8, dora=True),
}


@functools.cache
def adapted(kind: str, model: str = "grouped", mesh=()) -> tuple[Opened, Opened, Adapter]:
    """The base as a run of this kind keeps it, the model with the adapter merged into it, and the adapter."""
    plain, config = opened(model, mesh), KINDS[kind]
    adapts, random = adaptation(config, plain.config.model, 10), np.random.default_rng(len(kind))
    with jax.set_mesh(plain.mesh):
        description = describe(plain.config.model, forms=adapts.forms)
        params = in_base_forms(adapts, plain.description, plain.params, plain.mesh)
        base = replace(plain, description=describe(plain.config.model, forms=adapts.base_forms), params=params)
        drawn = chosen(jax.jit(description.init)(jax.random.key(1)), is_adapter)
        params = begun(description, joined(params, drawn), plain.mesh)
        stir = lambda p: p + 0.1 * random.normal(size=p.shape).astype(np.float32)
        params = joined(params, jax.tree.map(stir, chosen(params, is_adapter)))
        merged = merge(description, params, plain.mesh)
    values = values_of(adapts, jax.device_get(chosen(params, is_adapter)))
    rank = max(own["a"].shape[-1] for own in values.values())
    whole = replace(plain, params=merged.params)
    return base, whole, Adapter(kind, Path(kind), f"digest of {kind}", rank, values)
