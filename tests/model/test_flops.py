"""Model FLOPs by formula against XLA's own count, against masks counted token by token, and by hand for GPT-2."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from config.compose import load
from model.attention_rule import TokenInfo, visible
from model.config import ModelConfig
from model.counts import flops_per_token
from model.transformer import describe
from training.config import TrainConfig
from training.step import gradients

WIDE = {"layers": 2, "width": 256, "heads": 4, "head_dim": 64, "vocab_size": 512, "scan_layers": False}


@pytest.mark.parametrize(
    "fields",
    [
        {"kv_heads": 4, "ffn": 1024, "activation": "gelu"},
        {"kv_heads": 1, "ffn": 512, "activation": "swiglu", "tied_embeddings": False},
    ],
    ids=["gpt", "llama, multi-query"],
)
def test_formula_equals_what_xla_counts(fields):
    """XLA multiplies masked scores too, hence full attention; what is no matmul is the few percent of difference."""
    config, seq_len = ModelConfig(**WIDE, **fields), 128
    description, train = describe(config), TrainConfig(loss_chunk=0)
    tokens = jax.ShapeDtypeStruct((1, seq_len), jnp.int32)
    batch = {"tokens_BT": tokens, "targets_BT": tokens, "mask_BT": jax.ShapeDtypeStruct((1, seq_len), jnp.float32)}
    step = jax.jit(lambda params, batch: gradients(description, train, params, batch))
    counted = step.lower(description.shapes, batch).compile().cost_analysis()["flops"] / seq_len
    assert flops_per_token(config, seq_len, full_attention=True) == pytest.approx(counted, rel=0.03)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [0, 1, 5, 40])
def test_attention_part_counts_the_keys_that_tokens_see(window, causal):
    config = ModelConfig(layers=3, window=window, window_pattern="LG", causal=causal, vocab_size=10)
    seq_len = 17
    info = TokenInfo(jnp.arange(seq_len)[None])
    seen = [visible(info, info, causal=causal, window=jnp.int32(w)) for w in config.windows()]
    keys = sum(float(np.asarray(mask).sum()) / seq_len for mask in seen)
    longer = ModelConfig(layers=3, window=1, causal=True, vocab_size=10)  # each token sees itself: 3 keys
    difference = flops_per_token(config, seq_len) - flops_per_token(longer, seq_len)
    assert difference == pytest.approx(12 * config.heads * config.head_dim * (keys - 3))


def test_experts_count_as_far_as_a_token_goes_to_them():
    dense, sizes = ModelConfig(layers=3, vocab_size=10, ffn=96), {"layers": 3, "vocab_size": 10, "ffn": 32}
    experts = ModelConfig(**sizes, experts=8, experts_per_token=2, shared_experts=1)
    assert flops_per_token(experts, 16) - flops_per_token(dense, 16) == 6 * 3 * 8 * dense.width  # the routers


def test_gpt2_by_hand():
    config = load(["model=gpt2_124m"]).model
    matrices = 12 * (4 * 768 * 768 + 2 * 768 * 3072) + 50257 * 768
    assert flops_per_token(config, 1024, full_attention=True) == 6 * matrices + 12 * 12 * 768 * 1024
    assert flops_per_token(config, 1024) == 6 * matrices + 12 * 12 * 768 * 1025 / 2
