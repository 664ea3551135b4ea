"""ModelConfig: one decoder stack, options rather than copies; and the counts that follow from it.

Shape letters, as name suffixes in the whole project: B batch, T tokens (query), S tokens (key), D model width,
F ffn width, N query heads, K kv heads, G query heads for each kv head, H head width, V vocabulary, L layers, E experts,
J experts that a token goes to, C expert capacity, P pipeline stages, M microbatches.
"""

import math
from dataclasses import dataclass, field

NORMS = ("rms", "layer")
NORM_POSITIONS = ("pre", "post", "both", "output")
QK_NORM_DIMS = ("head", "all")
POSITIONS = ("rotary", "learned", "none")
ACTIVATIONS = ("swiglu", "geglu", "geglu_exact", "reglu", "gelu", "gelu_exact", "relu", "relu2", "silu")
BIASES = ("none", "qkv", "attention", "ffn", "all")
MASKED_LM = ("masked_lm", "masked_lm_gelu")
LABELLED = ("classes", "tags", "span")
HEADS = ("vocabulary", *MASKED_LM, *LABELLED, "pooler", "none")
ROPE_SCALINGS = ("none", "linear", "llama3", "yarn", "longrope", "dynamic")
PARAMETRIZATIONS = ("standard", "mup", "complete_p")
MATMUL_DTYPES = ("", "float8")
ATTENTION_KERNELS = ("auto", "fused", "plain")
ROUTER_SCORES = ("softmax", "sigmoid")
GATED = ("swiglu", "geglu", "geglu_exact", "reglu")
COUNTS = (
    *("layers", "width", "heads", "kv_heads", "head_dim", "ffn", "base_width", "base_depth"),
    *("max_positions", "vocab_multiple"),
)


def one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises the ValueError of a config field that must be one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}={value} is not one of {', '.join(choices)}")


@dataclass(frozen=True)
class RopeScaling:
    """Stretches rotary positions beyond the length that a model was trained on.

    Raises ValueError for a setting that is unknown or out of range.
    """

    kind: str = "none"  # none | linear | llama3 (by wavelength) | yarn (2309.00071) | longrope (2402.13753) | dynamic
    factor: float = 1.0  # new length over the original one
    original_length: int = 8192  # tokens of the original training
    low_frequency: float = 1.0  # llama3: longer waves than original_length / this are divided by factor
    high_frequency: float = 4.0  # llama3: shorter waves than original_length / this are kept
    beta_fast: float = 32.0  # yarn: dims that turn more often than this within original_length are kept
    beta_slow: float = 1.0  # yarn: dims that turn less often than this are divided by factor
    attention_factor: float | None = None  # yarn, longrope: of sines and cosines; null: as their papers have it
    short_factors: tuple[float, ...] = ()  # longrope: divisors of each pair's frequency up to original_length tokens
    long_factors: tuple[float, ...] = ()  # longrope: the same for longer sequences

    def __post_init__(self):
        one_of("model.rope_scaling.kind", self.kind, ROPE_SCALINGS)
        if self.factor < 1:
            raise ValueError(f"model.rope_scaling.factor={self.factor} must be 1 or more")
        for name in ("factor", "original_length", "low_frequency", "beta_fast", "beta_slow"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"model.rope_scaling.{name}={getattr(self, name)} must be above 0")
        if not self.high_frequency > self.low_frequency:
            low, high = self.low_frequency, self.high_frequency
            raise ValueError(f"model.rope_scaling.high_frequency={high} must be above low_frequency={low}")
        if self.attention_factor is not None and not 0 < self.attention_factor < math.inf:
            raise ValueError(f"model.rope_scaling.attention_factor={self.attention_factor} must be above 0")
        if min((*self.short_factors, *self.long_factors), default=1) <= 0:
            raise ValueError("model.rope_scaling: short_factors and long_factors must be above 0")

    def check_pairs(self, pairs: int) -> None:
        """Raises ValueError where longrope has not one factor for each pair of rotary dims."""
        for name in ("short_factors", "long_factors") if self.kind == "longrope" else ():
            if (found := len(getattr(self, name))) != pairs:
                raise ValueError(f"model.rope_scaling.{name} has {found} entries, and there are {pairs} rotary pairs")


