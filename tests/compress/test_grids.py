"""Codes stand for what is near to the weights, however these are, and survive being packed."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from compress.grids import fp8_floats, int4_grid, int8_grid, pack, unpack

GROUP = 8
SIZES = st.floats(-8, 8, width=32)
MATRICES = arrays(np.float32, (4 * GROUP, 3), elements=SIZES) | st.builds(
    lambda w, power: (w * 2.0**power).astype(np.float32),
    arrays(np.float32, (4 * GROUP, 3), elements=SIZES),
    st.integers(-40, 20),
)
round_int8 = jax.jit(lambda w: ((grid := int8_grid(w)).decode(grid.encode(w)), grid.encode(w), grid.rows(len(w))[0]))
round_fp8 = jax.jit(lambda w: ((grid := fp8_floats(w)).decode(grid.encode(w)), grid.step_Gm))
round_int4 = jax.jit(
    lambda w: ((grid := int4_grid(w, GROUP)).decode(grid.encode(w)), grid.encode(w), grid.rows(len(w))[0])
)


@settings(max_examples=60, deadline=None)
@given(MATRICES)
def test_int8_is_within_half_a_step(w_nm):
    there, codes, step = map(np.asarray, round_int8(w_nm))
    assert np.abs(codes).max() <= 127
    assert np.all(np.abs(there - w_nm) <= 0.5001 * step)
    largest = np.abs(w_nm).max(0)
    assert np.all((step[0] <= largest / 127 * 1.01) | (largest < 1e-30))


@settings(max_examples=60, deadline=None)
@given(MATRICES)
def test_fp8_keeps_four_significant_bits(w_nm):
    """Of what is not far below an output's largest weight; that itself stays within the numbers that there are."""
    there, step = np.asarray(round_fp8(w_nm)[0]), np.asarray(round_fp8(w_nm)[1], np.float32)
    assert np.all(np.abs(there - w_nm) <= np.maximum(np.abs(w_nm) / 16, step * 2.0**-10) * 1.001)


@settings(max_examples=60, deadline=None)
@given(MATRICES)
def test_int4_is_within_a_step_of_its_group(w_nm):
    """Half a step, and what rounding a zero to a sixteenth and a step to eight bits adds for the largest."""
    there, codes, step = map(np.asarray, round_int4(w_nm))
    assert codes.min() >= 0
    assert codes.max() <= 15
    assert np.all(np.abs(there - w_nm) <= 0.6 * step)
    groups = w_nm.reshape(-1, GROUP, 3)
    extent = np.repeat(np.maximum(groups.max(1), 0) - np.minimum(groups.min(1), 0), GROUP, axis=0)
    assert np.all((step <= extent / 15 * 1.01) | (extent < 1e-30))


def test_zeros_stay_zeros():
    w_nm = np.random.default_rng(0).standard_normal((4 * GROUP, 3)).astype(np.float32)
    w_nm[:, 1] = 0
    assert not np.any(np.asarray(round_int8(w_nm)[0])[:, 1])
    assert not np.any(np.asarray(round_int4(w_nm)[0])[:, 1])


def test_what_lies_on_the_grid_stays_there():
    draw = np.random.default_rng(1)
    codes = draw.integers(0, 16, (4 * GROUP, 3)).reshape(4, GROUP, 3)
    codes[:, 0], codes[:, 1] = 0, 15
    w_nm = ((codes - 7) * 0.25).reshape(-1, 3).astype(np.float32)
    np.testing.assert_array_equal(round_int4(w_nm)[0], w_nm)


@given(st.integers(0, 2), arrays(np.uint8, (4, 6, 2), elements=st.integers(0, 15)))
@settings(max_examples=30, deadline=None)
def test_packing_is_undone(axis, codes):
    packed = pack(jnp.asarray(codes), axis)
    assert packed.size == codes.size // 2
    np.testing.assert_array_equal(unpack(packed, axis), codes)
    np.testing.assert_array_equal(unpack(packed, axis - 3), codes)
