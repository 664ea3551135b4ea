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
class Pool:
    """The keys, or the values, of one layer's blocks: entry p of head k. Heads come first, as matmuls want them.

    In 8 bits an entry of a head is its largest magnitude / 127, a float32, and integers in units of it. Floats of 16
    bits are kept as integers of the same bits: XLA for CPUs widens all of such floats to change or to read a few.
    """

    x_KPH: jax.Array
    dtype: jnp.dtype = field(metadata={"static": True})
    scale_KP: jax.Array | None = None

    def put(self, entries_n: jax.Array, x_nKH: jax.Array) -> "Pool":
        """With x_nKH in the entries of these numbers; a number beyond the last entry drops what it is given."""
        x_KnH = shard(x_nKH.transpose(1, 0, 2), "kv_heads", None, "head_dim")
        put_heads = jax.vmap(lambda pool_P, new_n: pool_P.at[entries_n].set(new_n, mode="drop"))
        if self.scale_KP is None:
            return replace(self, x_KPH=put_heads(self.x_KPH, _to_bits(x_KnH.astype(self.dtype))))
        x_KnH = x_KnH.astype(jnp.float32)
        scale_Kn = jnp.abs(x_KnH).max(-1) / 127
        units_KnH = jnp.round(x_KnH / jnp.maximum(scale_Kn, 1e-30)[..., None]).astype(jnp.int8)
        return replace(self, x_KPH=put_heads(self.x_KPH, units_KnH), scale_KP=put_heads(self.scale_KP, scale_Kn))

    def get(self, blocks_Bm: jax.Array, block: int, dtype) -> jax.Array:
        """(K, B, S, H) of the entries of these blocks, in `dtype`; S = m * `block`."""
        x_KBSH = _of_bits(_of_blocks(self.x_KPH, blocks_Bm, block), self.dtype)
        if self.scale_KP is None:
            return x_KBSH.astype(dtype)
        return (x_KBSH * _of_blocks(self.scale_KP, blocks_Bm, block)[..., None]).astype(dtype)


def _to_bits(x: jax.Array) -> jax.Array:
    return x if x.dtype.itemsize != 2 else jax.lax.bitcast_convert_type(x, jnp.uint16)


