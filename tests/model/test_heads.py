"""The output table, whole and in parts of the vocabulary."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

VOCAB, ROWS = 50, 60  # tokens, and rows of the table with padding


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("parts", [1, 2, 7, 1000])
def test_parts_of_the_vocabulary_are_all_of_it(build, parts, tied):
    """Each row once, in at least so many parts if there are as many rows; the logits are those of the whole."""
    model = build(vocab_size=VOCAB, vocab_multiple=12, tied_embeddings=tied, logit_softcap=2.0)
    bound = model.description.bind(model.params)
    x_BTD = jax.random.normal(jax.random.key(1), (2, 3, model.description.config.width))
    rows, whole = bound.vocabulary(parts, jnp.float32), bound.logits(x_BTD)
    tokens = np.asarray(rows.token_V)
    assert tokens.shape[0] >= min(parts, ROWS)
    np.testing.assert_array_equal(np.sort(tokens.ravel()), np.arange(ROWS))
    for part in range(min(len(tokens), 8)):
        logits = bound.logits(x_BTD, jax.tree.map(lambda x, part=part: x[part], rows))
        np.testing.assert_allclose(logits, whole[..., tokens[part]], rtol=1e-6, atol=1e-6)
    assert (whole[..., VOCAB:] < -1e29).all()
