"""The decoder stack: embedding, scanned blocks, final norm, head."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from model import parametrization
from model.attention import Attention, TokenInfo
from model.config import ModelConfig
from model.heads import TokenTable
from model.kv_cache import LayerCache
from model.layers import FeedForward, Norm, dropout, rope_angles
from parallel.sharding import param, shard, use

REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names("attention"),
}
EMBEDDING_SITE = 2**20  # dropout site of the embedding; a block uses 2 * layer and 2 * layer + 1


class Block(nnx.Module):
    """Attention, then the feed-forward half, each with its norms, dropout and residual."""

    def __init__(self, config: ModelConfig, key: jax.Array):
        self.config = config
        attention, ffn, norm = jax.random.split(key, 3)
        before, after = config.norm_position in ("pre", "both"), config.norm_position in ("post", "both")
        self.attention = Attention(config, attention)
        self.ffn = FeedForward(config, ffn)
        self.attention_norm = Norm(config, norm, config.width) if before else None
        self.ffn_norm = Norm(config, norm, config.width) if before else None
        self.attention_post_norm = Norm(config, norm, config.width) if after else None
        self.ffn_post_norm = Norm(config, norm, config.width) if after else None

    def __call__(
        self,
        x_BTD: jax.Array,
        info: TokenInfo,
        layer: jax.Array,
        window: jax.Array | None = None,
        cache: LayerCache | None = None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """x_BTD after the block, and its cache. `layer` is the index that separates dropout masks."""
        rate, keys_B = self.config.dropout, info.dropout_keys_B

        def half(x_BTD, before, function, after, site):
            h_BTD = x_BTD if before is None else before(x_BTD)
            # inside a block tokens are whole and heads or ffn are split; between blocks it is the other way round
            h_BTD = function(shard(h_BTD, "batch", "tokens", "width"))
            h_BTD = dropout(shard(h_BTD, "batch", "residual", "width"), rate, keys_B, site)
            if self.config.norm_position == "post":
                return after(x_BTD + h_BTD)
            return x_BTD + (h_BTD if after is None else after(h_BTD))

        def attend(h_BTD):
            nonlocal cache
            h_BTD, cache = self.attention(h_BTD, info, window, cache)
            return h_BTD

        x_BTD = half(x_BTD, self.attention_norm, attend, self.attention_post_norm, 2 * layer)
        x_BTD = half(x_BTD, self.ffn_norm, self.ffn, self.ffn_post_norm, 2 * layer + 1)
        return shard(x_BTD, "batch", "residual", "width"), cache


def stack(make: Callable[[jax.Array], nnx.Module], keys: jax.Array) -> nnx.Module:
    """One module whose parameters are those of `make(key)` for every key, stacked on a new first dim."""
    graphdef = nnx.graphdef(nnx.eval_shape(make, keys[0]))
    return nnx.merge(graphdef, jax.vmap(lambda key: nnx.to_pure_dict(nnx.state(make(key))))(keys))


class Transformer(nnx.Module):
    """A decoder, or an encoder where `config.causal` is False."""

    def __init__(self, config: ModelConfig, key: jax.Array):
        assert config.vocab_size is not None, "the vocabulary size comes from the tokenizer"
        self.config = config
        tokens, positions, layers, head = jax.random.split(key, 4)
        self.tokens = TokenTable(config, tokens)
        shape, rows = (config.max_positions, config.width), parametrization.table(config)
        learned = config.positions == "learned"
        self.positions = param(positions, shape, ("positions", "width"), rows) if learned else None
        # a key for each layer by its index, so that a layer's weights do not depend on how many there are
        keys = jax.vmap(lambda layer: jax.random.fold_in(layers, layer))(jnp.arange(config.layers))
        self.layers = stack(lambda key: Block(config, key), keys)
        self.final_norm = Norm(config, head, config.width) if config.norm_position != "post" else None
        self.head = None if config.tied_embeddings else TokenTable(config, head)

    def __call__(
        self,
        tokens_BT: jax.Array,
        *,
        positions_BT: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
        dropout_keys_B: jax.Array | None = None,
        cache: LayerCache | None = None,
        dtype=jnp.float32,
        remat: str = "none",
    ) -> tuple[jax.Array, LayerCache | None]:
        """Final hidden x_BTD in `dtype` (for `logits`), and the cache with these tokens written.

        `positions_BT` default to 0..T-1. `dropout_keys_B` (one key a sequence) switch dropout on. `remat` is none
        or a name of REMAT_POLICIES.
        """
        c = self.config
        if positions_BT is None:
            positions_BT = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None]
        angles = rope_angles(c, positions_BT) if c.positions == "rotary" else None
        info = TokenInfo(positions_BT, segments_BT, angles, dropout_keys_B)
        x_BTD, cache = self._blocks(self._embed(tokens_BT, info, dtype), info, cache, remat)
        return (x_BTD if self.final_norm is None else self.final_norm(x_BTD)), cache

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Float32 logits_BTV of final hidden vectors; V is padded (see TokenTable)."""
        x_BTD = shard(x_BTD, "batch", "tokens", "width")
        return (self.tokens if self.head is None else self.head).logits(x_BTD)

    def _embed(self, tokens_BT: jax.Array, info: TokenInfo, dtype) -> jax.Array:
        x_BTD = self.tokens.embed(tokens_BT, dtype)
        if self.config.embedding_scale:
            x_BTD = x_BTD * jnp.asarray(self.config.width**0.5, dtype)
        if self.positions is not None:
            x_BTD = x_BTD + jnp.take(use(self.positions, dtype), info.positions_BT, axis=0)
        return dropout(x_BTD, self.config.dropout, info.dropout_keys_B, EMBEDDING_SITE)

    def _blocks(self, x_BTD, info: TokenInfo, cache: LayerCache | None, remat: str):
        c = self.config
        graphdef, parameters = nnx.split(self.layers)
        windows = jnp.asarray(c.windows(), jnp.int32) if any(c.windows()) else None

        def body(x_BTD, layer):
            index, parameters, window, cache = layer
            return nnx.merge(graphdef, parameters)(x_BTD, info, index, window, cache)

        if remat != "none":
            body = jax.checkpoint(body, policy=REMAT_POLICIES[remat], prevent_cse=not c.scan_layers)
        xs = (jnp.arange(c.layers, dtype=jnp.int32), parameters, windows, cache)
        return jax.lax.scan(body, x_BTD, xs, unroll=1 if c.scan_layers else c.layers)