def _of_bits(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return x if x.dtype == dtype else jax.lax.bitcast_convert_type(x, dtype)


def _of_blocks(pool_KP: jax.Array, blocks_Bm: jax.Array, block: int) -> jax.Array:
    K, P, *rest = pool_KP.shape
    in_blocks = pool_KP.reshape(K, P // block, block, *rest)
    if splits("kv_heads") > 1:
        x = jax.vmap(lambda pool: pool.at[blocks_Bm].get(mode="clip"))(in_blocks)
    else:  # one long list of blocks: they are gathered in the order that the matmul wants
        first_K11 = P // block * jnp.arange(K, dtype=jnp.int32)[:, None, None]
        x = in_blocks.reshape(-1, block, *rest).at[first_K11 + blocks_Bm].get(mode="clip")
    return x.reshape(K, len(blocks_Bm), -1, *rest)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BlockCache:
    """One layer's keys and values in a pool of blocks. Position s of row b lies in block table_BM[b, s // C].

    Block p holds the entries from p * C on. Positions from M * C on mark padding: they are not written and see nothing
    that counts.
    """

    keys: Pool
    values: Pool
    table_BM: jax.Array  # int32 blocks of each row, in order
    block: int = field(metadata={"static": True})  # C, tokens of a block

    def write(self, positions_BT: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> "BlockCache":
        """The cache with new entries at their positions, in place where the pool is donated."""
        nowhere = self.keys.x_KPH.shape[1] // self.block
        blocks_BT = jnp.take_along_axis(
            self.table_BM, positions_BT // self.block, axis=1, mode="fill", fill_value=nowhere
        )
        entries_n = (blocks_BT * self.block + positions_BT % self.block).reshape(-1)
        flat = lambda x_BTKH: x_BTKH.reshape(-1, *x_BTKH.shape[2:])
        keys, values = self.keys.put(entries_n, flat(k_BTKH)), self.values.put(entries_n, flat(v_BTKH))
        return replace(self, keys=keys, values=values)

    def attend(
        self, q_BTNH: jax.Array, info: TokenInfo, *, causal: bool, window, scale: float, softcap: float, **_
    ) -> jax.Array:
        """Attention tile by tile, over as many as the longest row has: one program for rows of all lengths.

        Softmax is taken as tiles come (arXiv 2205.14135).
        """
        (B, T, N, H), K, C, dtype = q_BTNH.shape, len(self.keys.x_KPH), self.block, q_BTNH.dtype
        if K % splits("kv_heads"):  # fewer kv heads than tensor shards: a copy for each query head
            K = N
        G, blocks, M = N // K, max(1, TILE // C), self.table_BM.shape[1]
        rule = Rule(partial(visible, causal=causal), scale, softcap, T)
        heads = lambda x: shard(x, "kv_heads", "batch", *[None] * (x.ndim - 2))
        q_KBRH = heads(q_BTNH.reshape(B, T, K, G, H).transpose(2, 0, 3, 1, 4).reshape(K, B, G * T, H))
        q_marks, S = TokenInfo(info.positions_BT), blocks * C
        table_BM = jnp.pad(self.table_BM, ((0, 0), (0, -M % blocks)))
        product = partial(jnp.einsum, preferred_element_type=jnp.float32)

        def read(pool, blocks_Bm):
            x_KBSH = pool.get(blocks_Bm, C, dtype)
            return heads(jnp.repeat(x_KBSH, N // len(x_KBSH), axis=0) if len(x_KBSH) != K else x_KBSH)

        def tile(t, state):
            out_KBRH, top_KBR, total_KBR = state
            blocks_Bm = jax.lax.dynamic_slice_in_dim(table_BM, t * blocks, blocks, axis=1)
            k_marks = TokenInfo((t * S + jnp.arange(S, dtype=jnp.int32))[None])
            seen_BRS = jnp.tile(rule.visible(q_marks, k_marks, window), (1, G, 1))
            scores = rule.cap(scale * product("KBRH,KBSH->KBRS", q_KBRH, read(self.keys, blocks_Bm)))
            scores = jnp.where(seen_BRS, scores, MASKED)
            higher_KBR = jnp.maximum(top_KBR, scores.max(-1))
            kept_KBR = jnp.exp(top_KBR - higher_KBR)
            # masked again: where a row has seen nothing yet, its maximum is MASKED too
            weights = jnp.where(seen_BRS, jnp.exp(scores - higher_KBR[..., None]), 0)
            new_KBRH = product("KBRS,KBSH->KBRH", weights.astype(dtype), read(self.values, blocks_Bm))
            return out_KBRH * kept_KBR[..., None] + new_KBRH, higher_KBR, total_KBR * kept_KBR + weights.sum(-1)

        state = (jnp.zeros((K, B, G * T, H)), jnp.full((K, B, G * T), MASKED), jnp.zeros((K, B, G * T)))
        length = jnp.max(jnp.where(info.positions_BT < M * C, info.positions_BT + 1, 0))
        out_KBRH, _, total_KBR = jax.lax.fori_loop(0, -(-length // S), tile, jax.tree.map(heads, state))
        out_KBRH = out_KBRH / jnp.maximum(total_KBR, 1e-30)[..., None]
        out_KBGTH = out_KBRH.reshape(K, B, G, T, H)
        return out_KBGTH.transpose(1, 3, 0, 2, 4).reshape(q_BTNH.shape).astype(dtype)


def make_pool(config: ModelConfig, entries: int, dtype) -> Pool:
    """Empty keys, or values, of one layer; int8 is an own format, other dtypes are kept as they are."""
    heads, dtype = (config.kv_heads, entries), jnp.dtype(dtype)
    x_KPH = shard(_to_bits(jnp.zeros((*heads, config.head_dim), dtype)), "kv_heads", None, "head_dim")
    return Pool(x_KPH, dtype, shard(jnp.zeros(heads), "kv_heads", None) if dtype == jnp.int8 else None)
