"""The decoder stack: embedding, scanned blocks, final norm, head."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from model import parametrization
from model.attention_kernels import is_kernel
from model.attention_rule import TokenInfo
from model.config import LABELLED, MASKED_LM, ModelConfig
from model.forms import Forms, of_block, put_in, with_forms
from model.heads import Embedding, VocabularyRows
from model.in_turn import first_turn, take_turn
from model.initialise import draw_all
from model.kv_cache import Cache
from model.layers import Attention, FeedForward, Norm, activate, dropout, times
from model.moe import MixtureOfExperts, RouterSums
from model.platforms import choices
from model.projection import Projection, param
from model.rotary import rope_angles
from model.saved import stackable
from model.specs import LAYERS, Specs, map_specs, parameter_specs
from parallel.sharding import cast_and_gather, parameter_sharding, shard, splits

policies = jax.checkpoint_policies
REMAT_POLICIES = {
    "full": policies.nothing_saveable,
    "dots": policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, is_kernel),
    "attention": policies.save_from_both_policies(policies.save_only_these_names("attention"), is_kernel),
}
EMBEDDING_SITE = 2**20  # dropout site of the embedding; a block uses 2 * layer and 2 * layer + 1


class Block(nnx.Module):
    """Attention, then the feed-forward half, each with its norms, dropout and residual."""

    def __init__(self, config: ModelConfig, specs: Specs):
        self.config = config
        norm = lambda name: Norm(config, specs[name]) if name in specs else None
        self.attention = Attention(config, specs["attention"])
        self.ffn = None if config.experts else FeedForward(config, specs["ffn"])
        self.moe = MixtureOfExperts(config, specs["moe"]) if config.experts else None
        self.attention_norm, self.attention_post_norm = norm("attention_norm"), norm("attention_post_norm")
        self.ffn_norm, self.ffn_post_norm = norm("ffn_norm"), norm("ffn_post_norm")

    @jax.named_scope("block")
    def __call__(
        self,
        x_BTD: jax.Array,
        info: TokenInfo,
        layer: jax.Array,
        window: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> tuple[jax.Array, Cache | None, RouterSums | None]:
        """x_BTD after the block, its cache, and the sums of its router, if it has one.

        `layer` is the index that separates dropout masks.
        """
        input_BTD = x_BTD
        h_BTD = x_BTD if self.attention_norm is None else self.attention_norm(x_BTD)
        with jax.named_scope("attention"):
            h_BTD, cache = self.attention(whole_tokens(h_BTD), info, window, cache)
        x_BTD = self._add(x_BTD, h_BTD, self.attention_post_norm, 2 * layer, info)

        h_BTD, sums = input_BTD if self.config.parallel_block else x_BTD, None
        h_BTD = h_BTD if self.ffn_norm is None else self.ffn_norm(h_BTD)
        with jax.named_scope("ffn" if self.moe is None else "moe"):
            if self.moe is None:
                h_BTD = self.ffn(whole_tokens(h_BTD))
            else:
                h_BTD, sums = self.moe(h_BTD, info)
        x_BTD = self._add(x_BTD, h_BTD, self.ffn_post_norm, 2 * layer + 1, info)
        return shard(x_BTD, "batch", "residual", "width"), cache, sums

    def _add(self, x_BTD: jax.Array, h_BTD: jax.Array, post_norm: Norm | None, site: jax.Array, info: TokenInfo):
        """The residual stream after one half of the block has spoken; `site` separates dropout masks."""
        h_BTD = shard(h_BTD, "batch", "residual", "width")
        h_BTD = dropout(h_BTD, self.config.dropout, info.dropout_keys_B, site, info.positions_BT)
        if self.config.norm_position == "post":
            return post_norm(x_BTD + h_BTD)
        h_BTD = h_BTD if post_norm is None else post_norm(h_BTD)
        return x_BTD + times(h_BTD, parametrization.residual_multiplier(self.config))


def whole_tokens(h_BTD: jax.Array) -> jax.Array:
    """A block's input as its matrices need it: heads or ffn will be split over tensor, and tokens are not.

    It is pinned first as the norm leaves it, in the compute dtype: else the norm's float32 insides would be gathered.
    """
    return shard(shard(h_BTD, "batch", "residual", "width"), "batch", "tokens", "width")


class Transformer(nnx.Module):
    """A decoder, or an encoder where `config.causal` is False."""

    def __init__(self, config: ModelConfig, specs: Specs, context_style: str = "ring"):
        """`specs` is the tree of model.specs.parameter_specs; `context_style` how attention crosses the context axis,
        where the mesh has one.
        """
        self.config, self.context_style = config, context_style
        self.tokens = Embedding(config, specs["tokens"])
        self.positions = param(specs["positions"]) if "positions" in specs else None
        self.types = param(specs["types"]) if "types" in specs else None
        self.embedding_norm = Norm(config, specs["embedding_norm"]) if "embedding_norm" in specs else None
        self.layers = Block(config, specs["layers"])  # one block, with the parameters of all stacked
        self.final_norm = Norm(config, specs["final_norm"]) if "final_norm" in specs else None
        self.head = Embedding(config, specs["head"]) if "head" in specs else None
        self.head_dense = Projection(specs["head_dense"]) if "head_dense" in specs else None
        self.head_norm = Norm(config, specs["head_norm"]) if "head_norm" in specs else None
        self.head_bias = param(specs["head_bias"]) if "head_bias" in specs else None
        self.head_labels = Projection(specs["head_labels"]) if "head_labels" in specs else None

    def __call__(
        self,
        tokens_BT: jax.Array,
        *,
        positions_BT: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
        places_BT: jax.Array | None = None,
        dropout_keys_B: jax.Array | None = None,
        mask_BT: jax.Array | None = None,
        types_BT: jax.Array | None = None,
        lengths_BT: jax.Array | None = None,
        cache: Cache | None = None,
        dtype=jnp.float32,
        remat: str = "none",
    ) -> tuple[jax.Array, Cache | None, RouterSums | None]:
        """Final hidden x_BTD in `dtype` (for `logits`), the cache with these tokens written, and the routers' sums by
        layer if there are experts.

        `positions_BT`, the order of a row's tokens, default to 0..T-1; `places_BT`, their places in their documents,
        which rotary and learned positions embed, to the same. `dropout_keys_B` (one key a sequence) switch dropout on.
        `mask_BT` says which tokens count in the routers' auxiliary losses, by default all; `types_BT` of which kind
        each token is, by default 0; `lengths_BT` how long the sequence of each token is for rotary positions that scale
        with it, by default the longest of the batch.
        `remat` is none or a name of REMAT_POLICIES.
        """
        c = self.config
        info = self.info(tokens_BT, positions_BT, segments_BT, places_BT, dropout_keys_B, mask_BT, types_BT, lengths_BT)
        graphdef, parameters = nnx.split(self.layers)
        if c.scan_layers and cache is None and choices().cast_before_scan:
            parameters = in_compute_dtype(graphdef, parameters, dtype)
        block = rematerialised(block_of(graphdef), remat, scanned=c.scan_layers)
        if c.scan_layers and cache is None:
            block = stackable(block)

        in_turn = not c.scan_layers and remat != "none"
        if in_turn:
            computed = jax.eval_shape(lambda params: in_compute_dtype(graphdef, params, dtype), parameters)
            dtypes = tuple(leaf.dtype for leaf in jax.tree.leaves(computed))

        def layer(carry, its):
            (x_BTD, turn), (parameters, row, cache) = carry, its
            if in_turn:
                parameters, x_BTD, turn = take_turn(dtypes, parameters, x_BTD, turn)
            x_BTD, cache, sums = block(parameters, x_BTD, row, info, cache)
            return (x_BTD, turn), (cache, sums)

        layers = (parameters, rows_of(c, range(c.layers)), cache)
        unroll = 1 if c.scan_layers else c.layers
        first = self.embed(tokens_BT, info, dtype), first_turn()
        (x_BTD, _), (cache, sums) = jax.lax.scan(layer, first, layers, unroll=unroll)
        return self.finish(x_BTD), cache, sums

    def info(
        self,
        tokens_BT,
        positions_BT=None,
        segments_BT=None,
        places_BT=None,
        dropout_keys_B=None,
        mask_BT=None,
        types_BT=None,
        lengths_BT=None,
    ) -> TokenInfo:
        """What the layers know of the tokens; see `__call__`. `lengths_BT` as in `rope_angles`."""
        c = self.config
        in_order = positions_BT is None
        if in_order:
            positions_BT = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None]
        places_BT = positions_BT if places_BT is None else places_BT
        info = TokenInfo(positions_BT, segments_BT, places_BT, dropout_keys_B=dropout_keys_B, types_BT=types_BT)
        if c.positions == "rotary":
            info = replace(info, angles=rope_angles(c, places_BT, lengths_BT=lengths_BT))
        if c.positions == "rotary" and c.rope_theta_local is not None and any(c.windows()):
            info = replace(info, local_angles=rope_angles(c, places_BT, local=True))
        if mask_BT is not None and c.experts:
            info = replace(info, mask_BT=mask_BT, counted_B=mask_BT.sum(1))
        return replace(info, context_style=self.context_style, in_order=in_order)

    def finish(self, x_BTD: jax.Array) -> jax.Array:
        """The last block's output, as the head takes it, (B, T, D): normed, for masked_lm through its own layer too."""
        x_BTD = x_BTD if self.final_norm is None else self.final_norm(x_BTD)
        if self.config.head not in MASKED_LM:
            return x_BTD
        x_BTD = self.head_dense(shard(x_BTD, "batch", "tokens", "width"))
        kind = self.config.activation if self.config.head == "masked_lm" else "gelu_exact"
        return self.head_norm(activate(kind, x_BTD, None))

    @jax.named_scope("head")
    def pooled(self, x_BTD: jax.Array) -> jax.Array:
        """One vector a sequence, (B, D), of a model with model.head=pooler: of the first token's final vector."""
        return jnp.tanh(self.head_dense(shard(x_BTD, "batch", "tokens", "width")[:, :1]))[:, 0]

    @jax.named_scope("head")
    def label_logits(self, x_BTD: jax.Array) -> jax.Array:
        """Float32 logits_BTC of the labels (classes C) of these tokens, of a model with a head of LABELLED.

        Of an encoder with model.head=classes the vectors pass a matrix and tanh first, as `pooled` has it.
        Raises ValueError for a model with another head.
        """
        if self.head_labels is None:
            raise ValueError(f"model.head={self.config.head} has no labels; {', '.join(LABELLED)} have")
        x_BTD = shard(x_BTD, "batch", "tokens", "width")
        if self.head_dense is not None:
            x_BTD = jnp.tanh(self.head_dense(x_BTD))
        return self.head_labels(x_BTD).astype(jnp.float32)

    @property
    def _output(self) -> Embedding:
        if self.config.head not in ("vocabulary", *MASKED_LM):
            raise ValueError(f"model.head={self.config.head} has no logits; those of vocabulary and masked_lm have")
        return self.tokens if self.head is None else self.head

    def vocabulary(self, parts: int, dtype) -> VocabularyRows:
        """The rows of the output table in at least so many parts, with a first dim for the parts."""
        return self._output.cut(parts, dtype, self.head_bias)

    @jax.named_scope("head")
    def logits(self, x_BTD: jax.Array, rows: VocabularyRows | None = None) -> jax.Array:
        """Float32 logits_BTV of final hidden vectors, for all rows of the output table, V is padded, or for some."""
        x_BTD = times(shard(x_BTD, "batch", "tokens", "width"), parametrization.logit_multiplier(self.config))
        return self._output.logits(x_BTD, rows or self._output.rows(x_BTD.dtype, self.head_bias))

    @jax.named_scope("embed")
    def embed(self, tokens_BT: jax.Array, info: TokenInfo, dtype) -> jax.Array:
        """x_BTD as the first block takes it."""
        multiplier = parametrization.embedding_multiplier(self.config)
        x_BTD = times(self.tokens.embed(tokens_BT, dtype), multiplier)
        if self.positions is not None:
            rows_BT = info.places_BT + self.config.first_position
            x_BTD = x_BTD + jnp.take(cast_and_gather(self.positions, dtype), rows_BT, axis=0)
        if self.types is not None:
            types_BT = jnp.zeros_like(tokens_BT) if info.types_BT is None else info.types_BT
            x_BTD = x_BTD + jnp.take(cast_and_gather(self.types, dtype), types_BT, axis=0)
        if self.embedding_norm is not None:
            x_BTD = shard(self.embedding_norm(x_BTD), "batch", "residual", "width")
        return dropout(x_BTD, self.config.dropout, info.dropout_keys_B, EMBEDDING_SITE, info.positions_BT)


