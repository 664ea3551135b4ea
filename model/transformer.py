"""The decoder stack: embedding, scanned blocks, final norm, head."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from model import parametrization
from model.attention import Attention, TokenInfo
from model.config import ModelConfig
from model.heads import Rows, TokenTable
from model.kv_cache import LayerCache
from model.layers import FeedForward, Norm, dropout, rope_angles
from model.moe import MixtureOfExperts, RouterSums
from model.saved import stackable
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
        self.ffn = None if config.experts else FeedForward(config, ffn)
        self.moe = MixtureOfExperts(config, ffn) if config.experts else None
        self.attention_norm = Norm(config, norm, config.width) if before else None
        self.ffn_norm = Norm(config, norm, config.width) if before else None
        self.attention_post_norm = Norm(config, norm, config.width) if after else None
        self.ffn_post_norm = Norm(config, norm, config.width) if after else None

    @jax.named_scope("block")
    def __call__(
        self,
        x_BTD: jax.Array,
        info: TokenInfo,
        layer: jax.Array,
        window: jax.Array | None = None,
        cache: LayerCache | None = None,
    ) -> tuple[jax.Array, LayerCache | None, RouterSums | None]:
        """x_BTD after the block, its cache, and the sums of its router, if it has one.

        `layer` is the index that separates dropout masks.
        """
        rate, keys_B = self.config.dropout, info.dropout_keys_B
        multiplier = parametrization.residual_multiplier(self.config)

        def half(x_BTD, before, function, after, site):
            h_BTD = x_BTD if before is None else before(x_BTD)
            h_BTD = function(h_BTD)
            h_BTD = dropout(shard(h_BTD, "batch", "residual", "width"), rate, keys_B, site, info.positions_BT)
            if self.config.norm_position == "post":
                return after(x_BTD + h_BTD)
            return x_BTD + parametrization.times(h_BTD if after is None else after(h_BTD), multiplier)

        def whole(h_BTD):  # inside a block heads or ffn are split over tensor, and tokens are not
            # pinned first as the norm leaves it, in the compute dtype, or its float32 insides would be gathered
            return shard(shard(h_BTD, "batch", "residual", "width"), "batch", "tokens", "width")

        @jax.named_scope("attention")
        def attend(h_BTD):
            nonlocal cache
            h_BTD, cache = self.attention(whole(h_BTD), info, window, cache)
            return h_BTD

        @jax.named_scope("ffn" if self.moe is None else "moe")
        def feed(h_BTD):
            nonlocal sums
            if self.moe is None:
                return self.ffn(whole(h_BTD))
            h_BTD, sums = self.moe(h_BTD, info.positions_BT)
            return h_BTD

        sums = None

        x_BTD = half(x_BTD, self.attention_norm, attend, self.attention_post_norm, 2 * layer)
        x_BTD = half(x_BTD, self.ffn_norm, feed, self.ffn_post_norm, 2 * layer + 1)
        return shard(x_BTD, "batch", "residual", "width"), cache, sums


def stack(make: Callable[[jax.Array], nnx.Module], keys: jax.Array) -> nnx.Module:
    """One module whose parameters are those of `make(key)` for every key, stacked on a new first dim."""
    graphdef = nnx.graphdef(nnx.eval_shape(make, keys[0]))
    return nnx.merge(graphdef, jax.vmap(lambda key: nnx.to_pure_dict(nnx.state(make(key))))(keys))


class Transformer(nnx.Module):
    """A decoder, or an encoder where `config.causal` is False."""

    def __init__(
        self, config: ModelConfig, key: jax.Array, slots: tuple[int, ...] | None = None, context_style: str = "ring"
    ):
        """`slots` is the layer in each row of the stacked layers (-1: none), where that is not simply 0, 1, 2 ...
        `context_style` is how attention crosses the context axis, where the mesh has one.
        """
        assert config.vocab_size is not None, "the vocabulary size comes from the tokenizer"
        self.config, self.context_style = config, context_style
        tokens, positions, layers, head = jax.random.split(key, 4)
        self.tokens = TokenTable(config, tokens)
        shape, rows = (config.max_positions, config.width), parametrization.table(config)
        learned = config.positions == "learned"
        self.positions = param(positions, shape, ("positions", "width"), rows) if learned else None
        # a key for each layer by its index, so that a layer's weights do not depend on how many there are
        rows = jnp.asarray(range(config.layers) if slots is None else slots)
        keys = jax.vmap(lambda layer: jax.random.fold_in(layers, layer))(rows)
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
    ) -> tuple[jax.Array, LayerCache | None, RouterSums | None]:
        """Final hidden x_BTD in `dtype` (for `logits`), the cache with these tokens written, and the routers' sums by
        layer if there are experts.

        `positions_BT` default to 0..T-1. `dropout_keys_B` (one key a sequence) switch dropout on. `remat` is none
        or a name of REMAT_POLICIES.
        """
        info = self.info(tokens_BT, positions_BT, segments_BT, dropout_keys_B)
        x_BTD, (cache, sums) = self._blocks(self.embed(tokens_BT, info, dtype), info, cache, remat)
        return self.finish(x_BTD), cache, sums

    def info(self, tokens_BT, positions_BT=None, segments_BT=None, dropout_keys_B=None) -> TokenInfo:
        """What the layers know of the tokens; see `__call__`."""
        in_order = positions_BT is None
        if in_order:
            positions_BT = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None]
        angles = rope_angles(self.config, positions_BT) if self.config.positions == "rotary" else None
        return TokenInfo(positions_BT, segments_BT, angles, dropout_keys_B, self.context_style, in_order)

    def finish(self, x_BTD: jax.Array) -> jax.Array:
        """The last block's output, as the head takes it."""
        return x_BTD if self.final_norm is None else self.final_norm(x_BTD)

    @property
    def _table(self) -> TokenTable:
        return self.tokens if self.head is None else self.head

    def vocabulary(self, parts: int, dtype) -> Rows:
        """The rows of the output table in at least so many parts, with a first dim for the parts."""
        return self._table.cut(parts, dtype)

    @jax.named_scope("head")
    def logits(self, x_BTD: jax.Array, rows: Rows | None = None) -> jax.Array:
        """Float32 logits_BTV of final hidden vectors, for all rows of the output table, V is padded, or for some."""
        x_BTD = parametrization.times(
            shard(x_BTD, "batch", "tokens", "width"), parametrization.logit_multiplier(self.config)
        )
        return self._table.logits(x_BTD, rows or self._table.rows(x_BTD.dtype))

    @jax.named_scope("embed")
    def embed(self, tokens_BT: jax.Array, info: TokenInfo, dtype) -> jax.Array:
        """x_BTD as the first block takes it."""
        multiplier = parametrization.embedding_multiplier(self.config)
        x_BTD = parametrization.times(self.tokens.embed(tokens_BT, dtype), multiplier)
        if self.positions is not None:
            x_BTD = x_BTD + jnp.take(use(self.positions, dtype), info.positions_BT, axis=0)
        return dropout(x_BTD, self.config.dropout, info.dropout_keys_B, EMBEDDING_SITE, info.positions_BT)

    def _blocks(self, x_BTD, info: TokenInfo, cache: LayerCache | None, remat: str):
        c = self.config
        graphdef, parameters = nnx.split(self.layers)
        block = rematerialised(block_of(graphdef), remat, scanned=c.scan_layers)
        if c.scan_layers and cache is None:
            block = stackable(block)

        def body(x_BTD, layer):
            parameters, row, cache = layer
            x_BTD, cache, sums = block(parameters, x_BTD, row, info, cache)
            return x_BTD, (cache, sums)

        xs = (parameters, rows_of(c, range(c.layers)), cache)
        return jax.lax.scan(body, x_BTD, xs, unroll=1 if c.scan_layers else c.layers)


