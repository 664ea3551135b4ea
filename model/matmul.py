"""Matmuls that are summed in float32, with gradients in the dtype and layout that is fast."""

import math

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from model.platforms import choices
from parallel.manual import alike
from runtime.platform import platform

FEW_TOKENS = 64  # that are columns in any dtype: of more, transposing the result costs as much as it gains


def project(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """x (B, T, ...in) times matrix (...in, ...out): (B, T, ...out) in x's dtype."""
    return _project(*alike(x, matrix))


def project_by_output(x_BTI: jax.Array, matrix_OI: jax.Array, dtype=None) -> jax.Array:
    """x (B, T, inputs) times a matrix (outputs, inputs): (B, T, outputs) in `dtype`, by default x's.

    On CPUs the tokens are columns: a kernel rearranges what it multiplies with, and that had better be the few tokens
    than the matrix. In float32 they are not where they are many, nor where one is alone, which has a kernel of vectors.
    In 16 bits it has none: a second token, of zeros, is put beside it.
    """
    (B, T, inputs), dtype = x_BTI.shape, dtype or x_BTI.dtype
    tokens, wide = B * T, x_BTI.dtype == jnp.float32
    if platform() != "cpu" or (wide and not 1 < tokens <= FEW_TOKENS):
        return _contract(x_BTI, matrix_OI, ((2,), (1,)), dtype)
    if tokens == 1:
        return _contract(jnp.pad(x_BTI, ((0, 0), (0, 1), (0, 0))), matrix_OI, ((2,), (1,)), dtype)[:, :1]
    laid_out = jax.lax.optimization_barrier  # else XLA makes the matmul and the transposed arrays one again
    x_In = laid_out(x_BTI.reshape(-1, inputs).T)
    y_On = laid_out(_contract(matrix_OI, x_In, ((1,), (0,)), dtype))
    return y_On.T.reshape(B, T, -1)


@jax.custom_vjp
def _project(x, matrix):
    return _contract(x, matrix, _inner(x), x.dtype)


def _project_forward(x, matrix):
    # not `_project` again, in which remat=dots would not see the matmul that it shall keep
    return _contract(x, matrix, _inner(x), x.dtype), (x, matrix)


def _project_backward(residuals, dy):
    x, matrix = residuals
    outputs = (tuple(range(2, dy.ndim)), tuple(range(x.ndim - 2, matrix.ndim)))
    return _contract(dy, matrix, outputs, x.dtype), over_tokens(x, dy, matrix.dtype)


_project.defvjp(_project_forward, _project_backward)


def score(x_BTD: jax.Array, table_VD: jax.Array) -> jax.Array:
    """Each token's product with every row of a table: float32 (B, T, V), whose gradients are taken in x's dtype.

    JAX would multiply the float32 gradient of the result with 16-bit arrays, which is several times slower.
    """
    return _score(*alike(x_BTD, table_VD))


@jax.custom_vjp
def _score(x_BTD, table_VD):
    return _score_forward(x_BTD, table_VD)[0]


def _score_forward(x_BTD, table_VD):
    dtype = x_BTD.dtype if choices().narrow_logits else jnp.float32
    tokens = x_BTD.shape[0] * x_BTD.shape[1]  # of an exported program a symbol
    few = isinstance(tokens, int) and tokens <= FEW_TOKENS
    logits_BTV = project_by_output(x_BTD, table_VD, dtype) if few else _contract(x_BTD, table_VD, ((2,), (1,)), dtype)
    return logits_BTV.astype(jnp.float32), (x_BTD, table_VD)


def _score_backward(residuals, dy_BTV):
    x_BTD, table_VD = residuals
    dy_BTV = dy_BTV.astype(x_BTD.dtype)
    return _contract(dy_BTV, table_VD, ((2,), (0,)), x_BTD.dtype), over_tokens(dy_BTV, x_BTD, table_VD.dtype)


_score.defvjp(_score_forward, _score_backward)


@jax.custom_vjp
def add_bias(y: jax.Array, bias: jax.Array) -> jax.Array:
    """y (B, T, ...out) plus a float32 bias (...out), in y's dtype; the bias's gradient is summed in float32."""
    flat = y.reshape(*y.shape[:2], -1)  # a matmul's kernel adds vectors alone
    return (flat + bias.reshape(-1).astype(y.dtype)).reshape(y.shape)


def _add_bias_backward(_, dy):
    return dy, dy.astype(jnp.float32).sum((0, 1))


add_bias.defvjp(lambda y, bias: (add_bias(y, bias), None), _add_bias_backward)


def _inner(x: jax.Array) -> tuple[tuple[int, ...], tuple[int, ...]]:
    inputs = x.ndim - 2
    return tuple(range(2, x.ndim)), tuple(range(inputs))


def _contract(a: jax.Array, b: jax.Array, axes, dtype) -> jax.Array:
    """tensordot(a, b, axes), in `dtype`."""
    # the fast 16-bit kernels of CPUs write float32: asked for 16 bits, XLA widens the arguments instead
    summed = jnp.float32 if platform() == "cpu" else dtype
    return jax.lax.dot_general(a, b, (axes, ((), ())), preferred_element_type=summed).astype(dtype)


def over_tokens(x: jax.Array, dy: jax.Array, dtype) -> jax.Array:
    """x^T dy (...in, ...out), summed over the first two dims of both: the gradient of a matrix.

    JAX would compute (dy^T x)^T always. One of the two is transposed in memory, which CPUs are slow at.
    """
    tokens, inputs = ((0, 1), (0, 1)), x.ndim - 2
    if platform() == "cpu" and x.dtype == jnp.float32:  # then it shall be the smaller one
        if math.prod(x.shape[2:]) <= math.prod(dy.shape[2:]):
            return _contract(x, dy, tokens, dtype)
        gradient, outputs = _contract(dy, x, tokens, dtype), dy.ndim - 2
        return jnp.transpose(gradient, (*range(outputs, outputs + inputs), *range(outputs)))
    if not lays_out():
        return _contract(x, dy, tokens, dtype)
    # half as fast in 16 bits where x^T does not lie in memory as its shape says
    x = in_memory(jnp.transpose(x, (*range(2, x.ndim), 0, 1)))
    return _contract(x, dy, ((inputs, inputs + 1), (0, 1)), dtype)


def lays_out() -> bool:
    """Whether `in_memory` does anything: on CPUs, unless the compiler splits arrays over a mesh here.

    XLA's partitioner gathers what a layout is asked for.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return platform() == "cpu" and (mesh.empty or all(mesh.shape[axis] == 1 for axis in mesh.auto_axes))


def in_memory(x: jax.Array) -> jax.Array:
    """The same array, which lies in memory as its shape says: for arguments of matmuls that are transposed."""
    return with_layout_constraint(x, Layout(tuple(range(x.ndim)))) if lays_out() else x
