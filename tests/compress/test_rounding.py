"""GPTQ and AWQ make the outputs' error smaller than rounding does, GPTQ as its definition says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compress.fitting import fitted_grid
from compress.forms import Int4, Int8
from compress.grids import int4_grid, output_error
from compress.rounding import DAMPING, awq, chosen, fitted_gptq, gptq, shrunk_gram

N, M, GROUP = 48, 10, 16


def drawn(seed: int, tokens: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """Weights, and inputs of very different sizes that go together."""
    draw = np.random.default_rng(seed)
    mixed = draw.standard_normal((N, N)) * np.exp(draw.standard_normal(N))
    x_tn = draw.standard_normal((tokens, N)) @ mixed
    return draw.standard_normal((N, M)).astype(np.float32), x_tn.astype(np.float32)


def error(w_nm, there_nm, x_tn) -> np.ndarray:
    """By its definition, of each output."""
    return np.square(x_tn.astype(np.float64) @ (np.asarray(there_nm, np.float64) - w_nm)).sum(0)


run_gptq = jax.jit(lambda w, gram: (grid := int4_grid(w, GROUP)).decode(gptq(w, gram, grid)))


@pytest.mark.parametrize("tokens", [256, 20])
@pytest.mark.parametrize("seed", range(3))
def test_gptq_is_never_worse_than_rounding(seed, tokens):
    """For no output; with fewer tokens than inputs as well. In all it is much better."""
    w_nm, x_tn = drawn(seed, tokens)
    grid = int4_grid(jnp.asarray(w_nm), GROUP)
    plain = error(w_nm, grid.decode(grid.encode(w_nm)), x_tn)
    ours = error(w_nm, run_gptq(w_nm, x_tn.T @ x_tn), x_tn)
    assert np.all(ours <= plain * 1.001)
    assert ours.sum() < 0.6 * plain.sum()


def test_gptq_is_that_of_its_definition():
    """One weight after the other; the rest is moved as the inverse of what is left of the damped gram says."""
    w_nm, x_tn = drawn(5)
    gram = (x_tn.T @ x_tn).astype(np.float64)
    grid = int4_grid(jnp.asarray(w_nm), GROUP)
    step_nm, zero_nm = (np.asarray(x, np.float64) for x in grid.rows(N))
    damped = gram + DAMPING * np.diagonal(gram).mean() * np.eye(N)
    left, rest, codes = list(np.argsort(-np.diagonal(gram))), w_nm.astype(np.float64).copy(), np.zeros((N, M))
    while left:
        inverse = np.linalg.inv(damped[np.ix_(left, left)])
        i = left[0]
        codes[i] = np.clip(np.round(rest[i] / step_nm[i] + zero_nm[i]), 0, 15)
        change = rest[i] - (codes[i] - zero_nm[i]) * step_nm[i]
        rest[left] -= inverse[:, :1] / inverse[0, 0] * change
        left = left[1:]
    theirs = error(w_nm, (codes - zero_nm) * step_nm, x_tn)
    ours = error(w_nm, run_gptq(w_nm, x_tn.T @ x_tn), x_tn)
    np.testing.assert_allclose(ours.sum(), theirs.sum(), rtol=0.02)
    same = np.asarray(jax.jit(lambda w, g: gptq(w, g, grid))(w_nm, gram.astype(np.float32))) == codes
    assert same.mean() > 0.97  # a rounding that ties in float32 moves those behind it


@pytest.mark.parametrize("tokens", [256, 20])
def test_a_fitted_grid_is_never_worse(tokens):
    """For no output than rounding, in all better than GPTQ on the grid of smallest and largest weights."""
    w_nm, x_tn = drawn(7, tokens)
    plain = int4_grid(jnp.asarray(w_nm), GROUP)
    theirs = error(w_nm, plain.decode(plain.encode(w_nm)), x_tn)
    grid, codes = jax.jit(lambda w, gram: fitted_gptq(w, gram, GROUP))(w_nm, x_tn.T @ x_tn)
    ours = error(w_nm, grid.decode(codes), x_tn)
    assert np.all(ours <= theirs * 1.001)
    assert ours.sum() < 0.9 * error(w_nm, run_gptq(w_nm, x_tn.T @ x_tn), x_tn).sum()


def test_a_fitted_grid_makes_the_nearest_codes_nearer():
    """Counted by the inputs' squares; the grid of whole ranges is among those that were tried."""
    w_nm, x_tn = drawn(8)
    size_n1 = np.square(x_tn).sum(0)[:, None]
    sums = []
    for grid in (int4_grid(jnp.asarray(w_nm), GROUP), fitted_grid(jnp.asarray(w_nm), x_tn.T @ x_tn, GROUP)):
        sums.append((size_n1 * np.square(grid.decode(grid.encode(w_nm)) - w_nm)).reshape(-1, GROUP, M).sum(1))
    assert np.all(sums[1] <= sums[0] * 1.001)
    assert sums[1].sum() < 0.9 * sums[0].sum()


