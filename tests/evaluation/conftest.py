"""A tiny random model for the tests of evaluation."""

import contextlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.config import ModelConfig
from model.transformer import describe
from parallel.mesh import AXES, make_mesh

MODEL = ModelConfig(layers=2, width=16, heads=2, kv_heads=2, head_dim=8, ffn=16, vocab_size=97, vocab_multiple=32)
LONGEST = 80  # context of `next_token`


@pytest.fixture(scope="session")
def description():
    return describe(MODEL)


@pytest.fixture(scope="session")
def params(description):
    """More spread than at the start of a training, so that predictions differ."""
    drawn = jax.jit(description.init)(jax.random.key(1))
    return jax.tree.map(lambda p: np.asarray(p) * (5 if p.ndim > 1 else 1), drawn)


@pytest.fixture(scope="session")
def on_mesh():
    """on_mesh(**sizes): a mesh in context, of one device unless an axis says more."""

    @contextlib.contextmanager
    def entered(**sizes):
        mesh = make_mesh(dict.fromkeys(AXES, 1) | sizes, jax.devices()[: math.prod(sizes.values())])
        with jax.set_mesh(mesh):
            yield mesh

    return entered


@pytest.fixture(scope="session")
def next_token(description, params):
    """next_token(context)[token]: log p(token | context), one context at a time; nothing behind it is seen."""

    @jax.jit
    def all_positions(tokens_1T):
        model = description.bind(params)
        x_BTD, _, _ = model(tokens_1T)
        return jax.nn.log_softmax(model.logits(x_BTD)[0, :, : MODEL.vocab_size])

    def last(context):
        tokens_1T = np.zeros((1, LONGEST), np.int32)
        tokens_1T[0, : len(context)] = context
        return np.asarray(all_positions(jnp.asarray(tokens_1T)))[len(context) - 1]

    return last
