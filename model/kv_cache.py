"""Keys and values of the tokens that a model has already read.

A cache is given to attention with two methods: `write` puts the keys and values of new tokens at their positions, and
`attend` lets queries see what is written. `LayerCache` has a row of slots for each sequence; model/block_cache.py has
blocks that sequences share.
"""

from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp

from model.attention import attention
from model.attention_rule import TokenInfo
from model.config import ModelConfig


class Cache(Protocol):
    """What attention asks of the cache of its layer."""

    def write(self, positions_BT: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> "Cache":
        """The cache with new entries at their positions; positions outside of it are dropped."""

    def attend(self, q_BTNH: jax.Array, info: TokenInfo, **how) -> jax.Array:
        """(B, T, N, H) of queries at `info.positions_BT`; `how` is what model.attention.attention takes by name."""


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

    def attend(self, q_BTNH: jax.Array, info: TokenInfo, **how) -> jax.Array:
        """Attention (B, T, N, H) of queries to all S slots; `how` is what `model.attention.attention` takes besides."""
        k_BSKH, v_BSKH = self.k_BSKH.astype(q_BTNH.dtype), self.v_BSKH.astype(q_BTNH.dtype)
        # slot s holds position s, and the causal mask hides slots that are not written yet
        k_info = TokenInfo(jnp.arange(k_BSKH.shape[1], dtype=jnp.int32)[None])
        return attention(q_BTNH, k_BSKH, v_BSKH, info, k_info, kernel="plain", **how)


def make_cache(config: ModelConfig, batch: int, length: int, dtype=jnp.float32) -> LayerCache:
    """An empty cache of all layers, arrays (L, B, S, K, H) with S = `length` tokens."""
    shape = (config.layers, batch, length, config.kv_heads, config.head_dim)
    return LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
