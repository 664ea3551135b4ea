"""AdaLoRA: which ranks of which matrices matter, and how many are left at each step (Zhang et al., arXiv 2303.10512).

A matrix has beside it a, b and `values`; with the k-th value go the k-th column of a and the k-th row of b. The
importance of an entry is the mean of |entry x gradient| times the mean of how far that strays (equations 8 to 10), both
exponential; that of a value adds to its own the means over its column and row (equation 7). The values of least
importance over all matrices become zero, as many as the budget of the step says (equations 11 and 12).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from finetune.adapter_config import AdaLoraConfig
from model.specs import Specs


class Importance(NamedTuple):
    """A nested dict like the trained parameters' of each."""

    mean: dict
    stray: dict


class AdaLoraRule:
    """What AdaLoRA does beside an optimizer: see training.trainable.Rule."""

    def __init__(self, config: AdaLoraConfig, layers: int, steps: int):
        self.config, self.layers, self.steps = config, layers, steps

    def around(self, core: optax.GradientTransformation, specs: Specs) -> optax.GradientTransformation:
        """The optimizer, with the gradient of orthogonality added, and importance kept in its state."""
        c = self.config
        blend = lambda decay, old, new: jax.tree.map(lambda o, n: decay * o + (1 - decay) * n, old, new)

        def begin(params):
            zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
            return core.init(params), Importance(zeros, zeros)

        def update(grads, state, params):
            inner, seen = state
            if c.orthogonality:
                more = jax.grad(lambda params: c.orthogonality * orthogonality(params, specs))(params)
                grads = jax.tree.map(lambda g, m: g + m.astype(g.dtype), grads, more)
            now = jax.tree.map(lambda p, g: jnp.abs((p * g).astype(jnp.float32)), params, grads)
            mean = blend(c.beta1, seen.mean, now)
            stray = blend(c.beta2, seen.stray, jax.tree.map(lambda n, m: jnp.abs(n - m), now, mean))
            direction, inner = core.update(grads, inner, params)
            return direction, (inner, Importance(mean, stray))

        return optax.GradientTransformation(begin, update)

    def adjust(self, before: dict, after: dict, opt_state, step: jax.Array) -> dict:
        """The updated parameters, with the values of least importance zero. `step` counts from 0."""
        c, seen = self.config, opt_state[1]
        scores = [_score(mean, stray) for mean, stray in zip(pairs(seen.mean), pairs(seen.stray), strict=True)]
        olds, news = (pairs(params) for params in (before, after))
        flat = jnp.concatenate([score.reshape(-1) for score in scores])
        order = jnp.argsort(-flat, stable=True)
        rank = jnp.zeros_like(order).at[order].set(jnp.arange(len(order)), unique_indices=True)
        matrices = len(flat) // scores[0].shape[0] * self.layers // c.initial_rank  # rows of padding do not count
        done = step + 1
        begin, end = round(c.begin * self.steps), self.steps - round(c.end * self.steps)
        cutting = (done > begin) & (done % c.interval == 0) | (done == end)
        kept, at = rank < self.budget(done, matrices, begin, end), 0
        values = []
        for old, new, score in zip(olds, news, scores, strict=True):
            here = kept[at : at + score.size].reshape(score.shape)
            here = jnp.where(done > end, old["values"] != 0, here | ~cutting)  # in the end what is zero stays so
            values.append(jnp.where(here, new["values"], 0))
            at += score.size
        return _with_values(after, iter(values))

    def budget(self, done: jax.Array, matrices: int, begin: int, end: int) -> jax.Array:
        """How many values are left after so many steps, in all matrices (appendix A, cubic)."""
        c = self.config
        first, last = c.initial_rank * matrices, c.rank * matrices
        left = 1 - jnp.clip((done - begin) / max(end - begin, 1), 0, 1)
        return jnp.round(last + (first - last) * left**3).astype(jnp.int32)


def pairs(tree: dict) -> list[dict]:
    """The adapters in a nested dict of parameters, in the order of their names."""
    if "values" in tree and "a" in tree:
        return [tree]
    return [found for name in sorted(tree) if isinstance(tree[name], dict) for found in pairs(tree[name])]


def _score(mean: dict, stray: dict) -> jax.Array:
    """The importance of each value, shaped as they are, (layers, [experts,] rank)."""
    score = lambda mean, stray: mean * stray
    values = score(mean["values"], stray["values"])
    a, b = (score(mean[name]["weight"], stray[name]["weight"]) for name in ("a", "b"))
    batch = values.ndim - 1
    of_a = a.mean(axis=tuple(range(batch, a.ndim - 1)))
    of_b = b.mean(axis=tuple(range(batch + 1, b.ndim)))
    return values + of_a + of_b


def _with_values(tree: dict, values) -> dict:
    if "values" in tree and "a" in tree:
        return tree | {"values": next(values).astype(tree["values"].dtype)}
    inside = lambda branch: _with_values(branch, values) if isinstance(branch, dict) else branch
    return {name: inside(tree[name]) for name in sorted(tree)}


def orthogonality(params: dict, specs: Specs) -> jax.Array:
    """|a^T a - 1|^2 + |b b^T - 1|^2 of each matrix, summed (equation 4)."""
    total = jnp.zeros((), jnp.float32)
    for pair in pairs(params):
        batch = pair["values"].ndim - 1
        a, b = pair["a"]["weight"].astype(jnp.float32), pair["b"]["weight"].astype(jnp.float32)
        stack, rank = pair["values"].shape[:batch], pair["values"].shape[-1]
        a, b = a.reshape(*stack, -1, rank), b.reshape(*stack, rank, -1)
        for gram in (jnp.einsum("...ir,...is->...rs", a, a), jnp.einsum("...ro,...so->...rs", b, b)):
            total = total + jnp.sum(jnp.square(gram - jnp.eye(rank)))
    return total
