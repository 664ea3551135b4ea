"""The parameters of an opened model as plain numbers, and its logits to compare an export with."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compress.forms import dense
from finetune.adapters.merging import merge
from inference.generate import exact_matmuls
from inference.opening import Found, Opened
from model.config import LABELLED, MASKED_LM, ModelConfig
from model.specs import map_specs, parameter_specs
from model.transformer import Transformer, describe
from parallel.sharding import splits


def plain_params(found: Found, model: Opened) -> dict:
    """Parameters on the model's mesh without forms: adapters are merged, codes are the numbers that they stand for.

    Raises ValueError for adapters that are no matrix.
    """
    with jax.set_mesh(model.mesh):
        if model.config.adapter.kind != "none":
            return merge(model.description, model.params, model.mesh).params
        return dense(model.description, model.params) if found.forms else model.params


def as_arrays(config: ModelConfig, params: dict) -> dict:
    """NumPy float32 arrays of plain parameters, a nested dict like them. Rows of tables that are padding are left out.

    Of a parameter of the layers the first dim stays the layer.
    """
    specs = parameter_specs(config)

    def read(spec, value):
        value = np.asarray(jax.device_get(value)).astype(np.float32)
        return value if spec.rows is None else value[: spec.rows]

    return jax.tree.map(read, map_specs(lambda spec: spec, specs), params)


def portable(config: ModelConfig) -> ModelConfig:
    """The same model without what is chosen for one platform or for training."""
    return replace(config, attention_kernel="plain", matmul_dtype="", dropout=0.0, scan_layers=True)


def outputs(model: Transformer, tokens_BT: jax.Array, dtype: Any) -> jax.Array:
    """What a model says of tokens: float32 logits_BTV without padding; of the head `pooler` its vector, (B, D); of
    those of labels their logits_BTC, of a whole sequence logits_BC; without a head final vectors x_BTD.
    """
    c = model.config
    positions_BT = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None]  # given, since none of them is known yet
    x_BTD = model(tokens_BT, positions_BT=positions_BT, dtype=dtype)[0]
    if c.head in ("vocabulary", *MASKED_LM):
        return model.logits(x_BTD)[..., : c.vocab_size]
    if c.head == "pooler":
        return model.pooled(x_BTD).astype(jnp.float32)
    if c.head in LABELLED:
        if c.head != "classes":
            return model.label_logits(x_BTD)
        return model.label_logits(x_BTD[:, -1:] if c.causal else x_BTD[:, :1])[:, 0]
    return x_BTD.astype(jnp.float32)


def reference(model: Opened, params: dict, dtype: Any = jnp.float32) -> Callable[[np.ndarray], np.ndarray]:
    """What the model itself says of tokens (B, T), as `outputs`, on its mesh, from plain parameters."""
    config = model.config.model
    with jax.set_mesh(model.mesh):
        description, batch, residual = describe(portable(config)), splits("batch"), splits("residual")
    run = jax.jit(lambda params, tokens_BT: outputs(description.bind(params), tokens_BT, dtype))

    def said(tokens_BT: np.ndarray) -> np.ndarray:
        B, T = tokens_BT.shape
        more = -T % residual if config.causal and config.head == "vocabulary" else 0  # which no token before them sees
        padded = np.pad(tokens_BT, ((0, -B % batch), (0, more)), mode="edge")
        with jax.set_mesh(model.mesh), exact_matmuls(dtype):
            found = np.asarray(jax.device_get(run(params, jnp.asarray(padded, jnp.int32))))[:B]
        return found[:, :T] if more else found

    return said
