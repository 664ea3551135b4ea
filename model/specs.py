"""Every parameter of the model in one tree of specifications: its shape, the names of its dims, and how it begins.

All that is known of parameters before there are any follows from this tree: how they are drawn and lie on the mesh,
how optimizers treat them, how many there are, what memory they take. No JAX here: a planner asks for thousands.

The tree is a nested dict like the parameters themselves. Shape letters are those of model/config.py.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from model import parametrization
from model.config import GATED, LABELLED, MASKED_LM, ModelConfig

TABLES = ("vocab", "positions", "types")  # names of dims whose rows are looked up
LAYERS = "layers"  # the name of the stacking dim, and of its branch of the tree
HEAD = ("head", "head_dense", "head_norm", "head_bias", "head_labels")  # branches that make a task's output


@dataclass(frozen=True)
class RandomKey:
    """Where a parameter's random key comes from: from the model's by splits, (into how many, which one)."""

    splits: tuple[tuple[int, int], ...] = ()

    def split(self, parts: int) -> list["RandomKey"]:
        """The keys that jax.random.split would give, `parts` of them."""
        return [RandomKey((*self.splits, (parts, part))) for part in range(parts)]


@dataclass(frozen=True)
class ParameterSpec:
    """One parameter, an array of (*shape), whose dims are named by `axes` (rows of parallel.sharding's tables).

    A parameter of a block has its shape in one layer here; `stacked` adds the layers as a first dim.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    key: RandomKey
    std: float = 0.0  # of the normal distribution that it is drawn from; 0: it begins as `value` everywhere
    value: float = 0.0
    contracted: tuple[int, ...] = ()  # the dims that a token's vector is multiplied with; none: a vector or a table
    batch: tuple[int, ...] = ()  # dims that number matrices, each drawn from a key of its own: layers, experts
    rows: int | None = None  # of a table whose last rows are padding: the rows before, which are no padding
    dtype: str | None = None  # of what is kept so whatever floats are kept in: codes of quantised matrices

    @property
    def is_matrix(self) -> bool:
        """Whether tokens are multiplied with it."""
        return bool(self.contracted)

    @property
    def is_table(self) -> bool:
        """Whether its rows are looked up by tokens or positions."""
        return any(name in TABLES for name in self.axes) and "width" in self.axes

    @property
    def decayed(self) -> bool:
        """Whether weight decay is meant for it: matrices and tables, but neither norm scales nor biases."""
        return self.is_matrix or self.is_table

    @property
    def size(self) -> int:
        """Its scalars, without padding."""
        return math.prod(self.shape) if self.rows is None else self.rows * math.prod(self.shape[1:])

    def stacked(self, rows: int) -> "ParameterSpec":
        """The parameter of all layers, stacked on a new first dim of so many rows."""
        after = lambda dims: tuple(dim + 1 for dim in dims)
        return replace(
            self,
            shape=(rows, *self.shape),
            axes=(LAYERS, *self.axes),
            contracted=after(self.contracted),
            batch=(0, *after(self.batch)),
        )

    def of_one_layer(self) -> "ParameterSpec":
        """The inverse of `stacked`."""
        before = lambda dims: tuple(dim - 1 for dim in dims if dim)
        contracted, batch = before(self.contracted), before(self.batch)
        return replace(self, shape=self.shape[1:], axes=self.axes[1:], contracted=contracted, batch=batch)


Specs = dict[str, Any]  # nested, with a ParameterSpec at each leaf


def leaves(tree: Specs, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], ParameterSpec]]:
    """The leaves of a tree of specifications, each after the names that lead to it."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, name))
        else:
            yield (*path, name), value


def map_specs(function: Callable[[ParameterSpec], Any], tree: Specs) -> dict:
    """The nested dict of `function(spec)` for each leaf."""
    return {k: map_specs(function, v) if isinstance(v, dict) else function(v) for k, v in tree.items()}


# ------------------------------------------------------------------------------------------------------ kinds of parts


def vector(key: RandomKey, size: int, axis: str = "norm", value: float = 0.0) -> ParameterSpec:
    """A bias, or with `value` 1 the scale of a norm."""
    return ParameterSpec((size,), (axis,), key, value=value)


def table(key: RandomKey, rows: int, width: int, axis: str, used: int | None = None) -> ParameterSpec:
    """A row of `width` for each token or position; rows from `used` on are padding."""
    return ParameterSpec((rows, width), (axis, "width"), key, parametrization.TABLE_STD, rows=used)


def projection(
    key: RandomKey,
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    std: float,
    *,
    inputs: int = 1,
    batch: int = 0,
    bias: bool = False,
    bias_key: RandomKey | None = None,
) -> Specs:
    """A weight (*batch, *in, *out), `batch` and `inputs` being how many dims these have, and perhaps a bias (*out)."""
    contracted = tuple(range(batch, batch + inputs))
    made = {"weight": ParameterSpec(shape, axes, key, std, contracted=contracted, batch=tuple(range(batch)))}
    if bias:
        out = batch + inputs
        named = tuple("norm" if name == "width" else name for name in axes[out:])  # vectors are too small to be split
        made["bias"] = ParameterSpec(shape[out:], named, bias_key or key)
    return made


# ---------------------------------------------------------------------------------------------------------- the model


def norm(config: ModelConfig, key: RandomKey, size: int, axis: str = "norm", kind: str | None = None) -> Specs:
    """The scale of a norm over `size` entries, and the bias of a layer norm with biases."""
    biased = (kind or config.norm) == "layer" and config.bias in ("ffn", "all")
    scale = vector(key, size, axis, 0.0 if config.norm_plus_one else 1.0)
    return {"scale": scale} | ({"bias": vector(key, size, axis)} if biased else {})


def qk_norm(config: ModelConfig, key: RandomKey, heads: int, axis: str) -> Specs:
    """The scale of the norm of queries or keys: of one head for all, or of all heads of a token."""
    one_head = norm(config, key, config.head_dim, "head_dim", "rms")
    if config.qk_norm_dims == "head":
        return one_head
    scale = one_head["scale"]
    return {"scale": replace(scale, shape=(heads, config.head_dim), axes=(axis, "head_dim"))}


def attention(config: ModelConfig, key: RandomKey) -> Specs:
    """Queries, keys, values and the way out."""
    c, keys = config, key.split(4)
    D, N, K, H = c.width, c.heads, c.kv_heads, c.head_dim
    into, out = parametrization.matrix_std(c, D), parametrization.matrix_std(c, N * H, residual=True)
    biased = {"bias": c.bias in ("qkv", "attention", "all"), "bias_key": key}
    out_biased = c.bias in ("attention", "all")
    specs = {
        "query": projection(keys[0], (D, N, H), ("width", "heads", "head_dim"), into, **biased),
        "key": projection(keys[1], (D, K, H), ("width", "kv_heads", "head_dim"), into, **biased),
        "value": projection(keys[2], (D, K, H), ("width", "kv_heads", "head_dim"), into, **biased),
        "out": projection(keys[3], (N, H, D), ("heads", "head_dim", "width"), out, inputs=2, bias=out_biased),
    }
    if c.qk_norm:
        specs["query_norm"] = qk_norm(c, key, N, "heads")
        specs["key_norm"] = qk_norm(c, key, K, "kv_heads")
    return specs


def feed_forward(config: ModelConfig, key: RandomKey, ffn: int) -> Specs:
    """Two matrices, or three where the activation is gated."""
    c, (gate, up, down) = config, key.split(3)
    into, out = parametrization.matrix_std(c, c.width), parametrization.matrix_std(c, ffn, residual=True)
    biased = c.bias in ("ffn", "all")
    specs = {
        "up": projection(up, (c.width, ffn), ("width", "ffn"), into, bias=biased),
        "down": projection(down, (ffn, c.width), ("ffn", "width"), out, bias=biased),
    }
    if c.activation in GATED:
        specs["gate"] = projection(gate, (c.width, ffn), ("width", "ffn"), into, bias=biased)
    return specs


def mixture_of_experts(config: ModelConfig, key: RandomKey) -> Specs:
    """A router, stacked experts, and shared ones as one feed-forward block."""
    c, (router, gate, up, down, shared) = config, key.split(5)
    E, D, F = c.experts, c.width, c.ffn
    into, out = parametrization.matrix_std(c, D), parametrization.matrix_std(c, F, residual=True)
    specs = {
        "router": projection(router, (D, E), ("width", "routes"), parametrization.router_std(c)),
        "up": projection(up, (E, D, F), ("experts", "width", "ffn"), into, batch=1),
        "down": projection(down, (E, F, D), ("experts", "ffn", "width"), out, batch=1),
    }
    if c.balance_bias:  # moved by the training step, not by its gradient (see training.step.balanced)
        specs["router"]["balance_bias"] = vector(router, E, "routes")
    if c.activation in GATED:
        specs["gate"] = projection(gate, (E, D, F), ("experts", "width", "ffn"), into, batch=1)
    if c.shared_experts:
        specs["shared"] = feed_forward(c, shared, c.shared_experts * F)
    return specs


def block(config: ModelConfig, key: RandomKey) -> Specs:
    """One layer; the key is that of the layer."""
    c, (attends, feeds, norms) = config, key.split(3)
    specs = {"attention": attention(c, attends)}
    specs |= {"moe": mixture_of_experts(c, feeds)} if c.experts else {"ffn": feed_forward(c, feeds, c.ffn)}
    names = {
        "pre": ("attention_norm", "ffn_norm"),
        "post": ("attention_post_norm", "ffn_post_norm"),
        "output": ("attention_post_norm", "ffn_post_norm"),
        "both": ("attention_norm", "ffn_norm", "attention_post_norm", "ffn_post_norm"),
    }[c.norm_position]
    return specs | {name: norm(c, norms, c.width) for name in names}


TOKENS_KEY, POSITIONS_KEY, LAYERS_KEY, HEAD_KEY = RandomKey().split(
    4
)  # a layer's key: LAYERS_KEY folded with its index


def parameter_specs(config: ModelConfig, *, vocab_parts: int = 1, rows: int | None = None) -> Specs:
    """The whole tree. Raises ValueError where the size of the vocabulary is not known yet.

    `vocab_parts` is into how many parts a mesh splits the vocabulary's rows, which are padded to a multiple of it;
    `rows` how many rows the stacked layers have, where a pipeline needs more than there are layers.
    """
    c = config
    if c.vocab_size is None:
        raise ValueError("model.vocab_size is not set: it comes from the tokenizer")
    multiple = math.lcm(c.vocab_multiple, vocab_parts)
    vocabulary = -(-c.vocab_size // multiple) * multiple
    specs = {"tokens": {"weight": table(TOKENS_KEY, vocabulary, c.width, "vocab", c.vocab_size)}}
    if c.positions == "learned":
        specs["positions"] = table(POSITIONS_KEY, c.first_position + c.max_positions, c.width, "positions")
    if c.token_types:
        specs["types"] = table(POSITIONS_KEY.split(2)[1], c.token_types, c.width, "types")
    if c.embedding_norm:
        specs["embedding_norm"] = norm(c, TOKENS_KEY, c.width)
    specs[LAYERS] = map_specs(lambda spec: spec.stacked(rows or c.layers), block(c, RandomKey()))
    if c.norm_position != "post":
        specs["final_norm"] = norm(c, HEAD_KEY, c.width)
    return specs | head(c, vocabulary)


def head(config: ModelConfig, vocabulary: int) -> Specs:
    """What makes a task's output of final vectors; `vocabulary` counts the rows of the output table with padding.

    Raises ValueError for a head of labels whose number nobody has set.
    """
    c, specs = config, {}
    if c.head in ("vocabulary", *MASKED_LM) and not c.tied_embeddings:
        specs["head"] = {"weight": table(HEAD_KEY, vocabulary, c.width, "vocab", c.vocab_size)}
    if c.head in (*MASKED_LM, "pooler") or (c.head == "classes" and not c.causal):
        shape, axes, std = (c.width, c.width), ("width", "features"), parametrization.matrix_std(c, c.width)
        specs["head_dense"] = projection(HEAD_KEY.split(2)[1], shape, axes, std, bias=True)
    if c.head in MASKED_LM:
        specs["head_norm"] = norm(c, HEAD_KEY, c.width)
        specs["head_bias"] = replace(vector(HEAD_KEY, vocabulary, "vocab"), rows=c.vocab_size)
    if c.head in LABELLED:
        if c.labels is None:
            raise ValueError(
                f"model.labels is not set: how many labels model.head={c.head} has comes from a task's data"
            )
        key, shape, biased = HEAD_KEY.split(3)[2], (c.width, c.labels), not (c.causal and c.head == "classes")
        specs["head_labels"] = projection(key, shape, ("width", "features"), parametrization.TABLE_STD, bias=biased)
    return specs
