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

    The pool is flat, with heads first as matmuls want them: block p holds the entries from p * C on. Positions from
    M * C on mark padding: they are not written and see nothing that counts.
    """

    k_KPH: jax.Array
    v_KPH: jax.Array
    table_BM: jax.Array  # int32 blocks of each row, in order
    block: int = field(metadata={"static": True})  # C, tokens of a block

    def write(self, positions_BT: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> "BlockCache":
        """The cache with new entries at their positions, in place where the pool is donated."""
        nowhere = self.k_KPH.shape[1] // self.block
        blocks_BT = jnp.take_along_axis(
            self.table_BM, positions_BT // self.block, axis=1, mode="fill", fill_value=nowhere
        )
        entries = (blocks_BT * self.block + positions_BT % self.block).reshape(-1)

        def put(pool_KPH: jax.Array, new_BTKH: jax.Array) -> jax.Array:
            new_KnH = new_BTKH.transpose(2, 0, 1, 3).reshape(len(pool_KPH), -1, new_BTKH.shape[3])
            new_KnH = shard(new_KnH, "kv_heads", None, "head_dim")
            put_head = lambda pool_PH, new_nH: pool_PH.at[entries].set(new_nH, mode="drop")
            return jax.vmap(put_head)(pool_KPH, new_KnH.astype(pool_KPH.dtype))

        return replace(self, k_KPH=put(self.k_KPH, k_BTKH), v_KPH=put(self.v_KPH, v_BTKH))

    def attend(
        self, q_BTNH: jax.Array, info: TokenInfo, *, causal: bool, window, scale: float, softcap: float, **_
    ) -> jax.Array:
        """Attention tile by tile, over as many as the longest row has: one program for rows of all lengths.

        Softmax is taken as tiles come (arXiv 2205.14135).
        """
        (B, T, N, H), K, C, dtype = q_BTNH.shape, len(self.k_KPH), self.block, q_BTNH.dtype
        if K % splits("kv_heads"):  # fewer kv heads than tensor shards: a copy for each query head
            K = N
        G, blocks, M = N // K, max(1, TILE // C), self.table_BM.shape[1]
        rule = Rule(partial(visible, causal=causal), scale, softcap, T)
        heads = lambda x: shard(x, "kv_heads", "batch", *[None] * (x.ndim - 2))
        q_KBRH = heads(q_BTNH.reshape(B, T, K, G, H).transpose(2, 0, 3, 1, 4).reshape(K, B, G * T, H))
        q_marks, S = TokenInfo(info.positions_BT), blocks * C
        table_BM = jnp.pad(self.table_BM, ((0, 0), (0, -M % blocks)))
        product = partial(jnp.einsum, preferred_element_type=jnp.float32)

        def read(pool_KPH, entries_BS):
            heads_K11 = jnp.arange(len(pool_KPH), dtype=jnp.int32)[:, None, None]
            if splits("kv_heads") == 1:  # one long list of entries: they are gathered as the matmul wants them
                x_KBSH = pool_KPH.reshape(-1, H)[heads_K11 * pool_KPH.shape[1] + entries_BS]
            else:
                x_KBSH = jax.vmap(lambda pool_PH: pool_PH[entries_BS])(pool_KPH)
            x_KBSH = x_KBSH.astype(dtype)
            return heads(jnp.repeat(x_KBSH, N // len(x_KBSH), axis=0) if len(x_KBSH) != K else x_KBSH)

        def tile(t, state):
            out_KBRH, top_KBR, total_KBR = state
            tables_B = jax.lax.dynamic_slice_in_dim(table_BM, t * blocks, blocks, axis=1)
            entries_BS = (tables_B[:, :, None] * C + jnp.arange(C, dtype=jnp.int32)).reshape(B, S)
            k_marks = TokenInfo((t * S + jnp.arange(S, dtype=jnp.int32))[None])
            seen_BRS = jnp.tile(rule.visible(q_marks, k_marks, window), (1, G, 1))
            scores = rule.cap(scale * product("KBRH,KBSH->KBRS", q_KBRH, read(self.k_KPH, entries_BS)))
            scores = jnp.where(seen_BRS, scores, MASKED)
            higher_KBR = jnp.maximum(top_KBR, scores.max(-1))
            kept_KBR = jnp.exp(top_KBR - higher_KBR)
            # masked again: where a row has seen nothing yet, its maximum is MASKED too
            weights = jnp.where(seen_BRS, jnp.exp(scores - higher_KBR[..., None]), 0)
            new_KBRH = product("KBRS,KBSH->KBRH", weights.astype(dtype), read(self.v_KPH, entries_BS))
            return out_KBRH * kept_KBR[..., None] + new_KBRH, higher_KBR, total_KBR * kept_KBR + weights.sum(-1)

        state = (jnp.zeros((K, B, G * T, H)), jnp.full((K, B, G * T), MASKED), jnp.zeros((K, B, G * T)))
        length = jnp.max(jnp.where(info.positions_BT < M * C, info.positions_BT + 1, 0))
        out_KBRH, _, total_KBR = jax.lax.fori_loop(0, -(-length // S), tile, jax.tree.map(heads, state))
        out_KBRH = out_KBRH / jnp.maximum(total_KBR, 1e-30)[..., None]
        out_KBGTH = out_KBRH.reshape(K, B, G, T, H)
        return out_KBGTH.transpose(1, 3, 0, 2, 4).reshape(q_BTNH.shape).astype(dtype)


def make_pool(config: ModelConfig, entries: int, dtype) -> tuple[jax.Array, jax.Array]:
    """Empty keys and values of one layer."""
    zeros = lambda: shard(jnp.zeros((config.kv_heads, entries, config.head_dim), dtype), "kv_heads", None, "head_dim")
    return zeros(), zeros()
