"""Matmuls against float64 NumPy, forward and backward, in both dtypes; and that no gradient is taken in a wider one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.matmul import project, score

CASES = {  # function, the same in numpy, and the shapes of its arguments
    "into heads": (project, lambda x, w: np.einsum("btd,dnh->btnh", x, w), (2, 6, 16), (16, 4, 8)),
    "out of heads": (project, lambda x, w: np.einsum("btnh,nhd->btd", x, w), (2, 6, 4, 8), (4, 8, 16)),
    "feed-forward": (project, lambda x, w: np.einsum("btd,df->btf", x, w), (2, 6, 16), (16, 24)),
    "scores of tokens": (score, lambda x, t: np.einsum("btd,vd->btv", x, t), (2, 6, 16), (40, 16)),
}


def gradients(reference, a, b, dy):
    """Of sum(reference(a, b) * dy), by linearity: the reference is linear in each argument."""
    da, db = np.zeros_like(a), np.zeros_like(b)
    for array, other in ((a, da), (b, db)):
        for index in np.ndindex(array.shape):
            one = np.zeros_like(array)
            one[index] = 1
            other[index] = np.sum((reference(one, b) if array is a else reference(a, one)) * dy)
    return da, db


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_products_and_gradients(case, dtype):
    function, reference, *shapes = case
    random = np.random.default_rng(0)
    a, b = (jnp.asarray(random.normal(size=shape), dtype) for shape in shapes)
    y, pull = jax.vjp(function, a, b)
    dy = jnp.asarray(random.normal(size=y.shape), y.dtype)
    a64, b64, dy64 = (np.asarray(x, np.float64) for x in (a, b, dy))
    # a sum in float32 and one rounding of the result; a gradient may round dy too
    ulp = 2.0**-23 if dtype == "float32" else 2.0**-8
    for ours, exact in zip((y, *pull(dy)), (reference(a64, b64), *gradients(reference, a64, b64, dy64)), strict=True):
        assert ours.dtype == (dtype if ours is not y else y.dtype)
        np.testing.assert_allclose(np.asarray(ours, np.float64), exact, rtol=0, atol=4 * ulp * np.abs(exact).max())


def test_sums_of_16_bit_products_are_float32():
    """4,096 ones and then small numbers that a 16-bit sum would lose, in each direction of the product."""
    x = jnp.concatenate([jnp.ones((1, 1, 4096)), jnp.full((1, 1, 4096), 2.0**-7)], axis=-1).astype(jnp.bfloat16)
    w = jnp.ones((8192, 4), jnp.bfloat16)
    exact = jnp.float32(4096 + 32).astype(jnp.bfloat16)
    assert (project(x, w) == exact).all()
    tokens = x.reshape(1, 8192, 1)
    _, pull = jax.vjp(project, tokens, jnp.ones((1, 4), jnp.bfloat16))
    assert (pull(jnp.ones((1, 8192, 4), jnp.bfloat16))[1] == exact).all()


@pytest.mark.parametrize("name", ["into heads", "scores of tokens"])
def test_16_bit_models_multiply_16_bit_numbers_in_the_backward_pass_too(name):
    function, _, *shapes = CASES[name]
    a, b = (jnp.ones(shape, jnp.bfloat16) for shape in shapes)
    pulled = jax.make_jaxpr(lambda a, b, dy: jax.vjp(function, a, b)[1](dy))(a, b, function(a, b))
    dots = [eqn for eqn in jax.tree.leaves(pulled.jaxpr.eqns) if eqn.primitive.name == "dot_general"]
    assert len(dots) == 3
    assert {v.aval.dtype for eqn in dots for v in eqn.invars} == {jnp.dtype(jnp.bfloat16)}