@dataclass(frozen=True)
class ModelConfig:
    """A transformer: sizes first, then the options in the order of the forward pass.

    Raises ValueError for a value out of range, or for options that exclude each other.
    """

    layers: int = 4  # blocks
    width: int = 128  # of the residual stream
    heads: int = 4  # of queries
    kv_heads: int = 4  # fewer than heads: grouped-query attention; 1: multi-query
    head_dim: int = 32  # entries of a head's queries, keys and values
    ffn: int = 512  # of one expert, where there are experts
    vocab_size: int | None = None  # None: the tokenizer's
    tied_embeddings: bool = True  # one table for input and output
    dropout: float = 0.0  # of embeddings and of each block's two outputs
    parametrization: str = "standard"  # standard | mup | complete_p: how scales and learning rates follow the sizes
    base_width: int = 128  # mup, complete_p: width of the model that the learning rate was found with
    base_depth: int = 4  # complete_p: layers of that model

    positions: str = "rotary"  # rotary | learned | none
    max_positions: int = 2048  # learned positions: the longest sequence
    first_position: int = 0  # row of the learned table for the first token (RoBERTa: 2)
    token_types: int = 0  # learned kinds of tokens, as of the two texts of a pair (BERT); 0: none
    rope_theta: float = 10000.0  # base of the rotary wavelengths: the longest is 2 pi times this, in tokens
    rope_theta_local: float | None = None  # of local layers, which are then not scaled (Gemma 3); null: as the others
    rope_fraction: float = 1.0  # share of a head's dims, the first ones, that turn
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    embedding_scale: bool = False  # multiply embeddings by sqrt(width) (Gemma)
    embedding_norm: bool = False  # a norm of what enters the first block (BERT)

    norm: str = "rms"  # rms | layer
    norm_position: str = "pre"  # pre | post (of the residual stream) | both (around each half) | output (of each half)
    norm_eps: float = 1e-6  # added to the mean square that a norm divides by
    norm_plus_one: bool = False  # a norm multiplies by 1 + its scale (Gemma)
    bias: str = "none"  # none | qkv | attention (qkv and out) | ffn (and layer norms) | all
    parallel_block: bool = False  # both halves of a block read its input (GPT-NeoX)

    causal: bool = True  # False: full attention, an encoder
    qk_norm: bool = False  # RMS norm of queries and keys
    qk_norm_dims: str = "head"  # head (each head for itself) | all (all heads of a token together, OLMo 2)
    attention_scale: float | None = None  # None: 1 / sqrt(head_dim)
    attention_softcap: float = 0.0  # c * tanh(scores / c); 0 off
    window: int = 0  # tokens that a local layer sees, its own included; 0 off
    window_pattern: str = "L"  # repeated over the layers: L local, G global
    attention_kernel: str = "auto"  # auto (fused where the platform has a kernel for it) | fused (or fail) | plain

    matmul_dtype: str = ""  # "" (as activations) | float8: of all matrices in a block but routers' and experts'

    activation: str = "swiglu"  # swiglu | geglu | reglu | gelu | relu | relu2 | silu; gelu's tanh form unless _exact

    experts: int = 0  # feed-forward experts in each layer, from which a router chooses; 0: one for all tokens
    experts_per_token: int = 2  # experts that a token goes to
    shared_experts: int = 0  # further ones that every token goes to, as one of this many times ffn
    router_scores: str = "softmax"  # softmax (over the experts) | sigmoid (of each)
    router_normalize: bool = True  # the weights of a token's experts sum to 1
    router_scale: float = 1.0  # what the weights are multiplied by
    router_groups: int = 1  # groups of experts, of which only the best are open to a token
    router_groups_per_token: int = 1  # open groups, by the sum of their two best scores
    balance_loss: float = 0.0  # weight of the loss that evens out the load of experts, within each sequence; 0 off
    balance_bias: float = 0.0  # step of a bias on the choice that evens out the load without a loss; 0 off
    router_z_loss: float = 0.0  # weight of the router's squared log-normaliser; 0 off
    expert_capacity: float = 0.0  # tokens of a sequence that an expert takes, over their mean; 0: all, none is dropped

    # vocabulary (logits) | masked_lm (a layer before them; masked_lm_gelu: with gelu, whatever activation is) | pooler
    # (one vector a sequence) | classes (labels of a sequence) | tags (of each token) | span (its two ends) | none
    head: str = "vocabulary"
    labels: int | None = None  # of heads classes, tags and span: how many; null: those of the task's data
    logit_softcap: float = 0.0  # c * tanh(logits / c); 0 off
    vocab_multiple: int = 128  # the tables are padded to a multiple of this
    scan_layers: bool = True  # one compiled layer, scanned; False unrolls

    def __post_init__(self):
        for name in COUNTS:
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name}={getattr(self, name)} must be 1 or more")
        if self.vocab_size is not None and self.vocab_size < 2:
            raise ValueError(f"model.vocab_size={self.vocab_size} must be 2 or more")
        if self.heads % self.kv_heads:
            choices = ", ".join(str(k) for k in range(1, self.heads + 1) if self.heads % k == 0)
            raise ValueError(f"model.kv_heads={self.kv_heads} does not divide model.heads={self.heads}; use {choices}")
        for name in ("rope_theta", "norm_eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"model.{name}={getattr(self, name)} must be above 0")
        for name in ("attention_softcap", "logit_softcap", "window", "shared_experts", "first_position", "token_types"):
            if not 0 <= getattr(self, name) < 2**31:
                raise ValueError(f"model.{name}={getattr(self, name)} must be 0 (off) or more, and below 2^31")
        if self.labels is not None and self.labels < 1:
            raise ValueError(f"model.labels={self.labels} must be 1 or more")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout={self.dropout} must be at least 0 and below 1")
        if self.positions == "rotary":
            self._check_rotary()
        one_of("model.parametrization", self.parametrization, PARAMETRIZATIONS)
        if self.parametrization == "complete_p" and self.norm_position == "post":
            raise ValueError(
                "model.parametrization=complete_p needs a residual stream that no norm rescales: "
                "set model.norm_position=pre, both or output"
            )
        one_of("model.positions", self.positions, POSITIONS)
        one_of("model.norm", self.norm, NORMS)
        one_of("model.norm_position", self.norm_position, NORM_POSITIONS)
        one_of("model.bias", self.bias, BIASES)
        one_of("model.head", self.head, HEADS)
        one_of("model.qk_norm_dims", self.qk_norm_dims, QK_NORM_DIMS)
        one_of("model.activation", self.activation, ACTIVATIONS)
        if not self.window_pattern or set(self.window_pattern) - set("LG"):
            raise ValueError(f"model.window_pattern={self.window_pattern} may only hold L (local) and G (global)")
        if self.matmul_dtype not in MATMUL_DTYPES:
            raise ValueError(f"model.matmul_dtype={self.matmul_dtype} is neither empty nor float8")
        one_of("model.attention_kernel", self.attention_kernel, ATTENTION_KERNELS)
        one_of("model.router_scores", self.router_scores, ROUTER_SCORES)
        if self.experts:
            self._check_experts()

    def _check_rotary(self) -> None:
        if not 0 < self.rope_fraction <= 1:
            raise ValueError(f"model.rope_fraction={self.rope_fraction} must be above 0 and at most 1")
        if self.rotary_dims < 2 or self.rotary_dims % 2:
            share = "" if self.rope_fraction == 1 else f" x rope_fraction={self.rope_fraction} = {self.rotary_dims}"
            raise ValueError(f"model.head_dim={self.head_dim}{share} must be even for rotary positions")
        if self.rope_theta_local is not None and not 0 < self.rope_theta_local < math.inf:
            raise ValueError(f"model.rope_theta_local={self.rope_theta_local} must be above 0, or null")
        self.rope_scaling.check_pairs(self.rotary_dims // 2)

    def _check_experts(self) -> None:
        e, groups, group_limit = self.experts, self.router_groups, self.router_groups_per_token
        if not 1 <= self.experts_per_token <= e:
            raise ValueError(f"model.experts_per_token={self.experts_per_token} must be 1 to model.experts={e}")
        if groups < 1 or e % groups:
            choices = ", ".join(str(n) for n in range(1, e + 1) if e % n == 0)
            raise ValueError(f"model.router_groups={groups} does not divide model.experts={e}; use {choices}")
        if not 1 <= group_limit <= groups:
            raise ValueError(f"model.router_groups_per_token={group_limit} must be 1 to model.router_groups={groups}")
        if self.experts_per_token > group_limit * (e // groups):
            held = f"{group_limit} groups of {e} / {groups} = {e // groups} experts hold {group_limit * (e // groups)}"
            raise ValueError(f"model.experts_per_token={self.experts_per_token} are more than a token may use: {held}")
        for name in ("balance_loss", "balance_bias", "router_z_loss", "expert_capacity", "router_scale"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"model.{name}={getattr(self, name)} must be 0 (off) or more")
        if self.bias in ("ffn", "all"):
            choices = "none, qkv or attention"
            raise ValueError(f"model.bias={self.bias} gives experts no biases; with model.experts use {choices}")

    @property
    def generates(self) -> bool:
        """Whether tokens can be drawn from it: a decoder with logits over the vocabulary."""
        return self.causal and self.head == "vocabulary"

    @property
    def rotary_dims(self) -> int:
        """Dims of each head that turn with the position."""
        return int(self.head_dim * self.rope_fraction)

    def windows(self) -> tuple[int, ...]:
        """The attention window of each layer in tokens; 0 sees everything."""
        pattern = self.window_pattern
        return tuple(self.window if pattern[i % len(pattern)] == "L" else 0 for i in range(self.layers))
