"""RMS and layer norms as functions of arrays, computed in float32."""

from functools import partial

import jax
import jax.numpy as jnp

from model.platforms import choices
from parallel.manual import alike


def normalise(x: jax.Array, scale: jax.Array, bias: jax.Array | None, kind: str, eps: float) -> jax.Array:
    """x (..., size) over its last dim, times a float32 scale (size,), plus a bias if there is one, in x's dtype.

    `kind` is rms or layer. The backward pass computes again what it needs, from x and, where the platform's choices say
    so, from each vector's moments.
    """
    if choices().keep_moments:
        return _from_moments(kind, eps, *(alike(x, scale) if bias is None else alike(x, scale, bias)))
    return jax.checkpoint(partial(_normalised, kind, eps), prevent_cse=False)(x, scale, bias)


def _normalised(kind, eps, x, scale, bias):
    y = x.astype(jnp.float32)
    if kind == "layer":
        y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + eps)
    y = y * scale
    if bias is not None:
        y = y + bias
    return y.astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _from_moments(kind, eps, x, scale, bias=None):
    return _forward(kind, eps, x, scale, bias)[0]


def _forward(kind, eps, x, scale, bias=None):
    y = x.astype(jnp.float32)
    if kind == "layer":
        # Both moments in one pass over memory. About one of the vector's own values, since then the mean square is at
        # most size + 1 times the variance, and no more digits than that are lost in their difference.
        about = y[..., :1]
        mean, square = (y - about).mean(-1, keepdims=True), jnp.square(y - about).mean(-1, keepdims=True)
        mean, variance = about + mean, square - jnp.square(mean)
    else:
        mean, variance = None, jnp.square(y).mean(-1, keepdims=True)
    moments = mean, jax.lax.rsqrt(variance + eps)
    y = _whitened(x, moments) * scale
    return (y if bias is None else y + bias).astype(x.dtype), (x, moments, scale, bias)


def _whitened(x, moments):
    mean, over_deviation = moments
    y = x.astype(jnp.float32)
    return (y if mean is None else y - mean) * over_deviation


def _backward(kind, eps, residuals, dy):
    x, moments, scale, bias = residuals
    y, dy = _whitened(x, moments), dy.astype(jnp.float32)
    g = dy * scale
    dx = g - g.mean(-1, keepdims=True) if kind == "layer" else g
    dx = moments[1] * (dx - y * (g * y).mean(-1, keepdims=True))
    vectors = tuple(range(dy.ndim - 1))
    return dx.astype(x.dtype), (dy * y).sum(vectors), None if bias is None else dy.sum(vectors)


_from_moments.defvjp(_forward, _backward)
