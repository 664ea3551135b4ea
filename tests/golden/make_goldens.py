"""Writes references.npz: what transformers computes for tiny random models. Run from the checkout, in an environment
of its own with the packages of the extra `compare`:

python -m tests.golden.make_goldens

Only outputs are stored: float32 logits of every case, and the gradients of the mean next-token loss with respect to the
weights named in GRADIENTS. The weights are drawn again from their names (see draw.py); the sum of their absolute values
is stored to tell a changed generator from a changed model.
"""

from pathlib import Path

import numpy as np
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

from tests.golden import draw

SIZES = {
    "vocab_size": draw.VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 16,
    "tie_word_embeddings": True,
    "pad_token_id": None,  # else the gradient of its row is dropped
}
# Original lengths of 16 tokens, so that the scaling matters within 24.
ROPE_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
ROPE_YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "beta_fast": 2.0,
    "beta_slow": 0.25,
    "original_max_position_embeddings": 16,
}

CASES = {
    "gpt2": (
        GPT2LMHeadModel,
        GPT2Config(
            vocab_size=draw.VOCABULARY,
            n_positions=32,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_inner=48,
            bos_token_id=None,
            eos_token_id=None,
        ),
    ),
    "llama3": (LlamaForCausalLM, LlamaConfig(**SIZES, rope_parameters=ROPE_LLAMA3)),
    "llama_yarn": (LlamaForCausalLM, LlamaConfig(**SIZES, rope_parameters=ROPE_YARN)),
    "llama_untied": (LlamaForCausalLM, LlamaConfig(**SIZES | {"tie_word_embeddings": False})),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**{k: v for k, v in SIZES.items() if k != "head_dim"})),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES)),
    "mixtral": (MixtralForCausalLM, MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)),
    "qwen3_moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig(**SIZES, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=24, norm_topk_prob=False),
    ),
    "gemma2": (
        Gemma2ForCausalLM,
        Gemma2Config(
            **SIZES | {"num_hidden_layers": 3},
            query_pre_attn_scalar=24,
            sliding_window=5,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0,
        ),
    ),
}

GRADIENTS = {
    "gpt2": ["transformer.wpe.weight", "transformer.h.0.attn.c_attn.weight", "transformer.h.1.ln_2.bias"],
    "llama3": ["model.layers.0.self_attn.k_proj.weight", "model.layers.1.mlp.gate_proj.weight"],
    "qwen3": ["model.layers.0.self_attn.q_norm.weight"],
    "mixtral": ["model.layers.0.mlp.experts.gate_up_proj", "model.layers.1.mlp.gate.weight"],
    "qwen3_moe": ["model.layers.0.mlp.gate.weight", "model.layers.1.mlp.experts.down_proj"],
    "gemma2": [
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.post_attention_layernorm.weight",
    ],
}


def outputs(case: str) -> dict[str, np.ndarray]:
    """The arrays to store for one case, by name."""
    make, config = CASES[case]
    config._attn_implementation = "eager"
    model = make(config).eval().float()
    total = 0.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = draw.weight(case, name, tuple(parameter.shape))
            total += float(np.abs(drawn.astype(np.float64)).sum())
            parameter.copy_(torch.from_numpy(drawn))
    tokens = torch.from_numpy(draw.tokens(case)).long()
    logits = model(input_ids=tokens, use_cache=False).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    gradients = {name: model.get_parameter(name).grad.numpy() for name in GRADIENTS.get(case, [])}
    stored = {"logits": logits.detach().numpy(), "weights": np.float64(total)} | gradients
    return {f"{case}/{name}": value for name, value in stored.items()}


def deepseek_experts() -> dict[str, np.ndarray]:
    """The output of DeepSeek-V3's experts alone, router and shared ones included, for drawn vectors."""
    case = "deepseek_v3"
    sizes = {name: value for name, value in SIZES.items() if name != "head_dim"}
    groups = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "norm_topk_prob": True}
    experts = {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 16, "n_shared_experts": 2}
    block = DeepseekV3MoE(DeepseekV3Config(**sizes, **groups, **experts)).eval().float()
    with torch.no_grad():
        for name, value in [*block.named_parameters(), *block.named_buffers()]:
            value.copy_(torch.from_numpy(draw.weight(case, name, tuple(value.shape))))
        x = torch.from_numpy(draw.weight(case, "x", (24, SIZES["hidden_size"])))
        return {f"{case}/x": x.numpy(), f"{case}/y": block(x[None])[0].numpy()}


def main() -> None:
    """Writes all cases beside this file."""
    arrays: dict[str, np.ndarray] = {}
    for case in CASES:
        arrays |= outputs(case)
    arrays |= deepseek_experts()
    path = Path(__file__).parent / "references.npz"
    np.savez_compressed(path, **arrays)
    print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
