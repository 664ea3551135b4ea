"""Texts as numbers: pairs have the types that the model knows, and what is not finite is no answer."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engines import BASE, TOKENIZER

from config.schema import Config, finish
from finetune.texts import sequence
from inference.encoder import Encoder
from inference.encodes import done
from inference.opening import Opened
from inference.requests import EncodeRequest
from model.transformer import describe
from parallel.mesh import AXES, make_mesh

LENGTH = 8


def encoder(token_types: int) -> Encoder:
    """A compiled one with three classes and so many types of tokens."""
    model = replace(BASE, layers=1, causal=False, head="classes", labels=3, token_types=token_types)
    config = finish(Config(model=model, train=replace(Config().train, seq_len=LENGTH)))
    mesh = make_mesh(dict.fromkeys(AXES, 1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        description = describe(config.model)
        params = jax.jit(lambda: description.init(jax.random.key(0)))()
    made = Encoder(
        Opened(Path("model"), config, TOKENIZER, mesh, description, params, jnp.dtype(jnp.float32), None, "digest"),
        1, LENGTH,
    )  # fmt: skip
    made.compile()
    return made


@pytest.mark.parametrize("token_types", [1, 2])
def test_the_second_text_of_a_pair_has_the_last_type_that_there_is(token_types):
    made, tokens, types = encoder(token_types), (1, 2, 3, 4), (0, 0, 1, 1)
    plain, pair = (made.run([EncodeRequest("a", tokens, own)]) for own in ((), types))
    assert np.isfinite(pair).all()
    assert np.array_equal(plain, pair) == (token_types == 1)
    setup = SimpleNamespace(tokenizer=TOKENIZER, seq_len=LENGTH, model=SimpleNamespace(token_types=token_types))
    trained = sequence(setup, [np.array([1, 2]), np.array([3, 4])], "a", None)["types_T"]
    assert trained.max() == token_types - 1


def test_what_is_not_finite_is_an_error():
    one = EncodeRequest("a", (1,)), print
    assert done(one, np.array([1.0, 2.0], np.float32)).answer.vector == (1.0, 2.0)
    assert [done(one, np.array([1.0, bad])).finish for bad in (np.nan, np.inf)] == ["error"] * 2
