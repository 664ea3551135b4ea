"""How initial scales follow the sizes of the model."""

from collections.abc import Callable

import jax

from model.config import ModelConfig

TABLE_STD = 0.02


def _normal(std: float) -> Callable:
    return lambda key, shape, dtype: std * jax.random.normal(key, shape, dtype)


def zeros(key: jax.Array, shape, dtype) -> jax.Array:
    """The initialiser of biases."""
    return jax.numpy.zeros(shape, dtype)


def ones(key: jax.Array, shape, dtype) -> jax.Array:
    """The initialiser of norm scales."""
    return jax.numpy.ones(shape, dtype)


def table(config: ModelConfig, vocab_size: int | None = None) -> Callable:
    """Rows of token and position tables: N(0, 0.02); rows from `vocab_size` on are padding and stay zero."""

    def init(key, shape, dtype):
        rows = _normal(TABLE_STD)(key, shape, dtype)
        if vocab_size is None or vocab_size == shape[0]:
            return rows
        return rows * (jax.numpy.arange(shape[0]) < vocab_size).astype(dtype)[:, None]

    return init


def matrix(config: ModelConfig, fan_in: int, *, residual: bool = False) -> Callable:
    """N(0, 1/fan_in); the two matrices of a block that write to the residual stream are smaller by sqrt(2 L)."""
    scale = (2 * config.layers) ** -0.5 if residual else 1.0
    return _normal(scale * fan_in**-0.5)
