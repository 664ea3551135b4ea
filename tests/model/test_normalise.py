"""Norms: both forms of the gradient against float64, also where a vector's mean is far from zero."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import platforms
from model.normalise import normalise

SIZE = 768


def reference(kind: str, x, scale, bias):
    """In float64, by the definition."""
    y = x - x.mean(-1, keepdims=True) if kind == "layer" else x
    return y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-5) * scale + (0 if bias is None else bias)


def numerical(kind: str, x, scale, bias, dy, direction):
    """The derivative of sum(y * dy) along a direction of x, in float64."""
    step = 1e-6
    at = lambda sign: (reference(kind, x + sign * step * direction, scale, bias) * dy).sum()
    return (at(1) - at(-1)) / (2 * step)


@pytest.mark.parametrize("row", ["cpu", "gpu"])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("offset", [0.0, 30.0, "first"])
def test_norms_and_their_gradients(row, kind, biased, offset, monkeypatch):
    monkeypatch.setitem(platforms.CHOICES, "cpu", platforms.CHOICES[row])
    random = np.random.default_rng(0)
    x, dy = random.standard_normal((2, 4, 3, SIZE))
    if offset == "first":  # the value that moments are taken about is the one that lies far out
        x[..., 0] += 1000
    else:
        x += offset
    scale, bias, direction = random.standard_normal((3, SIZE))
    bias = bias if biased else None
    as32 = lambda array: None if array is None else jnp.asarray(array, jnp.float32)
    y, pull = jax.vjp(lambda *arrays: normalise(*arrays, kind, 1e-5), as32(x), as32(scale), as32(bias))
    np.testing.assert_allclose(y, reference(kind, x, scale, bias), rtol=2e-4, atol=2e-4)
    dx, dscale, dbias = pull(as32(dy))
    found = (np.asarray(dx, np.float64) * direction).sum()
    assert found == pytest.approx(numerical(kind, x, scale, bias, dy, direction), rel=2e-3, abs=2e-3)
    whitened = reference(kind, x, 1.0, None)
    error, size = dscale - (whitened * dy).sum((0, 1)), np.abs(whitened * dy).sum((0, 1))
    assert np.all(np.abs(error) <= 2e-4 * size), "of the sum's terms: these may cancel"
    assert (dbias is None) != biased
    if biased:
        np.testing.assert_allclose(dbias, dy.sum((0, 1)), rtol=1e-5, atol=1e-5)
