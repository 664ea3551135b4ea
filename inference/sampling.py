"""From logits to the next token: greedy, temperature, top-k, nucleus."""

import jax
import jax.numpy as jnp

from model.heads import NO_TOKEN


def sample(
    logits_BV: jax.Array, keys_B: jax.Array, *, temperature: float, top_k: int = 0, top_p: float = 1.0
) -> jax.Array:
    """Draws a token for each row of float32 logits; int32 (B,).

    `keys_B` holds one random key a row, so a row's token does not depend on the other rows. `temperature` 0 takes the
    likeliest token. `top_k` (0: off), then `top_p` (1: off) restrict the choice, see `candidates`. Padding of the
    vocabulary is never drawn, and how wide it is does not change what is drawn.
    """
    if temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    # from the row's maximum, so that a small temperature overflows to -inf only
    scaled_BV = (logits_BV - logits_BV.max(-1, keepdims=True)) / temperature
    scaled_BV = jnp.where(logits_BV > NO_TOKEN, scaled_BV, -jnp.inf)
    if top_k or top_p < 1:
        scaled_BV = jnp.where(candidates(scaled_BV, top_k, top_p), scaled_BV, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys_B, scaled_BV).astype(jnp.int32)


def candidates(logits_BV: jax.Array, top_k: int, top_p: float) -> jax.Array:
    """Which tokens may be drawn: bool (B, V), at least one a row; of equal logits the lower id comes first.

    `top_k`: the k likeliest (0: all). `top_p`: of those, renormalised, the fewest likeliest whose probability reaches
    p (nucleus sampling, arXiv 1904.09751).
    """
    B, V = logits_BV.shape
    # the noise of a draw stays with the id and not with the rank: a near tie far from the draw cannot change it
    values_BK, ids_BK = jax.lax.top_k(logits_BV, min(top_k or V, V))
    probabilities_BK = jax.nn.softmax(values_BK, axis=-1)
    before_BK = jnp.cumsum(probabilities_BK, axis=-1) - probabilities_BK  # of all likelier tokens
    kept_BK = (before_BK < top_p) | (top_p >= 1)
    return jnp.zeros((B, V), bool).at[jnp.arange(B)[:, None], ids_BK].set(kept_BK)
