"""Keys and values of the tokens that a model has already read."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from model.config import ModelConfig


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerCache:
    """One layer's cache: slot s of a row holds the row's token at position s. Stacked over layers it is the model's."""

    k_BSKH: jax.Array
    v_BSKH: jax.Array

    def write(self, positions_BT: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> "LayerCache":
        """The cache with new entries at their positions; positions outside of it are dropped."""
        rows_B1 = jnp.arange(self.k_BSKH.shape[0])[:, None]

        def put(cache: jax.Array, new: jax.Array) -> jax.Array:
            return cache.at[rows_B1, positions_BT].set(new.astype(cache.dtype), mode="drop")

        return LayerCache(put(self.k_BSKH, k_BTKH), put(self.v_BSKH, v_BTKH))


def make_cache(config: ModelConfig, batch: int, length: int, dtype=jnp.float32) -> LayerCache:
    """An empty cache of all layers, arrays (L, B, S, K, H) with S = `length` tokens."""
    shape = (config.layers, batch, length, config.kv_heads, config.head_dim)
    return LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
