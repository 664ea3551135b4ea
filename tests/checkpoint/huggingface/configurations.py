"""Random small configurations of every family, as transformers takes them: the same for the same seed."""

import random
from typing import Any

ENCODERS = ("bert", "roberta", "distilbert")
VOCABULARY = 67
LONGEST = 48  # tokens of max_position_embeddings


def sizes(draw: random.Random) -> dict[str, Any]:
    """Odd head counts, grouped heads, head sizes that are not width / heads."""
    kv_heads, group = draw.choice([1, 2, 3]), draw.choice([1, 2, 3])
    width = kv_heads * group * draw.choice([4, 8, 12])
    return {
        "vocab_size": VOCABULARY, "hidden_size": width, "num_hidden_layers": draw.choice([1, 2, 3]),
        "intermediate_size": draw.choice([20, 36]), "num_attention_heads": kv_heads * group,
        "num_key_value_heads": kv_heads, "head_dim": draw.choice([6, 8, 12]), "max_position_embeddings": LONGEST,
        "tie_word_embeddings": draw.choice([True, False]), "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip


def rope(draw: random.Random, dims: int, kinds: tuple[str, ...]) -> dict[str, Any]:
    """Rotary parameters whose scaling matters within 40 tokens; `dims` of a head turn."""
    kind, theta = draw.choice(kinds), draw.choice([100.0, 10000.0, 500000.0])
    original = {"original_max_position_embeddings": draw.choice([12, 16])}
    longrope = {name: [draw.uniform(1, 4) for _ in range(dims // 2)] for name in ("short_factor", "long_factor")}
    scaling = {
        "default": {},
        "linear": {"factor": draw.choice([2.0, 4.0])},
        "dynamic": {"factor": 2.0},
        "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **original},
        "yarn": {"factor": 4.0, **original, **draw.choice([{}, {"attention_factor": 1.3}, {"beta_fast": 16.0}])},
        "longrope": {**longrope, **original, "factor": 3.0},
    }[kind]
    return {"rope_type": kind, "rope_theta": theta, **scaling}


ALL_ROPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


def configuration(family: str, seed: int) -> dict[str, Any]:
    """Arguments of the family's config class."""
    draw = random.Random(f"{family}/{seed}")
    if family in ("gpt2", "gpt_neox", *ENCODERS):
        return _without_groups(family, draw)
    c = sizes(draw)
    kinds = ("default", "longrope") if family == "phi3" else ALL_ROPES
    c["rope_parameters"] = rope(draw, c["head_dim"], kinds)
    layer_types = [draw.choice(["sliding_attention", "full_attention"]) for _ in range(c["num_hidden_layers"])]
    window = draw.choice([None, 5, 11])
    layer_types = layer_types if window else ["full_attention"] * c["num_hidden_layers"]
    bias = draw.choice([True, False])
    if family == "phi3":
        c["head_dim"] = c["hidden_size"] // c["num_attention_heads"]
        c["rope_parameters"] = rope(draw, c["head_dim"], kinds)
        share = draw.choice([1.0, 0.5]) if c["head_dim"] % 4 == 0 else 1.0
        c["rope_parameters"] |= {"partial_rotary_factor": share}
        for name in ("short_factor", "long_factor"):
            if name in c["rope_parameters"]:
                c["rope_parameters"][name] = c["rope_parameters"][name][: int(c["head_dim"] * share) // 2]
        c["original_max_position_embeddings"] = c["rope_parameters"].get("original_max_position_embeddings", LONGEST)
    extra = {
        "llama": {
            "attention_bias": bias, "mlp_bias": draw.choice([True, False]),
            "hidden_act": draw.choice(["silu", "gelu"]),
        },
        "mistral": {"sliding_window": window},
        "qwen2": {"layer_types": layer_types, "use_sliding_window": window is not None, "sliding_window": window},
        "qwen3": {
            "layer_types": layer_types, "use_sliding_window": window is not None, "sliding_window": window,
            "attention_bias": bias,
        },
        "phi3": {"sliding_window": window},
        "gemma2": {
            "layer_types": layer_types, "sliding_window": window or 7, "query_pre_attn_scalar": draw.choice([8, 24]),
            "attn_logit_softcapping": draw.choice([None, 5.0]), "final_logit_softcapping": draw.choice([None, 3.0]),
            "attention_bias": bias,
        },
        "gemma3_text": {
            "layer_types": layer_types, "sliding_window": window or 7, "query_pre_attn_scalar": draw.choice([8, 24]),
            "attention_bias": bias,
            "rope_parameters": {
                "full_attention": c["rope_parameters"],
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            },
        },
        "mixtral": {
            "num_local_experts": draw.choice([3, 4]), "num_experts_per_tok": draw.choice([1, 2]),
            "sliding_window": window,
        },
        "qwen3_moe": {
            "num_experts": draw.choice([3, 6]), "num_experts_per_tok": draw.choice([1, 3]),
            "moe_intermediate_size": 12, "norm_topk_prob": draw.choice([True, False]), "attention_bias": bias,
        },
        "olmo2": {"attention_bias": bias},
    }[family]  # fmt: skip
    return c | extra


def _without_groups(family: str, draw: random.Random) -> dict[str, Any]:
    """Families in which a head has width / heads dims."""
    heads, size, layers = draw.choice([1, 3, 5]), draw.choice([8, 16]), draw.choice([1, 2, 3])
    tied = draw.choice([True, False])
    act = draw.choice(["gelu", "gelu_new", "relu"])
    if family == "gpt2":
        return {
            "vocab_size": VOCABULARY, "n_embd": heads * size, "n_layer": layers, "n_head": heads,
            "n_positions": LONGEST, "n_inner": draw.choice([None, 20]), "activation_function": act,
            "tie_word_embeddings": tied, "scale_attn_weights": draw.choice([True, False]),
        }  # fmt: skip
    if family == "distilbert":
        return {
            "vocab_size": VOCABULARY, "dim": heads * size, "hidden_dim": 20, "n_layers": layers, "n_heads": heads,
            "max_position_embeddings": LONGEST, "activation": draw.choice(["gelu", "relu"]),
        }  # fmt: skip
    c = {
        "vocab_size": VOCABULARY, "hidden_size": heads * size, "intermediate_size": 20, "num_hidden_layers": layers,
        "num_attention_heads": heads, "max_position_embeddings": LONGEST, "hidden_act": act,
    }  # fmt: skip
    if family == "gpt_neox":
        share = draw.choice([0.25, 0.5, 1.0])
        parameters = rope(draw, int(size * share), ALL_ROPES if size * share > 2 else ("default", "linear")) | {
            "partial_rotary_factor": share
        }
        return c | {
            "rope_parameters": parameters, "use_parallel_residual": draw.choice([True, False]),
            "attention_bias": draw.choice([True, False]), "tie_word_embeddings": tied, "eos_token_id": 2,
        }  # fmt: skip
    return c | {"type_vocab_size": draw.choice([1, 2]), "layer_norm_eps": draw.choice([1e-12, 1e-5]), "pad_token_id": 1}
