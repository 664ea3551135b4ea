"""Logits and gradients of every model family against transformers (see tests/golden/make_goldens.py).

The weights are drawn again and laid out by the tables below: a parameter's dotted path, the weight that it is there
(`{}` is the layer), and how the one becomes the other.
"""

from functools import reduce
from operator import getitem
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.config import ModelConfig, RopeScaling
from model.transformer import describe
from tests.golden import draw
from training.loss import chunked_losses

REFERENCES = np.load(Path(__file__).parent.parent / "golden" / "references.npz")

# Both sides sum float32 in their own order: logits of size 3 were seen to differ by up to 7e-6. The least of mistakes,
# GPT-2's norm epsilon at 1e-6 instead of 1e-5, makes 3e-4.
ATOL, RTOL = 3e-5, 1e-5

SIZES = {"layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "head_dim": 16, "ffn": 48, "vocab_size": draw.VOCABULARY}
LLAMA3 = RopeScaling("llama3", factor=8.0, original_length=16)
YARN = RopeScaling("yarn", factor=4.0, original_length=16, beta_fast=2.0, beta_slow=0.25)
CONFIGS = {
    "gpt2": ModelConfig(
        **SIZES | {"kv_heads": 4, "head_dim": 8}, positions="learned", max_positions=32,
        norm="layer", norm_eps=1e-5, bias="all", activation="gelu",
    ),
    "llama3": ModelConfig(**SIZES, rope_theta=100.0, rope_scaling=LLAMA3),
    "llama_yarn": ModelConfig(**SIZES, rope_theta=100.0, rope_scaling=YARN),
    "llama_untied": ModelConfig(**SIZES, tied_embeddings=False),
    "qwen2": ModelConfig(**SIZES | {"head_dim": 8}, bias="qkv"),
    "qwen3": ModelConfig(**SIZES, qk_norm=True),
    "mixtral": ModelConfig(**SIZES, norm_eps=1e-5, rope_theta=1e6, experts=4, experts_per_token=2),
    "qwen3_moe": ModelConfig(
        **SIZES | {"ffn": 24}, qk_norm=True, experts=6, experts_per_token=3, router_normalize=False
    ),
    "gemma2": ModelConfig(
        **SIZES | {"layers": 3}, embedding_scale=True, norm_position="both", activation="geglu",
        attention_scale=24**-0.5, attention_softcap=2.0, logit_softcap=3.0, window=5, window_pattern="LG",
    ),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------ name tables


def same(w: np.ndarray) -> np.ndarray:
    return w


def transposed(w: np.ndarray) -> np.ndarray:
    return w.T


def plus_one(w: np.ndarray) -> np.ndarray:
    return w + 1  # Gemma stores norm scales less one


def gpt2_table(c: ModelConfig) -> dict:
    shape = (c.heads, c.head_dim)

    def matrix(part):  # queries, keys and values are one (D, 3D) matrix
        return lambda w: np.split(w, 3, axis=1)[part].reshape(c.width, *shape)

    def vector(part):
        return lambda w: np.split(w, 3)[part].reshape(shape)

    block, fused = "transformer.h.{}.", "transformer.h.{}.attn.c_attn."
    table = {
        "tokens.weight": ("transformer.wte.weight", same),
        "positions": ("transformer.wpe.weight", same),
        "final_norm.scale": ("transformer.ln_f.weight", same),
        "final_norm.bias": ("transformer.ln_f.bias", same),
        "layers.attention.out.weight": (block + "attn.c_proj.weight", lambda w: w.reshape(*shape, c.width)),
        "layers.attention.out.bias": (block + "attn.c_proj.bias", same),
        "layers.ffn.up.weight": (block + "mlp.c_fc.weight", same),
        "layers.ffn.up.bias": (block + "mlp.c_fc.bias", same),
        "layers.ffn.down.weight": (block + "mlp.c_proj.weight", same),
        "layers.ffn.down.bias": (block + "mlp.c_proj.bias", same),
    }
    for part, name in enumerate(("query", "key", "value")):
        table[f"layers.attention.{name}.weight"] = (fused + "weight", matrix(part))
        table[f"layers.attention.{name}.bias"] = (fused + "bias", vector(part))
    for norm, name in (("attention_norm", "ln_1"), ("ffn_norm", "ln_2")):
        table[f"layers.{norm}.scale"] = (f"{block}{name}.weight", same)
        table[f"layers.{norm}.bias"] = (f"{block}{name}.bias", same)
    return table


def ffn_table(block: str) -> dict:
    names = ("gate", "up", "down")
    return {f"layers.ffn.{name}.weight": (f"{block}mlp.{name}_proj.weight", transposed) for name in names}


def expert_table(block: str) -> dict:
    def half(part):  # gate and up are one (E, 2F, D)
        return lambda w: np.split(w, 2, axis=1)[part].transpose(0, 2, 1)

    return {
        "layers.moe.router.weight": (block + "mlp.gate.weight", transposed),
        "layers.moe.gate.weight": (block + "mlp.experts.gate_up_proj", half(0)),
        "layers.moe.up.weight": (block + "mlp.experts.gate_up_proj", half(1)),
        "layers.moe.down.weight": (block + "mlp.experts.down_proj", lambda w: w.transpose(0, 2, 1)),
    }


def llama_table(c: ModelConfig, norm=same) -> dict:
    def into_heads(w):  # (N H, D) to (D, N, H)
        return w.T.reshape(c.width, -1, c.head_dim)

    def out_of_heads(w):  # (D, N H) to (N, H, D)
        return w.T.reshape(c.heads, c.head_dim, c.width)

    def bias(w):
        return w.reshape(-1, c.head_dim)

    block = "model.layers.{}."
    table = {
        "tokens.weight": ("model.embed_tokens.weight", same),
        "final_norm.scale": ("model.norm.weight", norm),
        "layers.attention.out.weight": (block + "self_attn.o_proj.weight", out_of_heads),
        **(expert_table(block) if c.experts else ffn_table(block)),
        "layers.attention_norm.scale": (block + "input_layernorm.weight", norm),
        "layers.ffn_norm.scale": (block + "post_attention_layernorm.weight", norm),
    }
    for name, letter in (("query", "q"), ("key", "k"), ("value", "v")):
        table[f"layers.attention.{name}.weight"] = (f"{block}self_attn.{letter}_proj.weight", into_heads)
        if c.bias == "qkv":
            table[f"layers.attention.{name}.bias"] = (f"{block}self_attn.{letter}_proj.bias", bias)
        if c.qk_norm and letter != "v":
            table[f"layers.attention.{name}_norm.scale"] = (f"{block}self_attn.{letter}_norm.weight", norm)
    if not c.tied_embeddings:
        table["head.weight"] = ("lm_head.weight", same)
    return table


def gemma_table(c: ModelConfig) -> dict:
    block = "model.layers.{}."
    return llama_table(c, norm=plus_one) | {
        "layers.attention_post_norm.scale": (block + "post_attention_layernorm.weight", plus_one),
        "layers.ffn_norm.scale": (block + "pre_feedforward_layernorm.weight", plus_one),
        "layers.ffn_post_norm.scale": (block + "post_feedforward_layernorm.weight", plus_one),
    }


TABLES = {"gpt2": gpt2_table, "gemma2": gemma_table}

# The weights' own shapes, (rows, columns) as their framework has them.
D, F, V = SIZES["width"], SIZES["ffn"], draw.VOCABULARY


def their_shape(name: str, c: ModelConfig) -> tuple[int, ...]:
    heads, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    by_ending = {
        "wte.weight": (V, D), "embed_tokens.weight": (V, D), "lm_head.weight": (V, D),
        "wpe.weight": (c.max_positions, D),
        "c_attn.weight": (D, 3 * D), "c_attn.bias": (3 * D,), "attn.c_proj.weight": (D, D),
        "c_fc.weight": (D, F), "c_fc.bias": (F,), "mlp.c_proj.weight": (F, D),
        "q_proj.weight": (heads, D), "k_proj.weight": (kv, D), "v_proj.weight": (kv, D), "o_proj.weight": (D, heads),
        "q_proj.bias": (heads,), "k_proj.bias": (kv,), "v_proj.bias": (kv,),
        "gate_proj.weight": (F, D), "up_proj.weight": (F, D), "down_proj.weight": (D, F),
        "mlp.gate.weight": (c.experts, D), "gate_up_proj": (c.experts, 2 * c.ffn, D),
        "experts.down_proj": (c.experts, D, c.ffn),
        "q_norm.weight": (c.head_dim,), "k_norm.weight": (c.head_dim,),
    }  # fmt: skip
    return next((shape for ending, shape in by_ending.items() if name.endswith(ending)), (D,))


# ------------------------------------------------------------------------------------------------------------ tests


def lay_out(case: str, c: ModelConfig, table: dict, shapes: dict) -> tuple[dict, float]:
    """The parameters' nested dict (vocabulary rows padded with zeros), and the sum of |weight| over what was drawn."""
    drawn: dict[str, np.ndarray] = {}

    def take(name, transform):
        drawn[name] = draw.weight(case, name, their_shape(name, c))
        return transform(drawn[name])

    def parameter(path, leaf):
        dotted = ".".join(key.key for key in path)
        name, transform = table[dotted]
        if dotted.startswith("layers."):
            value = np.stack([take(name.format(layer), transform) for layer in range(c.layers)])
        else:
            value = take(name, transform)
            value = np.pad(value, [(0, leaf.shape[0] - len(value))] + [(0, 0)] * (value.ndim - 1))
        assert value.shape == leaf.shape, dotted
        return jnp.asarray(value)

    params = jax.tree_util.tree_map_with_path(parameter, shapes)
    return params, sum(float(np.abs(w.astype(np.float64)).sum()) for w in drawn.values())


def stored_gradients(case: str) -> dict[str, np.ndarray]:
    names = [key.removeprefix(f"{case}/") for key in REFERENCES.files if key.startswith(f"{case}/")]
    return {name: REFERENCES[f"{case}/{name}"] for name in names if name not in ("logits", "weights")}


@pytest.mark.parametrize("case", CONFIGS)
def test_logits_and_gradients_equal_those_of_transformers(case):
    c = CONFIGS[case]
    description, table = describe(c), TABLES.get(case, llama_table)(c)
    params, total = lay_out(case, c, table, description.shapes)
    assert total == pytest.approx(float(REFERENCES[f"{case}/weights"]), rel=1e-12), "other weights than stored"
    tokens, theirs = jnp.asarray(draw.tokens(case)), stored_gradients(case)
    mask = jnp.ones(tokens.shape).at[:, -1].set(0)  # the last token predicts nothing

    def loss(params):
        model = description.bind(params)
        x_BTD, *_ = model(tokens)
        sums = chunked_losses(model, x_BTD, jnp.roll(tokens, -1, axis=1), mask, 8)
        return sums.nll / mask.sum(), model.logits(x_BTD)[..., : c.vocab_size]

    grads, logits = jax.jit(jax.grad(loss, has_aux=True) if theirs else lambda params: (None, loss(params)[1]))(params)
    np.testing.assert_allclose(logits, REFERENCES[f"{case}/logits"], atol=ATOL, rtol=RTOL)
    for name, gradient in theirs.items():
        assert np.abs(gradient).max() > 1e-3, f"{name} tests nothing"
        assert_gradient_equals(grads, table, name, gradient)


def assert_gradient_equals(grads: dict, table: dict, name: str, theirs: np.ndarray):
    """Compares every one of our gradients that the weight `name` is a part of."""
    layer = next((part for part in name.split(".") if part.isdigit()), None)
    generic = name if layer is None else name.replace(f".{layer}.", ".{}.")
    matched = [(path, transform) for path, (weight, transform) in table.items() if weight == generic]
    assert matched, f"{name} stands in no table"
    for path, transform in matched:
        ours = reduce(getitem, path.split("."), grads)
        ours = ours[: len(theirs)] if layer is None else ours[int(layer)]
        expected = theirs if transform is plus_one else transform(theirs)  # a gradient has no offset
        np.testing.assert_allclose(ours, expected, atol=1e-6, rtol=1e-4, err_msg=f"{name} {path}")
