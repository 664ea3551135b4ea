"""What each output may depend on, by gradients: causal and full masks, windows, packed documents."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

T = 12
SEGMENTS = np.array([0] * 3 + [1] * 5 + [2] * 4)
DISTANCE = np.arange(T)[:, None] - np.arange(T)[None]
NEAR = np.abs(DISTANCE) < 3
CAUSAL = DISTANCE >= 0
EVERYWHERE = np.ones((T, T), bool)
SAME_DOCUMENT = SEGMENTS[:, None] == SEGMENTS[None]

# Fields of the config, whether documents are packed, and the mask of each of the two layers.
CASES = {
    "causal": ({}, False, (CAUSAL, CAUSAL)),
    "full": ({"causal": False}, False, (EVERYWHERE, EVERYWHERE)),
    "window": ({"window": 3}, False, (CAUSAL & NEAR, CAUSAL & NEAR)),
    "window local and global": ({"window": 3, "window_pattern": "LG"}, False, (CAUSAL & NEAR, CAUSAL)),
    "full window": ({"window": 3, "causal": False}, False, (NEAR, NEAR)),
    "documents": ({}, True, (CAUSAL & SAME_DOCUMENT,) * 2),
    "documents full": ({"causal": False}, True, (SAME_DOCUMENT,) * 2),
    "documents window": ({"window": 2}, True, (CAUSAL & SAME_DOCUMENT & (DISTANCE < 2),) * 2),
    "learned positions": ({"positions": "learned", "max_positions": T}, False, (CAUSAL, CAUSAL)),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_depend_on_exactly_the_visible_tokens(case, build, tokens_BT):
    fields, packed, masks = CASES[case]
    # untied, so that an embedding acts through the input alone; no token stands twice, so that its row is its position
    model = build(tied_embeddings=False, **fields)
    tokens_1T = tokens_BT[:1]
    segments = jnp.asarray(SEGMENTS, jnp.int32)[None] if packed else None
    weights_TV = np.random.default_rng(3).standard_normal((T, model.description.config.vocab_size), np.float32)

    @jax.jit
    @jax.jacrev
    def influence(table):  # (T, V, D)
        params = {**model.params, "tokens": {"weight": table}}
        return (model.logits(params, tokens_1T, segments_BT=segments)[0] * weights_TV).sum(-1)

    seen = np.abs(influence(model.params["tokens"]["weight"])[:, tokens_1T[0]]).max(-1)
    expected = np.eye(T, dtype=bool)
    for mask in masks:  # a token reads what it sees, and what that has read
        expected = mask @ expected
    np.testing.assert_array_equal(seen[~expected], 0)
    assert seen[expected].min() > 1e-6
