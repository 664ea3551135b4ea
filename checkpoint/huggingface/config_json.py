"""config.json of a published model to a ModelConfig, and back."""

import math
from collections.abc import Sequence
from typing import Any

from checkpoint.huggingface.families import BY_TYPE, FAMILIES, LABEL_CLASSES, Family
from model.config import GATED, ModelConfig, RopeScaling

GATED_ACTIVATIONS = {
    "silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu", "gelu_new": "geglu", "gelu_fast": "geglu",
    "gelu": "geglu_exact", "relu": "reglu",
}  # fmt: skip
ACTIVATIONS = {
    "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu_fast": "gelu", "gelu": "gelu_exact", "relu": "relu",
    "silu": "silu", "swish": "silu", "relu2": "relu2",
}  # fmt: skip
ROPE_KINDS = {
    "default": "none", "linear": "linear", "llama3": "llama3", "yarn": "yarn", "longrope": "longrope",
    "su": "longrope", "dynamic": "dynamic",
}  # fmt: skip
WHOLE = (  # fields that count
    *("layers", "width", "heads", "kv_heads", "head_dim", "ffn", "vocab_size", "max_positions", "window", "experts"),
    *("experts_per_token", "token_types", "first_position"),
)
ENCODERS = ("bert", "roberta", "distilbert")


def family_of(config: dict[str, Any]) -> Family:
    """The family of a config.json. Raises ValueError, with those that there are, for another."""
    found = config.get("model_type")
    if not isinstance(found, str) or found not in BY_TYPE:
        raise ValueError(f"model_type={found!r} is not one of {', '.join(BY_TYPE)}")
    return BY_TYPE[found]


def read_config(config: dict[str, Any], names: set[str]) -> ModelConfig:
    """The ModelConfig of a config.json; `names` are the tensors of its files, which tell which head there is.

    Raises ValueError for what is missing, has the wrong type, or is not known here.
    """
    family = family_of(config)
    if config.get("quantization_config"):
        method = config["quantization_config"]
        method = method.get("quant_method") if isinstance(method, dict) else method
        raise ValueError(f"quantization_config={method!r}: quantised weights are read from GGUF files only")
    c = {key: value for key, value in {**family.defaults, **config}.items() if value is not None}
    if "num_local_experts" in c:  # transformers writes one for the other
        c.setdefault("num_experts", c["num_local_experts"])
    for key, only in family.required.items():
        if c.get(key, only) != only:
            raise ValueError(f"{key}={c[key]!r} is not known here for model_type={family.model_type}, only {only!r} is")
    try:
        fields = {ours: c[theirs] for ours, theirs in family.fields.items() if theirs in c} | dict(family.fixed)
        sizes, head = _sizes(family, c, fields), _head(family, c, fields, names)
        return ModelConfig(**sizes, head=head, labels=_labels(c, head), scan_layers=True)
    except KeyError as error:
        raise ValueError(f"config.json has no {error.args[0]}") from None
    except (TypeError, AttributeError, ZeroDivisionError, StopIteration) as error:
        raise ValueError(f"config.json has a value of the wrong type: {error}") from None


