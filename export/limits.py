"""What each format cannot hold of a model, told by the name of the setting before anything is read. No JAX here."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from model.config import ModelConfig

Rules = Mapping[str, tuple[Any, ...]]  # a setting of the model -> the values that a format can hold

DECODER: Rules = {"causal": (True,), "head": ("vocabulary",), "experts": (0,), "token_types": (0,)}
PLAIN: Rules = {  # what no architecture of llama.cpp that is written here has
    **DECODER,
    **{"windows": ("none",), "attention_softcap": (0.0,), "logit_softcap": (0.0,), "attention_scale": (None,)},
    **{"norm_position": ("pre",), "norm_plus_one": (False,), "embedding_scale": (False,), "embedding_norm": (False,)},
    **{"parallel_block": (False,), "parametrization": ("standard",), "rope_fraction": (1.0,), "first_position": (0,)},
}
ROTARY: Rules = {"positions": ("rotary",), "norm": ("rms",), "activation": ("swiglu",)}


@dataclass(frozen=True)
class Architecture:
    """One `general.architecture` of llama.cpp, and the models that it can be."""

    name: str
    rules: Rules


ARCHITECTURES = [
    Architecture(
        "llama", {**PLAIN, **ROTARY, "qk_norm": (False,), "rope_scaling.kind": ("none", "linear", "llama3", "fixed")}
    ),
    Architecture(
        "qwen3",
        {
            **PLAIN, **ROTARY, "qk_norm": (True,), "qk_norm_dims": ("head",), "bias": ("none",),
            "rope_scaling.kind": ("none",),
        },
    ),
    Architecture(
        "gpt2",
        {
            **PLAIN, "positions": ("learned",), "norm": ("layer",), "activation": ("gelu",), "bias": ("all",),
            "qk_norm": (False,), "grouped heads": (False,), "heads narrower or wider than the width": (False,),
        },
    ),
]  # fmt: skip
ONNX: Rules = {**DECODER, "rope_scaling.kind": ("none", "linear", "llama3", "yarn", "fixed")}


def check_onnx(config: ModelConfig) -> None:
    """Raises ValueError with the name of the setting that the graph cannot have."""
    if obstacle := _obstacle(config, ONNX):
        raise ValueError(f"onnx cannot hold {obstacle}")


def architecture_of(config: ModelConfig) -> Architecture:
    """The architecture of llama.cpp that a model is. Raises ValueError with the names of the settings in the way."""
    if obstacle := _obstacle(config, PLAIN):
        raise ValueError(f"gguf cannot hold {obstacle}")
    obstacles = {one.name: _obstacle(config, one.rules) for one in ARCHITECTURES}
    for one in ARCHITECTURES:
        if not obstacles[one.name]:
            return one
    tried = "; ".join(f"as {name} {obstacle}" for name, obstacle in obstacles.items())
    raise ValueError(f"gguf cannot hold this model: {tried}")


def _obstacle(config: ModelConfig, rules: Rules) -> str:
    """The first setting that is not as the rules have it, with the values that they know; empty if all are."""
    for name, known in rules.items():
        if (value := _value(config, name)) not in known:
            named = name if " " in name or name == "windows" else f"model.{name}"
            return f"{named}={value} (known there: {', '.join(map(str, known))})"
    return ""


def _value(config: ModelConfig, name: str) -> Any:
    """What a model has for a name of the rules."""
    c = config
    if name == "windows":
        return f"{c.window} of pattern {c.window_pattern}" if any(c.windows()) else "none"
    if name == "attention_scale":
        return None if c.attention_scale in (None, c.head_dim**-0.5) else c.attention_scale
    if name == "rope_scaling.kind":
        return _scaling(c)
    if name == "rope_fraction" and c.positions != "rotary":
        return 1.0
    if name == "grouped heads":
        return c.heads != c.kv_heads
    if name == "heads narrower or wider than the width":
        return c.heads * c.head_dim != c.width
    return getattr(c, name)


def _scaling(config: ModelConfig) -> str:
    """The kind of rotary scaling; `fixed` where LongRoPE has the same factors for every length."""
    if config.positions != "rotary":
        return "none"
    scaling = config.rope_scaling
    same = scaling.short_factors == scaling.long_factors and scaling.attention_factor == 1.0
    return "fixed" if scaling.kind == "longrope" and same else scaling.kind
