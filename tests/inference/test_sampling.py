"""The candidate sets against numpy, and frequencies of draws within five standard errors."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inference.sampling import candidates, sample
from model.heads import NO_TOKEN

V = 24


def logits_BV(rows: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 2, (rows, V)).astype(np.float32)


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def expected_set(logits_V: np.ndarray, top_k: int, top_p: float) -> set[int]:
    order = np.argsort(-logits_V, kind="stable")[: top_k or None]
    probabilities = softmax(logits_V[order].astype(np.float64))
    reached = np.cumsum(probabilities) >= top_p
    count = int(np.argmax(reached)) + 1 if reached.any() and top_p < 1 else len(order)
    return set(order[:count].tolist())


@pytest.mark.parametrize("top_k", [0, 1, 5, V, 10 * V])
@pytest.mark.parametrize("top_p", [1e-6, 0.5, 0.9, 1.0])
def test_candidates_are_the_smallest_sets(top_k, top_p):
    x_BV = logits_BV()
    found = np.asarray(candidates(jnp.asarray(x_BV), top_k, top_p))
    for row, x_V in zip(found, x_BV, strict=True):
        assert set(np.flatnonzero(row).tolist()) == expected_set(x_V, top_k, top_p)


def test_of_equal_logits_the_lower_ids_are_candidates():
    found = np.asarray(candidates(jnp.zeros((1, 8)), 3, 1.0))
    assert np.flatnonzero(found).tolist() == [0, 1, 2]
    found = np.asarray(candidates(jnp.zeros((1, 8)), 0, 0.5))  # four tokens of 1/8 reach a half, exactly
    assert np.flatnonzero(found).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.5, 6, 1.0), (1.0, 0, 0.8), (0.9, 8, 0.7)]
)
def test_frequencies_follow_the_distribution(temperature, top_k, top_p):
    draws, x_V = 20_000, logits_BV(1)[0]
    keys = jax.random.split(jax.random.key(3), draws)
    draw = jax.jit(partial(sample, temperature=temperature, top_k=top_k, top_p=top_p))
    tokens = np.asarray(draw(jnp.broadcast_to(x_V, (draws, V)), keys))
    allowed = sorted(expected_set(x_V / np.float32(temperature), top_k, top_p))
    p = np.zeros(V)
    p[allowed] = softmax(x_V[allowed].astype(np.float64) / temperature)
    frequency = np.bincount(tokens, minlength=V) / draws
    assert frequency[p == 0].sum() == 0
    # a binomial frequency is off by more than 5 standard errors once in 1.7 million
    assert np.all(np.abs(frequency - p) <= 5 * np.sqrt(p * (1 - p) / draws) + 1 / draws)


def test_temperature_zero_is_greedy_and_small_ones_agree():
    x_BV, keys = jnp.asarray(logits_BV()), jax.random.split(jax.random.key(0), 6)
    best = np.argmax(np.asarray(x_BV), -1)
    for temperature in (0.0, 1e-30, 1e-3):
        tokens = sample(x_BV, keys, temperature=temperature)
        assert tokens.dtype == jnp.int32
        np.testing.assert_array_equal(tokens, best)


def test_padding_is_never_drawn_and_does_not_change_a_draw():
    x_BV, keys = logits_BV(2000), jax.random.split(jax.random.key(1), 2000)
    for options in ({"temperature": 1.0}, {"temperature": 1e30}, {"temperature": 1e30, "top_k": 60, "top_p": 0.999}):
        drawn = []
        for width in (V, 32, 64):
            padded = np.full((2000, width), NO_TOKEN, np.float32)
            padded[:, :V] = x_BV
            drawn.append(np.asarray(sample(jnp.asarray(padded), keys, **options)))
            assert drawn[-1].max() < V
            np.testing.assert_array_equal(drawn[-1], drawn[0])


def test_a_row_is_drawn_as_if_alone():
    x_BV, keys = jnp.asarray(logits_BV()), jax.random.split(jax.random.key(2), 6)
    options = {"temperature": 1.0, "top_k": 12, "top_p": 0.95}
    together = sample(x_BV, keys, **options)
    alone = [sample(x_BV[i : i + 1], keys[i : i + 1], **options)[0] for i in range(6)]
    np.testing.assert_array_equal(together, alone)