def rows_of(config: ModelConfig, layers: Iterable[int]) -> dict:
    """What a block is told of its place, stacked as its parameters are: its index, and its window if there are any."""
    layers = list(layers)
    rows = {"layer": jnp.asarray(layers, jnp.int32)}
    if any(config.windows()):
        rows["window"] = jnp.asarray([config.windows()[layer] for layer in layers], jnp.int32)
    return rows


def block_of(graphdef: nnx.GraphDef) -> Callable:
    """One layer as a function (parameters, x_BTD, row of `rows_of`, info, cache) -> what Block returns."""

    def block(parameters, x_BTD, row, info, cache=None):
        return nnx.merge(graphdef, parameters)(x_BTD, info, row["layer"], row.get("window"), cache)

    return block


def rematerialised(function: Callable, remat: str, *, scanned: bool) -> Callable:
    """The function, with what the policy `remat` does not save computed again in the backward pass."""
    if remat == "none":
        return function
    return jax.checkpoint(function, policy=REMAT_POLICIES[remat], prevent_cse=not scanned)


@dataclass(frozen=True)
class Description:
    """A model without arrays: what it takes to initialise, lay out, and run its parameters, a nested dict.

    `shapes`, `axes` and `inputs` are nested dicts like the parameters', with ShapeDtypeStructs, tuples of dim names
    and ranges of contracted dims at the leaves (see parallel.sharding.param).
    """

    config: ModelConfig
    graphdef: nnx.GraphDef
    shapes: dict
    axes: dict
    inputs: dict
    slots: tuple[int, ...]  # the layer in each row of the stacked layers; -1: a row of zeros
    block: nnx.GraphDef  # of one layer
    context_style: str  # ring | ulysses | gather: how attention crosses the context axis

    @property
    def factors(self) -> dict:
        """A nested dict like the parameters', with the parametrization.Factors of each at the leaves."""
        return parametrization.factors(self.config, self.axes, self.inputs)

    def init(self, key: jax.Array) -> dict:
        """Draws the parameters, float32: to be jitted with the shardings that they shall have."""
        params = nnx.to_pure_dict(nnx.state(Transformer(self.config, key, self.slots, self.context_style)))
        taken = jnp.asarray(self.slots) >= 0
        drawn = lambda rows: jnp.where(taken.reshape(-1, *[1] * (rows.ndim - 1)), rows, 0)
        return params | {"layers": jax.tree.map(drawn, params["layers"])} if -1 in self.slots else params

    def bind(self, params: dict) -> Transformer:
        """The model with these parameters; what is not used may be left out."""
        return nnx.merge(self.graphdef, self.shapes | params)


def describe(config: ModelConfig, slots: tuple[int, ...] | None = None, context_style: str = "ring") -> Description:
    """The Description of a model on the mesh in context; nothing is allocated.

    `slots` is the layer in each row of the stacked layers, as a pipeline wants them; by default 0, 1, 2 ...
    """
    slots = tuple(range(config.layers)) if slots is None else slots
    model = nnx.eval_shape(lambda: Transformer(config, jax.random.key(0), slots, context_style))
    graphdef, state = nnx.split(model)

    def metadata(name: str) -> dict:
        variables = jax.tree.map(lambda v: getattr(v, name), state, is_leaf=lambda v: isinstance(v, nnx.Variable))
        return nnx.to_pure_dict(variables)

    shapes, block = nnx.to_pure_dict(state), nnx.graphdef(model.layers)
    return Description(config, graphdef, shapes, metadata("axes"), metadata("inputs"), slots, block, context_style)
