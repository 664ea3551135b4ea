"""What a layer keeps for its backward pass: how much, and in which form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model.config import ModelConfig
from model.projection import Projection
from model.saved import stackable
from model.specs import RandomKey, projection
from model.transformer import block_of, describe, rows_of

B, T = 2, 64
SIZES = {"layers": 5, "width": 32, "heads": 4, "head_dim": 8, "ffn": 96, "vocab_size": 64, "max_positions": T}
GPT2 = {"positions": "learned", "norm": "layer", "activation": "gelu", "bias": "all"}
LLAMA = {"positions": "rotary", "norm": "rms", "activation": "swiglu", "bias": "none", "kv_heads": 2}
FAMILIES = {"gpt2": GPT2, "llama": LLAMA}


def config(family: str, **fields) -> ModelConfig:
    return ModelConfig(**SIZES | {"kv_heads": SIZES["heads"]} | FAMILIES[family] | fields)


def gradient(family: str, dtype):
    """The jitted gradient of a sum over a model's output, with its parameters and tokens."""
    description = describe(config(family))
    params = description.init(jax.random.key(0))
    tokens_BT = jax.random.randint(jax.random.key(1), (B, T), 0, SIZES["vocab_size"])

    def total(params, tokens_BT):
        x_BTD = description.bind(params)(tokens_BT, dtype=dtype)[0]
        return jnp.square(x_BTD.astype(jnp.float32)).mean()

    return jax.jit(jax.grad(total)), params, tokens_BT


@pytest.mark.parametrize("family", FAMILIES)
def test_no_stack_of_16_bit_values_is_widened(family):
    function, params, tokens_BT = gradient(family, jnp.bfloat16)
    text = function.lower(params, tokens_BT).compile().as_text()
    stack = f"[{SIZES['layers']},{B},{T},{SIZES['ffn']}]"
    assert f"u16{stack}" in text
    assert f"f32{stack}" not in text


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_do_not_depend_on_the_form(family, monkeypatch):
    function, params, tokens_BT = gradient(family, jnp.bfloat16)
    found = function(params, tokens_BT)
    monkeypatch.setattr("model.transformer.stackable", lambda block: block)
    function, params, tokens_BT = gradient(family, jnp.bfloat16)
    plain = function(params, tokens_BT)
    exact_function, *_ = gradient(family, jnp.float32)
    exact = exact_function(params, tokens_BT)
    norm = lambda tree: np.sqrt(sum(float(jnp.square(x.astype(jnp.float32)).sum()) for x in jax.tree.leaves(tree)))
    apart = lambda a, b: norm(jax.tree.map(jnp.subtract, a, b)) / norm(b)
    rounding = apart(plain, exact)
    assert 1e-4 < rounding < 0.05  # it is bfloat16
    assert apart(found, exact) < 1.2 * rounding
    assert apart(found, plain) < rounding


def test_other_arguments_keep_their_place():
    function = stackable(lambda parameters, x, scale, shift: parameters * x * scale + shift)
    arguments = [jnp.asarray(value, jnp.bfloat16) for value in (2, 3, 5, 7)]
    assert float(function(*arguments)) == 37
    of_parameters, of_x = jax.grad(function, argnums=(0, 1))(*arguments)
    assert (float(of_parameters), float(of_x)) == (15, 10)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_keeps_what_matmuls_and_norms_read(family):
    c = config(family)
    description = describe(c)
    params = jax.tree.map(lambda leaf: leaf[0], description.init(jax.random.key(0))["layers"])
    info = description.bind({}).info(jnp.zeros((B, T), jnp.int32))
    row = jax.tree.map(lambda x: x[0], rows_of(c, range(1)))
    x_BTD = jnp.ones((B, T, c.width))
    pull = jax.vjp(lambda params, x: block_of(description.block)(params, x, row, info)[0], params, x_BTD)[1]
    kept = [leaf.shape for leaf in jax.tree.leaves(pull) if hasattr(leaf, "shape")]
    hidden = [shape for shape in kept if shape == (B, T, c.ffn)]
    assert len(hidden) == (2 if family == "gpt2" else 3)  # before the activation (with its gate), and after it
    scores = [shape for shape in kept if shape == (B, c.kv_heads, c.heads // c.kv_heads * T, T)]
    assert len(scores) == 1  # the weights, not the scores as well


def test_a_bias_learns_from_all_tokens():
    specs = projection(RandomKey(), (1, 1), ("width", "ffn"), 1.0, bias=True)
    graphdef = nnx.graphdef(Projection(specs))
    x, weight = jnp.zeros((1, 4099, 1), jnp.bfloat16), jnp.ones((1, 1))
    total = lambda bias: nnx.merge(graphdef, {"weight": weight, "bias": bias})(x).astype(jnp.float32).sum()
    assert float(jax.grad(total)(jnp.zeros(1))[0]) == 4099  # in bfloat16 it would be 4096
