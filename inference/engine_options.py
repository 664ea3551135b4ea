"""The settings of an engine. No JAX here: command lines read them before anything slow is imported."""

from dataclasses import dataclass

CACHE_DTYPES = ("", "int8")
SPECULATIONS = ("none", "ngram", "draft")
POOLINGS = ("", "mean", "last", "first", "max", "none")


@dataclass(frozen=True)
class EngineOptions:
    """What an engine is given: sizes of its cache and its steps."""

    max_running: int = 8  # sequences that are decoded at once
    cache_tokens: int | None = None  # of the cache; None: four of the longest, 64k, or what half of the memory holds
    block: int = 16  # tokens of a block: what memory is given out by
    chunk: int = 256  # tokens of prompts that one step reads
    max_waiting: int = 256  # choices in the queue; more are refused
    max_length: int | None = None  # tokens of a sequence, prompt and text; None: what the model was made for
    cache_dtype: str = ""  # "": as activations | int8: a quarter of float32, half of bfloat16
    prefix_sharing: bool = True  # prompts that begin alike are computed once
    speculation: str = "none"  # none | ngram (what followed the same tokens before) | draft (a smaller model)
    drafted: int = 4  # tokens that are proposed at a time
    max_adapters: int = 0  # places of adapters beside the model; 0: one for each that it starts with
    max_adapter_rank: int = 0  # of the largest that fits; 0: that of those that it starts with
    # how a text's vectors become one; "": as the model's folder says, else the mean | none: a decoder gives no vectors
    pooling: str = ""

    def __post_init__(self):
        for name in ("max_running", "block", "chunk", "max_waiting", "drafted"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 1 or more")
        for name in ("max_adapters", "max_adapter_rank"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or more")
        for name in ("cache_tokens", "max_length"):
            if getattr(self, name) is not None and getattr(self, name) < 2:
                raise ValueError(f"{name}={getattr(self, name)} must be 2 or more")
        for name, choices in (("cache_dtype", CACHE_DTYPES), ("speculation", SPECULATIONS), ("pooling", POOLINGS)):
            if getattr(self, name) not in choices:
                valid = ", ".join(map(repr, choices))
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {valid}")
