"""Rotary positions: relative, norm-preserving, and scaled only where the scaling rules say so."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.config import ModelConfig, RopeScaling
from model.rotary import rope_angles, rope_frequencies, rotate

HEAD_DIM, THETA = 64, 10000.0
LENGTH = 8192
SCALINGS = {
    "none": RopeScaling(),
    "linear": RopeScaling("linear", factor=4.0),
    "llama3": RopeScaling("llama3", factor=8.0, original_length=LENGTH),
    "yarn": RopeScaling("yarn", factor=4.0, original_length=LENGTH),
}


def frequencies(scaling: RopeScaling, kind=jnp.float32):
    xp = jnp if kind is jnp.float32 else np
    return rope_frequencies(xp.arange(HEAD_DIM // 2, dtype=kind), HEAD_DIM, THETA, scaling)


def rotated(x_TH, positions_T, scaling: RopeScaling):
    config = ModelConfig(head_dim=HEAD_DIM, rope_theta=THETA, rope_scaling=scaling)
    return rotate(x_TH[None, :, None], rope_angles(config, positions_T[None]))[0, :, 0]


@pytest.mark.parametrize("kind", SCALINGS)
def test_scores_depend_on_the_distance_alone(kind):
    q_TH, k_TH = jax.random.normal(jax.random.key(0), (2, 9, HEAD_DIM))
    positions = jnp.array([0, 1, 2, 5, 8, 40, 41, 100, 200], jnp.int32)
    scores = [
        rotated(q_TH, positions + shift, SCALINGS[kind]) @ rotated(k_TH, positions + shift, SCALINGS[kind]).T
        for shift in (0, 7, 900)
    ]
    for moved in scores[1:]:  # float32 angles of position 1,100 are exact to 6e-5
        np.testing.assert_allclose(moved, scores[0], atol=2e-3)
    other = rotated(q_TH, positions + 1, SCALINGS[kind]) @ rotated(k_TH, positions, SCALINGS[kind]).T
    assert np.abs(other - scores[0]).max() > 0.1


@pytest.mark.parametrize("kind", SCALINGS)
def test_lengths_are_kept_up_to_yarns_factor(kind):
    x_TH = jax.random.normal(jax.random.key(1), (5, HEAD_DIM))
    y_TH = rotated(x_TH, jnp.arange(5) * 77, SCALINGS[kind])
    factor = 0.1 * math.log(4) + 1 if kind == "yarn" else 1.0
    np.testing.assert_allclose(jnp.linalg.norm(y_TH, axis=-1), factor * jnp.linalg.norm(x_TH, axis=-1), rtol=1e-5)


def test_position_zero_is_left_alone_and_position_one_turns_by_the_frequency():
    x_TH = jnp.zeros((2, HEAD_DIM)).at[:, 0].set(1.0)
    y_TH = rotated(x_TH, jnp.arange(2), RopeScaling())
    np.testing.assert_array_equal(y_TH[0], x_TH[0])
    np.testing.assert_allclose([y_TH[1, 0], y_TH[1, HEAD_DIM // 2]], [math.cos(1), math.sin(1)], rtol=1e-6)


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
def test_factor_one_changes_nothing(kind):
    plain, _ = frequencies(RopeScaling())
    scaled, factor = frequencies(RopeScaling(kind, factor=1.0))
    np.testing.assert_allclose(scaled, plain, rtol=1e-6)
    assert factor == 1.0


def test_llama3_keeps_short_waves_and_slows_long_ones():
    plain, _ = frequencies(RopeScaling())
    scaled, _ = frequencies(SCALINGS["llama3"])
    wavelength = 2 * math.pi / plain
    kept, slowed = wavelength < LENGTH / 4, wavelength > LENGTH / 1
    assert kept.any()
    assert slowed.any()
    assert (~kept & ~slowed).any()
    np.testing.assert_array_equal(scaled[kept], plain[kept])
    np.testing.assert_allclose(scaled[slowed], plain[slowed] / 8, rtol=1e-6)
    ratio = (scaled / plain)[~kept & ~slowed]
    assert ((ratio > 1 / 8) & (ratio < 1)).all()


def test_yarn_keeps_dims_that_turn_often_and_slows_those_that_hardly_turn():
    plain, _ = frequencies(RopeScaling())
    scaled, _ = frequencies(SCALINGS["yarn"])
    turns, ratio = LENGTH * plain / (2 * math.pi), scaled / plain
    # the ramp's ends are rounded outwards to whole dims, so these hold with a dim to spare
    np.testing.assert_allclose(ratio[turns > 32 * 1.4], 1, rtol=1e-6)
    np.testing.assert_allclose(ratio[turns < 1 / 1.4], 1 / 4, rtol=1e-6)
    assert (np.diff(ratio) <= 1e-6).all()


@pytest.mark.parametrize("kind", SCALINGS)
def test_angles_are_right_at_any_position(kind):
    """Against float64; float32 products alone are off by .005 at 131,072 tokens and by .04 at a million."""
    config = ModelConfig(head_dim=HEAD_DIM, rope_theta=THETA, rope_scaling=SCALINGS[kind])
    random = np.random.default_rng(0)
    starts = (0, 4090, 131_072, 2**20, 2**25, 2**31 - 40)
    positions_BT = np.array([[start + i for i in range(20)] for start in starts] + [random.integers(0, 2**31, 20)])
    exact, factor = frequencies(SCALINGS[kind], np.float64)
    angles = positions_BT[:, :, None, None].astype(np.float64) * exact
    cos, sin = jax.jit(lambda p: rope_angles(config, p))(positions_BT.astype(np.int32))
    limit = np.where(positions_BT < 2**26, 3e-4, 8e-4)[:, :, None, None]
    assert (np.abs(cos - factor * np.cos(angles)) < limit).all()
    assert (np.abs(sin - factor * np.sin(angles)) < limit).all()


@pytest.mark.parametrize("kind", SCALINGS)
def test_the_angles_of_short_sequences_are_plain_products(kind):
    config = ModelConfig(head_dim=HEAD_DIM, rope_theta=THETA, rope_scaling=SCALINGS[kind])

    @jax.jit
    def plain(positions_BT):
        frequency, factor = frequencies(SCALINGS[kind])
        angles = positions_BT.astype(jnp.float32)[:, :, None, None] * frequency
        return jnp.cos(angles) * factor, jnp.sin(angles) * factor

    positions_BT = jnp.arange(4096, dtype=jnp.int32)[None]
    for ours, theirs in zip(jax.jit(lambda p: rope_angles(config, p))(positions_BT), plain(positions_BT), strict=True):
        np.testing.assert_array_equal(ours, theirs)
