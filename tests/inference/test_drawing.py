"""Draws of many requests at once: against numpy, alone and beside others, on one device and meshes."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inference.drawing import EVERY_TOKEN, adjusted, asks_of, draw, empty_slots, narrowed, note, occupy, slot_values
from inference.requests import Sampling
from inference.sampling import sample
from model.heads import NO_TOKEN
from parallel.mesh import MeshConfig, make_mesh, resolve
from parallel.sharding import shard

V, R = 700, 5  # not a multiple of a block
GREEDY = Sampling(temperature=0)
# compiled once for all tests, as an engine does
OCCUPY, DRAW, NOTE = jax.jit(occupy, donate_argnums=0), jax.jit(draw), jax.jit(note)
ADJUSTED, NARROWED = jax.jit(adjusted), jax.jit(narrowed)
# what requests ask for, one at a time and together
CHOICES = [
    *({"top_k": 7}, {"top_k": 10**6}, {"top_p": 0.5}, {"top_p": 1e-6}, {"top_p": 0.999}, {"min_p": 0.05}, {"min_p": 1}),
    {"top_k": 30, "top_p": 0.8, "min_p": 0.02, "temperature": 1.7},
    {"top_k": 3, "top_p": 0.95, "temperature": 0.3},
    {"repetition_penalty": 1.3, "top_p": 0.9, "logit_bias": {4: 5.0, 9: -100.0, 77: 4.0, 699: 3.0}},
    {"repetition_penalty": 0.7, "min_p": 0.001, "temperature": 0.3},
]


def logits(rows: int = R, seed: int = 0, width: int = V) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, (rows, width)).astype(np.float32)


def slots_of(*samplings: Sampling, vocabulary: int = V, **how):
    slots = empty_slots(R, vocabulary)
    for slot, sampling in enumerate(samplings):
        slots = OCCUPY(slots, slot, slot_values(sampling, vocabulary, **how))
    return slots


def positions(rows: int, first: int = 7) -> jax.Array:
    return jnp.arange(first, first + rows)


def test_greedy_takes_the_first_of_the_largest_bitwise():
    x_BV = logits()
    x_BV[1, [40, 600]] = x_BV[1].max() + 1  # a tie
    x_BV[2] = np.round(x_BV[2])
    drawn = DRAW(slots_of(*[GREEDY] * R), jnp.arange(R), x_BV, positions(R))
    expected = sample(jnp.asarray(x_BV), None, temperature=0)
    assert drawn.tokens_B.tolist() == expected.tolist() == x_BV.argmax(-1).tolist()
    assert not drawn.logprobs_B.any()


def test_padding_is_never_drawn_and_does_not_change_draws():
    rng, samplings = (
        np.random.default_rng(1),
        [Sampling(seed=i, temperature=t) for i, t in enumerate((1, 5, 0, 2, 1e-6))],
    )
    x_BV = rng.normal(0, 1, (R, 300)).astype(np.float32)
    padded_BV = np.pad(x_BV, ((0, 0), (0, V - 300)), constant_values=NO_TOKEN)
    narrow_slots, wide_slots = slots_of(*samplings, vocabulary=300), slots_of(*samplings)
    for first in range(20):
        narrow = DRAW(narrow_slots, jnp.arange(R), x_BV, positions(R, first))
        wide = DRAW(wide_slots, jnp.arange(R), padded_BV, positions(R, first))
        assert narrow.tokens_B.tolist() == wide.tokens_B.tolist()
    bias = Sampling(temperature=100, seed=1, logit_bias={5: -100}, presence_penalty=-2)
    for first in range(20):
        assert int(DRAW(slots_of(bias), jnp.arange(1), padded_BV[:1], positions(1, first)).tokens_B[0]) < 300


def test_a_row_depends_on_its_own_alone():
    """Whatever slot it has and whatever else is in the batch."""
    mine = Sampling(temperature=0.8, top_p=0.9, min_p=0.01, seed=11, presence_penalty=0.5, logit_bias={3: 2.0})
    others = (
        Sampling(temperature=1.3, top_k=40, seed=11),
        Sampling(temperature=0.5, top_p=0.3, repetition_penalty=1.4, seed=2),
        Sampling(temperature=0, logprobs=5, frequency_penalty=1),
        Sampling(seed=5, logit_bias={int(t): 50 for t in range(100)}),
    )
    x_BV = logits(1, seed=3)
    for first in range(15):
        alone = DRAW(slots_of(mine, prompt=[1, 2], new=[2]), jnp.zeros(1, int), x_BV, positions(1, first))
        slot = first % R
        order = [*others[:slot], mine, *others[slot:]]
        slots = slots_of(*order, prompt=[1, 2], new=[2])
        batch_BV, rows_B = logits(4, seed=first), np.asarray([0, 1, 2, 3])
        batch_BV[2], rows_B[2] = x_BV, slot
        beside = DRAW(slots, rows_B, batch_BV, jnp.asarray([1, 90, first, 4]))
        assert beside.tokens_B[2] == alone.tokens_B[0]


def test_positions_seeds_and_choices_draw_apart():
    x_BV = np.zeros((1, V), np.float32)
    one = lambda seed, choice, position: int(
        DRAW(slots_of(Sampling(seed=seed), choice=choice), jnp.zeros(1, int), x_BV, jnp.asarray([position])).tokens_B[0]
    )
    drawn = [one(s, c, p) for s in (0, 1, -(2**70)) for c in (0, 1) for p in (0, 1, 5)]
    assert len(set(drawn)) > 14
    assert drawn == [one(s, c, p) for s in (0, 1, -(2**70)) for c in (0, 1) for p in (0, 1, 5)]


def test_presence_and_frequency_count_the_new_text_as_it_grows():
    sampling = Sampling(temperature=0, presence_penalty=1.5, frequency_penalty=0.25)
    slots = slots_of(GREEDY, sampling, prompt=[8, 8, 9], new=[5])
    for token in (5, 6, 5):
        slots = NOTE(slots, jnp.asarray([1, 0, 1]), jnp.asarray([token, 5, 9]), jnp.asarray([True, True, False]))
    x_BV, expected = logits(1), logits(1)
    expected[0, 5] -= 1.5 + 3 * 0.25
    expected[0, 6] -= 1.5 + 0.25
    np.testing.assert_allclose(ADJUSTED(slots, jnp.ones(1, int), x_BV, None), expected, rtol=1e-6)
    again = slots_of(GREEDY, sampling, prompt=[8, 8, 9], new=[5, 5, 6, 5])  # as after an interruption
    assert np.array_equal(slots.seen_RV[1], again.seen_RV[1])


@pytest.mark.parametrize(
    "asked", [{"temperature": 0.7}, {"top_k": 40, "top_p": 0.8}, {"temperature": 2.0, "min_p": 0.1}]
)
def test_frequencies_follow_the_distribution(asked):
    """Within five standard errors, over positions."""
    draws, x_V = 4_000, logits(1, 5)[0] * 0.7
    slots = slots_of(Sampling(seed=4, **asked))
    x_BV, rows = np.broadcast_to(x_V, (draws, V)), jnp.zeros(draws, int)
    tokens = DRAW(slots, rows, x_BV, jnp.arange(draws)).tokens_B
    p = np.asarray(jax.nn.softmax(NARROWED(x_BV[:1], asks_of(slots, rows[:1]))), np.float64)[0]
    frequency = np.bincount(tokens, minlength=V) / draws
    assert not frequency[p == 0].any()
    assert np.all(np.abs(frequency - p) <= 5 * np.sqrt(p * (1 - p) / draws) + 1 / draws)


def test_log_probabilities_are_the_models_own():
    x_BV = logits()
    asked = Sampling(temperature=0.3, top_k=2, logprobs=3, seed=1, presence_penalty=2, logit_bias={8: 9.0})
    drawn = DRAW(slots_of(asked, new=[4, 5, 6]), jnp.asarray([0, 3, R]), x_BV[:3], positions(3))
    log_BV = np.asarray(jax.nn.log_softmax(x_BV[:3], -1))
    np.testing.assert_allclose(drawn.logprobs_B, log_BV[range(3), drawn.tokens_B], rtol=1e-5)
    np.testing.assert_allclose(drawn.top_logprobs_BK, -np.sort(-log_BV, -1)[:, :20], rtol=1e-5)
    assert np.array_equal(drawn.top_ids_BK, np.argsort(-log_BV, -1)[:, :20])


def test_a_mask_limits_its_row_alone():
    allowed_BW = np.full((2, -(-V // 32)), EVERY_TOKEN, np.uint32)
    allowed_BW[0] = 0
    for token in (31, 32, 699):
        allowed_BW[0, token // 32] |= np.uint32(1 << token % 32)
    slots = slots_of(Sampling(temperature=50, seed=3), GREEDY)
    x_BV, seen = logits(2), set()
    for first in range(30):
        tokens = DRAW(slots, jnp.arange(2), x_BV, positions(2, first), allowed_BW).tokens_B
        seen.add(int(tokens[0]))
        assert tokens[1] == x_BV[1].argmax()
    assert seen == {31, 32, 699}
    greedy = DRAW(slots, jnp.asarray([1, 0]), x_BV, positions(2), allowed_BW).tokens_B[0]
    assert greedy == max((31, 32, 699), key=lambda token: x_BV[0, token])


def test_empty_rows_are_greedy_and_noted_nowhere():
    slots = slots_of(*[Sampling(seed=i) for i in range(R)])
    x_BV = logits(1)
    assert DRAW(slots, jnp.asarray([R]), x_BV, positions(1)).tokens_B[0] == x_BV[0].argmax()
    noted = NOTE(slots, jnp.asarray([R, 2]), jnp.asarray([1, 1]), jnp.asarray([True, False]))
    assert not noted.seen_RV.any()


@pytest.mark.parametrize("axes", [{"fsdp": 4, "tensor": 2}, {"fsdp": 2, "tensor": 4}])
def test_a_mesh_draws_the_same(axes):
    samplings = [Sampling(**asked, seed=i, logprobs=2) for i, asked in enumerate((CHOICES[7], CHOICES[9], CHOICES[2]))]
    width = 512
    samplings = [replace(s, logit_bias={t: b for t, b in s.logit_bias.items() if t < width}) for s in samplings]
    x_BV, rows_B = logits(4, width=width), jnp.asarray([0, 1, 2, 3])

    def run():
        slots, tokens = empty_slots(R, width), []
        occupied = jax.jit(occupy, donate_argnums=0)
        for slot, sampling in enumerate(samplings):
            slots = occupied(slots, slot, slot_values(sampling, width, prompt=[1, 2]))

        @partial(jax.jit, donate_argnums=0)
        def step(slots, positions_B):
            drawn = draw(slots, rows_B, shard(x_BV, "batch", "vocab"), positions_B)
            return note(slots, rows_B, drawn.tokens_B, rows_B < 3), drawn

        for first in range(12):
            slots, drawn = step(slots, positions(4, first))
            tokens.append(drawn.tokens_B.tolist())
        return tokens, drawn, step._cache_size()

    alone, expected, _ = run()
    mesh = make_mesh(resolve(MeshConfig(**axes), 8))
    with jax.set_mesh(mesh):
        tokens, drawn, programs = run()
    assert tokens == alone
    assert programs == 1
    np.testing.assert_allclose(drawn.top_logprobs_BK, expected.top_logprobs_BK, rtol=1e-5)