@dataclass(frozen=True)
class Description:
    """A model without arrays: what it takes to initialise, lay out, and run its parameters, a nested dict.

    `shapes`, `axes` and `inputs` are nested dicts like the parameters', with ShapeDtypeStructs, tuples of dim names
    and numbers of contracted dims at the leaves (see parallel.sharding.param).
    """

    config: ModelConfig
    graphdef: nnx.GraphDef
    shapes: dict
    axes: dict
    inputs: dict

    def init(self, key: jax.Array) -> dict:
        """Draws the parameters, float32: to be jitted with the shardings that they shall have."""
        return nnx.to_pure_dict(nnx.state(Transformer(self.config, key)))

    def bind(self, params: dict) -> Transformer:
        """The model with these parameters."""
        return nnx.merge(self.graphdef, params)


def describe(config: ModelConfig) -> Description:
    """The Description of a model on the mesh in context; nothing is allocated."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Transformer(config, jax.random.key(0))))

    def metadata(name: str) -> dict:
        variables = jax.tree.map(lambda v: getattr(v, name), state, is_leaf=lambda v: isinstance(v, nnx.Variable))
        return nnx.to_pure_dict(variables)

    return Description(config, graphdef, nnx.to_pure_dict(state), metadata("axes"), metadata("inputs"))
