"""Documents packed into one sequence give the logits that they give alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

FIRST = 5  # tokens of the first document; the second has the other 7
OPTIONS = {
    "rotary": {},
    "rotary, window": {"window": 3, "window_pattern": "LG"},
    "full mask": {"causal": False},
    "grouped, soft-cap, norms around": {"norm_position": "both", "attention_softcap": 2.0, "qk_norm": True},
}


def packed_and_alone(model, tokens_BT, positions_BT=None):
    segments_BT = (jnp.arange(12) >= FIRST).astype(jnp.int32)[None]
    logits = jax.jit(model.logits)
    packed = logits(model.params, tokens_BT, segments_BT=segments_BT, positions_BT=positions_BT)
    alone = [logits(model.params, part) for part in (tokens_BT[:, :FIRST], tokens_BT[:, FIRST:])]
    return packed, jnp.concatenate(alone, axis=1)


@pytest.mark.parametrize("case", OPTIONS)
def test_packed_documents_equal_separate_ones_though_positions_run_on(case, build, tokens_BT):
    """Rotary positions are relative: the second document starts at position 5 and does not notice."""
    packed, alone = packed_and_alone(build(**OPTIONS[case]), tokens_BT)
    np.testing.assert_allclose(packed, alone, atol=1e-5 * np.abs(alone).max())


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_packed_documents_equal_separate_ones_with_positions_that_start_again(positions, build, tokens_BT):
    restarted = jnp.concatenate([jnp.arange(FIRST), jnp.arange(12 - FIRST)]).astype(jnp.int32)[None]
    packed, alone = packed_and_alone(build(positions=positions, max_positions=12), tokens_BT, restarted)
    np.testing.assert_allclose(packed, alone, atol=1e-5 * np.abs(alone).max())


def test_without_segments_documents_are_not_kept_apart(build, tokens_BT):
    model = build()
    logits = jax.jit(model.logits)
    whole, alone = logits(model.params, tokens_BT), logits(model.params, tokens_BT[:, FIRST:])
    assert np.abs(whole[:, FIRST:] - alone).max() > 1e-2
