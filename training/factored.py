"""Adafactor's second moments: means over rows and over columns in place of one number an entry (arXiv 1804.04235)."""

import jax
import jax.numpy as jnp
import optax

from model.specs import ParameterSpec, Specs

SMALLEST = 128  # a dim shorter than this is not worth a mean over it
DECAY = 0.8  # the decay of step t (1 first) is 1 - t^-DECAY
EPSILON = 1e-30  # added to squared gradients


def factored_dims(spec: ParameterSpec) -> tuple[int, int] | None:
    """The two longest dims of one matrix, the longer last; None where they are too short to be worth it.

    Padding of a vocabulary does not count, since it depends on the mesh, nor do dims that number matrices: the means
    then have the same dims on every mesh.
    """
    sizes = [*spec.shape] if spec.rows is None else [spec.rows, *spec.shape[1:]]
    dims = sorted((dim for dim in range(len(sizes)) if dim not in spec.batch), key=lambda dim: sizes[dim])
    if len(dims) < 2 or sizes[dims[-2]] < SMALLEST:
        return None
    return dims[-2], dims[-1]


def _squared(gradient: jax.Array, spec: ParameterSpec) -> jax.Array:
    """Squares of a gradient, a little above zero; exactly zero in the padding."""
    squares = jnp.square(gradient) + EPSILON
    if spec.rows is None or spec.rows == gradient.shape[0]:
        return squares
    rows = jnp.arange(gradient.shape[0]).reshape(-1, *[1] * (gradient.ndim - 1))
    return jnp.where(rows < spec.rows, squares, 0)


def _mean(x: jax.Array, dim: int, spec: ParameterSpec, of: int, *, keepdims: bool = False) -> jax.Array:
    """The mean over `dim` of x, which is dim `of` of the parameter: padding, which is zero, does not count."""
    if of or spec.rows is None or spec.rows == spec.shape[0]:
        return jnp.mean(x, axis=dim, keepdims=keepdims)
    return jnp.sum(x, axis=dim, keepdims=keepdims) / spec.rows


def _root(x: jax.Array) -> jax.Array:
    """1 / sqrt(x), and 0 for the zeros of padding."""
    return jnp.where(x > 0, x**-0.5, 0)


def _parts(tree, count: int) -> list:
    """A tree of tuples as a list of trees."""
    is_tuple = lambda x: isinstance(x, tuple)
    return [jax.tree.map(lambda parts, i=i: parts[i], tree, is_leaf=is_tuple) for i in range(count)]


def scale_by_factored_rms(specs: Specs) -> optax.GradientTransformation:
    """As optax's, with the dims decided by the parameters' specifications, and means in which padding does not count.

    The state is optax.FactoredState, too: v_row and v_col of what is factored, v of the rest, and a zero for the other.
    """

    def init(params) -> optax.FactoredState:
        def one(p: jax.Array, spec: ParameterSpec):
            none = jnp.zeros((1,), p.dtype)
            if (dims := factored_dims(spec)) is None:
                return none, none, jnp.zeros_like(p)
            shorter, longer = dims
            without = lambda dim: jnp.zeros((*p.shape[:dim], *p.shape[dim + 1 :]), p.dtype)
            return without(longer), without(shorter), none

        return optax.FactoredState(jnp.zeros((), jnp.int32), *_parts(jax.tree.map(one, params, specs), 3))

    def update(updates, state: optax.FactoredState, params=None):
        decay = 1 - (state.count + 1).astype(jnp.float32) ** -DECAY

        def one(gradient, row, col, whole, spec: ParameterSpec):
            squares = _squared(gradient, spec)
            follow = lambda old, new: decay * old + (1 - decay) * new
            if (dims := factored_dims(spec)) is None:
                whole = follow(whole, squares)
                return gradient * _root(whole), row, col, whole
            shorter, longer = dims
            row = follow(row, _mean(squares, longer, spec, longer))
            col = follow(col, _mean(squares, shorter, spec, shorter))
            at = shorter - 1 if shorter > longer else shorter
            share = row / _mean(row, at, spec, shorter, keepdims=True)
            factors = jnp.expand_dims(_root(share), longer), jnp.expand_dims(_root(col), shorter)
            return gradient * factors[0] * factors[1], row, col, whole

        done = jax.tree.map(one, updates, state.v_row, state.v_col, state.v, specs)
        updates, *moments = _parts(done, 4)
        return updates, optax.FactoredState(state.count + 1, *moments)

    return optax.GradientTransformation(init, update)
