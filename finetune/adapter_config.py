"""What a run may set of its adapters, one dataclass for each kind. No JAX here: a mistake is told before slow imports.

`adapter=KIND` chooses the dataclass; a run without adapters has the one key `adapter.kind`.
"""

from dataclasses import dataclass

from model.config import one_of

BASES = ("float", "bfloat16", "int8", "int4", "nf4")
FORMS = ("int8", "fp8", "int4", "nf4")
SCALINGS = ("lora", "rslora")


@dataclass(frozen=True)
class NoAdapter:
    """All parameters are trained."""

    kind: str = "none"  # chosen by adapter=KIND; the keys of a kind are shown by python train.py adapter=KIND --help


@dataclass(frozen=True)
class FreezeConfig:
    """The model as it is, of which some parameters are trained."""

    kind: str = "freeze"  # parameters that match no pattern stay as they are
    train: tuple[str, ...] = ("final_norm/*",)  # patterns of parameters' names that are trained, as in layers/*/bias

    def __post_init__(self):
        if not self.train:
            raise ValueError("adapter.train=[] trains nothing; give a pattern, as in adapter.train=[final_norm/*]")


@dataclass(frozen=True)
class _OnBase:
    """What all adapters share."""

    base: str = "float"  # float | bfloat16 | int8 | int4 | nf4: what the model's own matrices are kept in
    group: int = 64  # int4, nf4: inputs that share a step
    also: tuple[str, ...] = ()  # patterns of the model's own parameters that are trained as well, as in final_norm/*

    def __post_init__(self):
        one_of("adapter.base", self.base, BASES)
        at_least(self, "group", 2)


@dataclass(frozen=True)
class _Matrices(_OnBase):
    """What adapters of matrices share."""

    targets: tuple[str, ...] = ("*",)  # patterns of a layer's matrices that get one: attention/query, ffn/*, moe/up

    def __post_init__(self):
        super().__post_init__()
        if not self.targets:
            raise ValueError("adapter.targets=[] names no matrix; use [*] for all")


@dataclass(frozen=True)
class LoraConfig(_Matrices):
    """Beside each matrix two thin ones, whose product is added to it (arXiv 2106.09685)."""

    kind: str = "lora"  # a product of two thin matrices beside each matrix
    rank: int = 8  # of the product
    alpha: float = 16.0  # the product is multiplied by alpha / rank
    scaling: str = "lora"  # lora | rslora (alpha / sqrt(rank), arXiv 2312.03732)
    dora: bool = False  # the size of each output is trained apart from its direction (arXiv 2402.09353)

    def __post_init__(self):
        super().__post_init__()
        at_least(self, "rank", 1)
        one_of("adapter.scaling", self.scaling, SCALINGS)


@dataclass(frozen=True)
class AdaLoraConfig(_Matrices):
    """LoRA as a product of three, whose ranks go where they matter (arXiv 2303.10512)."""

    kind: str = "adalora"  # singular values beside each matrix, of which the least important are cut
    rank: int = 8  # of a matrix at the end, on average
    initial_rank: int = 12  # of each matrix at the beginning
    alpha: float = 16.0  # the product is multiplied by alpha / initial_rank
    begin: float = 0.1  # share of the run after which ranks are cut
    end: float = 0.3  # share of the run, its last, in which they are fixed
    interval: int = 1  # steps between two cuts
    beta1: float = 0.85  # decay of the importance's mean
    beta2: float = 0.85  # decay of the importance's uncertainty
    orthogonality: float = 0.5  # weight of |A A^T - 1|^2 + |B^T B - 1|^2, a matrix

    def __post_init__(self):
        super().__post_init__()
        at_least(self, "rank", 1)
        at_least(self, "interval", 1)
        if self.initial_rank < self.rank:
            raise ValueError(f"adapter.initial_rank={self.initial_rank} must be at least adapter.rank={self.rank}")
        if min(self.begin, self.end) < 0 or self.begin + self.end >= 1:
            raise ValueError(f"adapter.begin={self.begin} and adapter.end={self.end} must leave a share of the run")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"adapter.{name}={getattr(self, name)} must be at least 0 and below 1")


@dataclass(frozen=True)
class Ia3Config(_Matrices):
    """A factor for each entry of keys, values and hidden vectors (arXiv 2205.05638)."""

    kind: str = "ia3"  # factors of keys, values and what `down` is multiplied with
    targets: tuple[str, ...] = ("attention/key", "attention/value", "*/down")  # `down`: its inputs; others: outputs


@dataclass(frozen=True)
class BottleneckConfig(_OnBase):
    """A small feed-forward net after each half of a block (arXiv 1902.00751)."""

    kind: str = "bottleneck"  # two matrices and an activation after attention and after ffn
    size: int = 64  # of its hidden vectors
    after: tuple[str, ...] = ("attention", "ffn")  # halves of a block that get one; moe counts as ffn
    activation: str = "gelu"  # of model.activation those that are not gated

    def __post_init__(self):
        super().__post_init__()
        at_least(self, "size", 1)
        one_of("adapter.activation", self.activation, ("gelu", "gelu_exact", "relu", "relu2", "silu"))
        for half in self.after:
            one_of("adapter.after", half, ("attention", "ffn"))
        if not self.after:
            raise ValueError("adapter.after=[] names no half of a block; use attention, ffn or both")


@dataclass(frozen=True)
class PrefixConfig(_OnBase):
    """Keys and values that every token sees, weighted by a gate that begins at zero (arXiv 2303.16199)."""

    kind: str = "prefix"  # keys and values of tokens that are not there, in each layer
    length: int = 16  # how many tokens

    def __post_init__(self):
        super().__post_init__()
        at_least(self, "length", 1)


@dataclass(frozen=True)
class QatConfig:
    """No adapter: all parameters are trained, and matrices compute as if quantised (compress/rehearsal.py)."""

    kind: str = "qat"  # matrices are rounded as they are used, and their gradients pass as if they were not
    form: str = "int4"  # int8 | fp8 | int4 | nf4: the recipe by which the model is going to be compressed
    group: int = 64  # int4, nf4: inputs that share a step
    targets: tuple[str, ...] = ("*",)  # patterns of a layer's matrices that are rounded: attention/query, ffn/*

    def __post_init__(self):
        one_of("adapter.form", self.form, FORMS)
        at_least(self, "group", 2)


AdapterConfig = (
    NoAdapter | FreezeConfig | LoraConfig | AdaLoraConfig | Ia3Config | BottleneckConfig | PrefixConfig | QatConfig
)


def at_least(config, name: str, least: int) -> None:
    """Raises the ValueError of a number that is too small."""
    if getattr(config, name) < least:
        raise ValueError(f"adapter.{name}={getattr(config, name)} must be {least} or more")