def test_a_gram_of_few_tokens_is_shrunk():
    """Codes chosen with it are better for other tokens than those that were fitted to what the few have in common."""
    draw = np.random.default_rng(13)
    mixed, w_nm = draw.standard_normal((N, N)), draw.standard_normal((N, M)).astype(np.float32)
    few, many = (draw.standard_normal((tokens, N)).astype(np.float32) @ mixed for tokens in (N, 4000))
    gram = jnp.asarray(few.T @ few, jnp.float32)
    sums = [error(w_nm, run_gptq(w_nm, each), many).sum() for each in (gram, shrunk_gram(gram, len(few)))]
    assert sums[1] < 0.95 * sums[0]
    np.testing.assert_allclose(jnp.diagonal(shrunk_gram(gram, 7)), jnp.diagonal(gram), rtol=1e-6)
    np.testing.assert_allclose(shrunk_gram(gram, 1e9), gram, rtol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_awq_is_better_than_rounding(seed):
    w_nm, x_tn = drawn(seed)
    grid, codes, factor_n = jax.jit(lambda w, gram: awq(w, gram, GROUP))(w_nm, x_tn.T @ x_tn)
    plain = int4_grid(jnp.asarray(w_nm), GROUP)
    theirs = error(w_nm, plain.decode(plain.encode(w_nm)), x_tn).sum()
    ours = error(w_nm, grid.decode(codes) * factor_n[:, None], x_tn).sum()
    assert ours < 0.9 * theirs
    np.testing.assert_array_equal(factor_n, factor_n.astype(jnp.bfloat16).astype(jnp.float32))


def test_inputs_that_never_come_do_no_harm():
    w_nm, x_tn = drawn(9)
    x_tn[:, ::3] = 0
    for method in ("gptq", "awq"):
        grid, codes, factor_n = chosen(Int4(GROUP), method, jnp.asarray(w_nm), jnp.asarray(x_tn.T @ x_tn), GROUP)
        assert np.all(np.isfinite(grid.decode(codes)))
    grid, codes, _ = chosen(Int4(GROUP), "gptq", jnp.asarray(w_nm), jnp.zeros((N, N)), GROUP)
    np.testing.assert_array_equal(codes, grid.encode(w_nm))  # no tokens: the nearest codes


def test_the_error_is_that_of_the_outputs():
    w_nm, x_tn = drawn(3)
    there = w_nm + 0.01
    np.testing.assert_allclose(output_error(there - w_nm, x_tn.T @ x_tn), error(w_nm, there, x_tn), rtol=1e-3)
    grid, codes, factor = chosen(Int8(), "round", jnp.asarray(w_nm), None, 0)
    assert factor is None
    assert np.all(error(w_nm, grid.decode(codes), x_tn) < 1e-3 * np.square(x_tn @ w_nm).sum(0))
