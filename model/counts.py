"""How many parameters a model has and how many FLOPs a token costs, by arithmetic on the tree of specifications."""

from collections import Counter
from dataclasses import dataclass

from model.config import MASKED_LM, ModelConfig
from model.specs import LAYERS, ParameterSpec, leaves, parameter_specs

EMBEDDING = ("tokens", "positions", "types", "embedding_norm")  # branches of the tree before the layers


@dataclass(frozen=True)
class ParameterCount:
    """Scalars of the model. Padding of the vocabulary is not counted."""

    embedding: int  # tables of tokens, positions and types, and their norm
    layers: int
    head: int  # final norm, the output table when it is not tied, and the rest of the head
    idle: int = 0  # of the layers: experts that a token does not go to

    @property
    def total(self) -> int:
        """All parameters: what model names quote."""
        return self.embedding + self.layers + self.head

    @property
    def active(self) -> int:
        """Parameters that take part in one token: fewer than all where it chooses among experts."""
        return self.total - self.idle


def parameter_count(config: ModelConfig) -> ParameterCount:
    """Counts without building the model."""
    found, idle = Counter(), 0
    for path, spec in leaves(parameter_specs(config)):
        found[path[0]] += spec.size
        idle += spec.size - active_size(config, spec)
    embedding = sum(found[name] for name in EMBEDDING)
    return ParameterCount(embedding, found[LAYERS], found.total() - embedding - found[LAYERS], idle)


def active_size(config: ModelConfig, spec: ParameterSpec) -> int:
    """The scalars of a parameter that take part in one token."""
    return spec.size * config.experts_per_token // config.experts if "experts" in spec.axes else spec.size


def flops_per_token(config: ModelConfig, seq_len: int, *, full_attention: bool = False) -> float:
    """Model FLOPs of forward and backward for one token of a sequence of `seq_len` (recomputation not counted).

    6 for each parameter that multiplies the token (2 forward, 4 backward; the output table counts, a lookup, vectors
    and experts that the token does not go to do not), plus attention scores and values: 12 L N H S, where S is the
    number of keys that a token sees on average: those of the mask that the model really has, causal or not, with its
    windows. With `full_attention` every token is counted as seeing all of them, as PaLM (arXiv 2204.02311, appendix B)
    and nanoGPT do.
    """
    c, specs = config, list(leaves(parameter_specs(config)))
    output = c.vocab_size * c.width if c.head in ("vocabulary", *MASKED_LM) else 0
    weights = sum(active_size(c, spec) for _, spec in specs if spec.is_matrix) + output
    keys = c.layers * seq_len if full_attention else keys_seen(c, seq_len)
    return 6.0 * weights + 12.0 * c.heads * c.head_dim * keys


def keys_seen(config: ModelConfig, seq_len: int) -> float:
    """The number of keys that a token sees on average, summed over the layers."""
    keys = 0.0
    for window in config.windows():
        reach = min(window, seq_len) if window else seq_len
        # the first `reach` tokens see 1, 2, ... keys, their own included; the others `reach`
        back = (reach * (reach + 1) / 2 + (seq_len - reach) * reach) / seq_len
        keys += back if config.causal else 2 * back - 1
    return keys
