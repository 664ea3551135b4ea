"""A cache in blocks against a row of slots for each sequence: the same attention, wherever the blocks lie."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engines import BASE

from model.attention_rule import TokenInfo
from model.block_cache import TILE, BlockCache, make_pool
from model.kv_cache import LayerCache

BLOCK, ROWS, KEYS = 16, 3, 2 * TILE + 40
HOW = {"causal": True, "scale": 0.3, "softcap": 0.0, "windows": (0,)}


def caches(config, dtype=jnp.float32):
    """The two caches, the second with its blocks in a random order and one block too many."""
    blocks = -(-KEYS // BLOCK)
    table_BM = np.random.default_rng(1).permutation(ROWS * blocks + 1)[: ROWS * blocks].reshape(ROWS, blocks)
    slots = jnp.zeros((ROWS, KEYS, config.kv_heads, config.head_dim))
    pool = make_pool(config, (ROWS * blocks + 1) * BLOCK, dtype)
    return LayerCache(slots, slots), BlockCache(pool, pool, jnp.asarray(table_BM, jnp.int32), BLOCK)


def tokens(config, *shape):
    rng = np.random.default_rng(sum(shape))
    return jnp.asarray(rng.normal(size=(*shape, config.head_dim)), jnp.float32)


@pytest.mark.parametrize("how", [{}, {"softcap": 2.0}, {"window": jnp.int32(20)}], ids=["plain", "softcap", "window"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_blocks_are_rows(how, kv_heads):
    config = replace(BASE, kv_heads=kv_heads)
    row, block = caches(config)
    q = jax.jit(lambda cache, q, p: cache.attend(q, TokenInfo(p), **{"window": None} | HOW | how))
    starts = np.array([0, 7, TILE - 3])
    for count, lengths in ((TILE + 9, (TILE + 9, 30, 2)), (1, (1, 1, 1)), (5, (5, 1, 3))):
        there = np.arange(count) < np.array(lengths)[:, None]
        positions = np.where(there, starts[:, None] + np.arange(count), block.table_BM.shape[1] * BLOCK).astype(
            np.int32
        )
        k, v = tokens(config, ROWS, count, kv_heads), tokens(config, ROWS, count, kv_heads) + 1
        row, block = row.write(positions, k, v), block.write(positions, k, v)
        queries = tokens(config, ROWS, count, config.heads)
        np.testing.assert_allclose(
            np.asarray(q(block, queries, positions))[there], np.asarray(q(row, queries, positions))[there], atol=2e-6
        )
        starts = starts + np.array(lengths)


def test_eight_bits_are_within_a_unit():
    config = BASE
    _, block = caches(config, jnp.int8)
    positions = jnp.arange(40, dtype=jnp.int32)[None].repeat(ROWS, 0)
    k, v = tokens(config, ROWS, 40, config.kv_heads), tokens(config, ROWS, 40, config.kv_heads) * 9
    block = block.write(positions, k, v)
    for pool, x in ((block.keys, k), (block.values, v)):
        found = pool.get(block.table_BM, BLOCK, jnp.float32).transpose(1, 2, 0, 3)[:, :40]
        unit = np.abs(np.asarray(x)).max(-1, keepdims=True) / 127
        assert (np.abs(np.asarray(found) - np.asarray(x)) <= unit * 0.5001).all()
