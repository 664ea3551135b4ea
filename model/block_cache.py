"""A cache in blocks: sequences grow by a block at a time, and several may read the same ones."""

from dataclasses import dataclass, field, replace
from functools import partial

import jax
import jax.numpy as jnp

from model.attention_rule import MASKED, Rule, TokenInfo, visible
from model.config import ModelConfig
from parallel.sharding import shard, splits

TILE = 128  # keys of a row that are read at a time


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BlockCache:
    """One layer's keys and values in a pool of blocks. Position s of row b lies in block table_BM[b, s // C].

    The pool is flat: block p holds the entries from p * C on. Positions from M * C on mark padding: they are not
    written and see nothing that counts.
    """

    k_PKH: jax.Array
    v_PKH: jax.Array
    table_BM: jax.Array  # int32 blocks of each row, in order
    block: int = field(metadata={"static": True})  # C, tokens of a block

    def write(self, positions_BT: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> "BlockCache":
        """The cache with new entries at their positions, in place where the pool is donated."""
        blocks_BT = jnp.take_along_axis(
            self.table_BM, positions_BT // self.block, axis=1, mode="fill", fill_value=len(self.k_PKH) // self.block
        )
        entries = (blocks_BT * self.block + positions_BT % self.block).reshape(-1)

        def put(pool: jax.Array, new_BTKH: jax.Array) -> jax.Array:
            new = shard(new_BTKH.reshape(-1, *new_BTKH.shape[2:]), None, "kv_heads", "head_dim")
            return pool.at[entries].set(new.astype(pool.dtype), mode="drop")

        return replace(self, k_PKH=put(self.k_PKH, k_BTKH), v_PKH=put(self.v_PKH, v_BTKH))

    def attend(
        self, q_BTNH: jax.Array, info: TokenInfo, *, causal: bool, window, scale: float, softcap: float, **_
    ) -> jax.Array:
        """Attention tile by tile, over as many as the longest row has: one program for rows of all lengths."""
        (B, T, N, H), K, C = q_BTNH.shape, self.k_PKH.shape[1], self.block
        if K % splits("kv_heads"):  # fewer kv heads than tensor shards: a copy for each query head
            K = N
        blocks, M = max(1, TILE // C), self.table_BM.shape[1]
        rule = Rule(partial(visible, causal=causal), scale, softcap, T)
        q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
        q_marks = TokenInfo(info.positions_BT)
        table_BM = jnp.pad(self.table_BM, ((0, 0), (0, -M % blocks)))

        def tile(t, state):
            tables_B = jax.lax.dynamic_slice_in_dim(table_BM, t * blocks, blocks, axis=1)
            entries_BS = (tables_B[:, :, None] * C + jnp.arange(C, dtype=jnp.int32)).reshape(B, blocks * C)
            k_marks = TokenInfo((t * blocks * C + jnp.arange(blocks * C, dtype=jnp.int32))[None])
            k_BSKH, v_BSKH = (self._read(pool, entries_BS, N, K, q_BTNH.dtype) for pool in (self.k_PKH, self.v_PKH))
            return rule.meet(window, state, q_BTKGH, q_marks, k_BSKH, v_BSKH, k_marks)

        names = ("batch", "kv_heads", None, "tokens")
        zeros = partial(jnp.zeros, dtype=jnp.float32)
        state = (
            shard(zeros((B, K, N // K, T, H)), *names, "head_dim"),
            shard(jnp.full((B, K, N // K, T), MASKED, jnp.float32), *names),
            shard(zeros((B, K, N // K, T)), *names),
        )
        length = jnp.max(jnp.where(info.positions_BT < M * C, info.positions_BT + 1, 0))
        out_BKGTH, _, total_BKGT = jax.lax.fori_loop(0, -(-length // (blocks * C)), tile, state)
        out_BKGTH = out_BKGTH / jnp.maximum(total_BKGT, 1e-30)[..., None]
        return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(q_BTNH.shape).astype(q_BTNH.dtype)

    def _read(self, pool: jax.Array, entries_BS: jax.Array, N: int, K: int, dtype) -> jax.Array:
        x_BSKH = pool[entries_BS].astype(dtype)
        if x_BSKH.shape[2] != K:
            x_BSKH = jnp.repeat(x_BSKH, N // x_BSKH.shape[2], axis=2)
        return shard(x_BSKH, "batch", None, "kv_heads", "head_dim")


def make_pool(config: ModelConfig, entries: int, dtype) -> tuple[jax.Array, jax.Array]:
    """Empty keys and values of one layer."""
    zeros = lambda: shard(jnp.zeros((entries, config.kv_heads, config.head_dim), dtype), None, "kv_heads", "head_dim")
    return zeros(), zeros()