def in_compute_dtype(graphdef: nnx.GraphDef, parameters: nnx.State, dtype) -> nnx.State:
    """A block's parameters with its matrices as a Projection would cast them, before a scan takes layers of them."""
    block = nnx.merge(graphdef, parameters)
    for _, module in nnx.iter_modules(block):
        if isinstance(module, Projection):
            module.weight.set_value(cast_and_gather(module.weight, dtype))
    return nnx.state(block)


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
    """A model without arrays: what it takes to initialise, lay out, and run its parameters, a nested dict."""

    config: ModelConfig
    specs: Specs  # a ParameterSpec for each parameter, those of layers stacked
    slots: tuple[int, ...]  # the layer in each row of the stacked layers; -1: a row of zeros
    context_style: str  # ring | ulysses | gather: how attention crosses the context axis
    forms: Forms = field(default_factory=dict)  # what stands in the place of some parts; `specs` has their parameters

    @cached_property
    def graphdef(self) -> nnx.GraphDef:
        """The modules without their parameters."""
        return nnx.graphdef(put_in(Transformer(self.config, self.specs, self.context_style), self.specs, self.forms))

    @cached_property
    def block(self) -> nnx.GraphDef:
        """The modules of one layer without their parameters, which a scan over layers gives them."""
        specs = self.specs[LAYERS]
        return nnx.graphdef(put_in(Block(self.config, specs), specs, of_block(self.forms)))

    @cached_property
    def shapes(self) -> dict:
        """A ShapeDtypeStruct for each parameter, float32 but for those of forms that have a dtype of their own."""
        return map_specs(lambda spec: jax.ShapeDtypeStruct(spec.shape, spec.dtype or jnp.float32), self.specs)

    def shardings(self, mesh: Mesh) -> dict:
        """The NamedSharding of each parameter."""
        return map_specs(lambda spec: parameter_sharding(mesh, spec.shape, spec.axes), self.specs)

    def init(self, key: jax.Array) -> dict:
        """Draws the parameters, float32: to be jitted with the shardings that they shall have."""
        return draw_all(self.specs, self.slots, key)

    def bind(self, params: dict) -> Transformer:
        """The model with these parameters; what is not used may be left out."""
        return nnx.merge(self.graphdef, self.shapes | params)


def describe(
    config: ModelConfig, slots: tuple[int, ...] | None = None, context_style: str = "ring", forms: Forms | None = None
) -> Description:
    """The Description of a model on the mesh in context; nothing is allocated.

    `slots` is the layer in each row of the stacked layers, as a pipeline wants them; by default 0, 1, 2 ...
    """
    slots = tuple(range(config.layers)) if slots is None else slots
    specs = parameter_specs(config, vocab_parts=splits("vocab", stored=True), rows=len(slots))
    forms = forms or {}
    return Description(config, with_forms(specs, forms), slots, context_style, forms)