def _sizes(family: Family, c: dict, fields: dict) -> dict[str, Any]:
    """The fields of ModelConfig but the head."""
    gated = "layers/ffn/gate" in family.names
    known, act = GATED_ACTIVATIONS if gated else ACTIVATIONS, c[family.activation_key]
    if act not in known:
        raise ValueError(f"{family.activation_key}={act!r} is not one of {', '.join(known)}")
    fields["activation"] = known[act]
    for name in ("layers", "width", "heads", "vocab_size"):
        if name not in fields:
            raise ValueError(f"config.json has no {family.fields[name]}")
        if not isinstance(fields[name], int) or fields[name] < 1:
            raise ValueError(f"{family.fields[name]}={fields[name]!r} should be a number of 1 or more")
    fields.setdefault("kv_heads", fields["heads"])
    if "head_dim" not in fields and fields["width"] % fields["heads"]:
        raise ValueError(
            f"{fields['heads']} heads do not divide a width of {fields['width']}, and there is no head_dim"
        )
    fields.setdefault("head_dim", fields["width"] // fields["heads"])
    fields.setdefault("ffn", c.get("n_inner") or 4 * fields["width"])
    fields["vocab_multiple"] = 128
    if family.bias_names:
        values = tuple(bool(c.get(name, False)) for name in family.bias_names)
        fields["bias"] = next(bias for bias, those in family.bias_keys.items() if those == values)
    if family.model_type in ("bert", "roberta"):
        _encoder_positions(family, c, fields)
    if fields.get("positions", "rotary") == "rotary":
        fields |= _rope(family, c)
    if family.local_layers:
        fields |= _windows(family, c, fields["layers"])
    if c.get("query_pre_attn_scalar", 1) <= 0:
        raise ValueError(f"query_pre_attn_scalar={c['query_pre_attn_scalar']} should be above 0")
    if "query_pre_attn_scalar" in c:
        fields["attention_scale"] = c["query_pre_attn_scalar"] ** -0.5
    if not c.get("scale_attn_weights", True):
        fields["attention_scale"] = 1.0
    for name in WHOLE:
        if type(fields.get(name, 1)) is not int:
            raise ValueError(f"{family.fields.get(name, name)}={fields[name]!r} should be a whole number")
    if type(fields["tied_embeddings"]) is not bool:
        raise ValueError(f"tie_word_embeddings={fields['tied_embeddings']!r} should be true or false")
    return fields


def _encoder_positions(family: Family, c: dict, fields: dict) -> None:
    fields["causal"] = bool(c["is_decoder"])
    if family.model_type == "roberta":  # the row of the padding token is the last that no position has
        fields["first_position"] = c["pad_token_id"] + 1
    fields["max_positions"] = c["max_position_embeddings"] - fields.get("first_position", 0)


def _head(family: Family, c: dict, fields: dict, names: set[str]) -> str:
    architecture = (c.get("architectures") or [""])[0]
    masked, pooler = (family.names_for(head).get("head_dense", "-") + ".weight" for head in ("masked_lm", "pooler"))
    there = lambda name: bool({name, name.removeprefix(family.base)} & names)
    for head, ending in LABEL_CLASSES.items():
        parts = family.names_for(head)
        known = "head_labels" in parts and (head != "classes" or fields.get("causal", True) or "head_dense" in parts)
        if architecture.endswith(ending) and known and there(f"{parts['head_labels']}.weight"):
            return head
    if family.model_type not in ENCODERS:
        asked = "CausalLM" in architecture or "LMHead" in architecture or not architecture
        return "vocabulary" if fields["tied_embeddings"] or asked or there(f"{family.names['head']}.weight") else "none"
    asked = any(word in architecture for word in ("MaskedLM", "CausalLM", "PreTraining", "LMHead"))
    if asked or (not architecture and there(masked)):
        gelu = family.model_type == "roberta" and fields["activation"] != "gelu_exact"  # its head always has it
        return "masked_lm_gelu" if gelu else "masked_lm"
    return "pooler" if "pooler" in family.head_names and there(pooler) else "none"


def _labels(c: dict, head: str) -> int | None:
    """How many labels a head of labels has."""
    if head not in LABEL_CLASSES:
        return None
    return len(c["id2label"]) if c.get("id2label") else int(c.get("num_labels", 2))


def _rope(family: Family, c: dict) -> dict[str, Any]:
    """The fields of rotary positions, from either form of config.json: rope_parameters, or rope_theta and others."""
    p = c.get("rope_parameters") or {}
    old = c.get("rope_scaling") or {}
    if not isinstance(p, dict) or not isinstance(old, dict):
        raise ValueError("rope_parameters and rope_scaling should be tables of keys")
    if old and "full_attention" not in p:  # the older name wins, as in transformers
        p = {**p, **old}
    local = p.get("sliding_attention") if "full_attention" in p else None
    full = p.get("full_attention", p or old)
    theta = full.get("rope_theta") or c.get("rotary_emb_base") or c["rope_theta"]
    kind = full.get("rope_type") or full.get("type") or "default"
    if kind not in ROPE_KINDS:
        raise ValueError(f"rope scaling {kind!r} is not one of {', '.join(ROPE_KINDS)}")
    share = full.get("partial_rotary_factor") or c.get("rotary_pct") or 1.0
    if family.model_type == "phi3":  # others do not look there
        share = c.get("partial_rotary_factor", share)
    fields = {"rope_theta": float(theta), "rope_fraction": float(share)}
    if local is not None:
        if (local.get("rope_type") or "default") != "default":
            raise ValueError("rope scaling of sliding_attention layers is not known here, only of full_attention ones")
        fields["rope_theta_local"] = float(local.get("rope_theta") or c.get("rope_local_base_freq") or theta)
    elif "rope_local_base_freq" in c:
        fields["rope_theta_local"] = float(c["rope_local_base_freq"])
    return fields | {"rope_scaling": _scaling(ROPE_KINDS[kind], full, c)}


def _scaling(kind: str, p: dict, c: dict) -> RopeScaling:
    if kind == "none":
        return RopeScaling()
    longest = c.get("max_position_embeddings")
    length = p.get("original_max_position_embeddings") or c.get("original_max_position_embeddings") or longest
    if kind == "linear":
        return RopeScaling("linear", float(p["factor"]))
    if kind == "dynamic":
        return RopeScaling("dynamic", float(p["factor"]), longest)
    if kind == "llama3":
        return RopeScaling(
            "llama3", float(p["factor"]), length, float(p["low_freq_factor"]), float(p["high_freq_factor"])
        )
    factor = float(p["factor"] if p.get("factor") is not None else longest / length)
    scaling = {"kind": kind, "factor": max(factor, 1.0), "original_length": length}
    if p.get("attention_factor") is not None:
        scaling["attention_factor"] = float(p["attention_factor"])
    if kind == "longrope":
        lists = {"short_factors": "short_factor", "long_factors": "long_factor"}
        return RopeScaling(**scaling, **{ours: tuple(map(float, p[theirs])) for ours, theirs in lists.items()})
    if not p.get("truncate", True):
        raise ValueError("rope scaling yarn with truncate=false is not known here")
    if p.get("mscale") and p.get("mscale_all_dim") and "attention_factor" not in scaling:
        grown = lambda scale: 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0
        scaling["attention_factor"] = grown(p["mscale"]) / grown(p["mscale_all_dim"])
    return RopeScaling(**scaling, beta_fast=float(p.get("beta_fast") or 32), beta_slow=float(p.get("beta_slow") or 1))


def _windows(family: Family, c: dict, layers: int) -> dict[str, Any]:
    """model.window and window_pattern."""
    window = c.get("sliding_window")
    if not window or (family.local_layers == "types" and c.get("use_sliding_window") is False):
        return {}
    if family.local_layers == "window":
        return {"window": window} if c.get("use_sliding_window", True) else {}
    types = c.get("layer_types")
    if types is None and "max_window_layers" in c:
        types = ["full_attention" if i < c["max_window_layers"] else "sliding_attention" for i in range(layers)]
    if types is None:
        step = c.get("sliding_window_pattern")
        pattern = "L" * (step - 1) + "G" if step else family.default_pattern or "G"
    else:
        if strange := set(types) - {"sliding_attention", "full_attention"}:
            raise ValueError(f"layer_types has {strange.pop()!r}, not one of sliding_attention, full_attention")
        if len(types) != layers:
            raise ValueError(f"layer_types names {len(types)} layers, and num_hidden_layers={layers}")
        pattern = _shortest("".join("L" if kind == "sliding_attention" else "G" for kind in types))
    return {} if set(pattern) == {"G"} else {"window": window, "window_pattern": pattern}


def _shortest(pattern: str) -> str:
    """The shortest word that, repeated, begins with the whole pattern."""
    repeated = lambda n: (pattern[:n] * len(pattern))[: len(pattern)]
    return next(pattern[:n] for n in range(1, len(pattern) + 1) if repeated(n) == pattern)


# ------------------------------------------------------------------------------------------------------------ writing


def write_config(config: ModelConfig, length: int, family: str | None = None) -> dict[str, Any]:
    """The config.json of the first family (or of the one named) that can say all of a ModelConfig.

    `length` is the longest sequence that the model is meant for. Raises ValueError where no family can.
    """
    tried = []
    for candidate in [BY_TYPE[family]] if family else FAMILIES:
        written = _written(candidate, config, length)
        try:
            difference = _difference(read_config(written, set()), config)
        except (ValueError, KeyError, TypeError, StopIteration) as error:
            difference = str(error)
        if not difference:
            return written
        tried.append(f"{candidate.model_type} ({difference})")
    raise ValueError(f"no family of published models has this model's options: {'; '.join(tried)}")


def with_labels(written: dict[str, Any], head: str, names: Sequence[str], problem: str) -> dict[str, Any]:
    """A config.json for a head of labels: the class of transformers that has it, the labels' names, what they are."""
    name = family_of(written).architecture
    body = next(name.removesuffix(end) for end in ("ForMaskedLM", "ForCausalLM", "LMHeadModel") if name.endswith(end))
    labels = {str(number): label for number, label in enumerate(names)}
    written = written | {"architectures": [f"{body}{LABEL_CLASSES[head]}"], "id2label": labels}
    written |= {"label2id": {label: int(number) for number, label in labels.items()}}
    return written | ({"problem_type": problem} if head == "classes" else {})


NOT_WRITTEN = (  # of training, or of how a program is compiled
    *("dropout", "base_width", "base_depth", "attention_kernel", "matmul_dtype", "scan_layers", "vocab_multiple"),
    *("balance_loss", "balance_bias", "router_z_loss", "head", "labels"),
)


def _difference(read: ModelConfig, wanted: ModelConfig) -> str:
    """The first field in which two models compute something else."""
    for name in ModelConfig.__dataclass_fields__:
        if name in NOT_WRITTEN or (name == "max_positions" and wanted.positions != "learned"):
            continue
        if name == "window_pattern" and read.windows() == wanted.windows():
            continue
        if not wanted.experts and name in ("experts_per_token", "router_normalize"):
            continue
        if name in ("rope_theta", "rope_fraction", "rope_scaling") and wanted.positions != "rotary":
            continue
        if name == "rope_theta_local" and not any(wanted.windows()):
            continue
        if name == "attention_scale" and _scale(read) == _scale(wanted):
            continue
        if name == "window" and read.windows() == wanted.windows():
            continue
        if getattr(read, name) != getattr(wanted, name):
            return f"model.{name}={getattr(wanted, name)}"
    return ""


def _scale(config: ModelConfig) -> float:
    return config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale


def _written(family: Family, config: ModelConfig, length: int) -> dict[str, Any]:
    """What this family would write; whether it says all is for `write_config` to see."""
    c = config
    written = {"model_type": family.model_type, "architectures": [family.architecture]}
    written |= {theirs: getattr(c, ours) for ours, theirs in family.fields.items() if ours != "causal"}
    written |= {"max_position_embeddings": length, "pad_token_id": None}
    if family.model_type in ("bert", "roberta"):
        written |= {"is_decoder": c.causal, "max_position_embeddings": c.first_position + c.max_positions}
        written["pad_token_id"] = max(c.first_position - 1, 0)
    if family.model_type in ENCODERS and c.head in ("pooler", "none"):
        written["architectures"] = [family.architecture.replace("ForMaskedLM", "Model")]
    if family.model_type == "gpt2":
        written |= {"n_inner": c.ffn, "scale_attn_weights": c.attention_scale != 1.0}
    known = GATED_ACTIVATIONS if c.activation in GATED else ACTIVATIONS
    written[family.activation_key] = next((k for k, ours in known.items() if ours == c.activation), c.activation)
    written |= dict(zip(family.bias_names, family.bias_keys.get(c.bias, ()), strict=False))
    if c.positions == "rotary":
        written |= _rope_written(family, c, length)
    if family.local_layers:
        local = any(c.windows())
        unused = family.defaults.get("sliding_window") if family.local_layers == "types" else None
        written["sliding_window"] = c.window if local else unused
        if family.local_layers == "types":
            written["layer_types"] = ["sliding_attention" if w else "full_attention" for w in c.windows()]
        if family.model_type.startswith("qwen"):
            written["use_sliding_window"] = local
            written |= {"max_window_layers": 0} if local and family.model_type == "qwen2" else {}
    if "query_pre_attn_scalar" in family.defaults:
        scalar = _scale(c) ** -2
        written["query_pre_attn_scalar"] = round(scalar) if round(scalar) ** -0.5 == _scale(c) else scalar
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if key in written:
            written[key] = written[key] or None
    return written


def _rope_written(family: Family, c: ModelConfig, length: int) -> dict[str, Any]:
    s, p = c.rope_scaling, {"rope_theta": c.rope_theta}
    p["rope_type"] = "default" if s.kind == "none" else s.kind
    if c.rope_fraction != 1 or family.model_type == "gpt_neox":
        p["partial_rotary_factor"] = c.rope_fraction
    if s.kind != "none":
        p["factor"] = s.factor
    written = {}
    if s.kind in ("llama3", "yarn", "longrope"):
        p["original_max_position_embeddings"] = s.original_length
    if s.kind in ("yarn", "longrope") and s.attention_factor is not None:
        p["attention_factor"] = s.attention_factor
    if s.kind == "llama3":
        p |= {"low_freq_factor": s.low_frequency, "high_freq_factor": s.high_frequency}
    if s.kind == "yarn":
        p |= {"beta_fast": s.beta_fast, "beta_slow": s.beta_slow}
    if s.kind == "longrope":
        p |= {"short_factor": list(s.short_factors), "long_factor": list(s.long_factors)}
        if family.model_type == "phi3":
            written = {"original_max_position_embeddings": s.original_length}
            written["max_position_embeddings"] = round(s.factor * s.original_length)
    if s.kind == "dynamic":
        written["max_position_embeddings"] = s.original_length
    if family.model_type == "gemma3_text":
        local = {"rope_type": "default", "rope_theta": c.rope_theta_local or c.rope_theta}
        return written | {"rope_parameters": {"full_attention": p, "sliding_attention": local}}
    return written | {"rope_parameters": p}
