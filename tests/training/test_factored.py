"""Adafactor's factored moments: optax's where nothing is padded, and blind to padding."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from model.specs import RandomKey, map_specs, projection, table, vector
from training.config import OptimizerConfig
from training.factored import factored_dims, scale_by_factored_rms
from training.optimizer import make_optimizer
from training.state import has_vocabulary

KEY = RandomKey()


def specs(rows: int, used: int = 150) -> dict:
    """With a vocabulary of `used` tokens padded to `rows`, in which the width is now the longer and now the shorter."""
    return {
        "layers": {"up": projection(KEY, (140, 160), ("width", "ffn"), 1.0)["weight"].stacked(3)},
        "norm": {"scale": vector(KEY, 140)},
        "tokens": {"weight": table(KEY, rows, 160, "vocab", used)},
        "small": {"weight": table(KEY, rows, 40, "vocab", used)},
    }


def draw(tree: dict, seed: int) -> dict:
    """Gradients, those of padding zero, and the rest the same for every padding."""
    random = np.random.default_rng(seed)

    def one(spec):
        used = spec.shape[0] if spec.rows is None else spec.rows
        made = random.normal(size=(used, *spec.shape[1:])).astype(np.float32)
        return np.pad(made, ((0, spec.shape[0] - used), *[(0, 0)] * (made.ndim - 1)))

    return map_specs(one, tree)


def after(transformation, tree: dict, steps: int = 3):
    """The last update, and the state."""
    params = draw(tree, 9)
    state = transformation.init(params)
    for seed in range(steps):
        update, state = jax.jit(transformation.update)(draw(tree, seed), state, params)
    return update, state


def test_it_is_optax_where_nothing_is_padded():
    tree = specs(150)
    ours, theirs = after(scale_by_factored_rms(tree), tree), after(optax.scale_by_factored_rms(), tree)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), ours, theirs)


def test_padding_changes_nothing():
    """Padded past the width, so that a choice of dims by size would turn round; padding's moments are exactly zero."""
    (plain, one), (padded, other) = (after(scale_by_factored_rms(specs(rows)), specs(rows)) for rows in (150, 192))
    resized = has_vocabulary(specs(150))
    differing = set()
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path((plain, one)), jax.tree.leaves((padded, other)), strict=True
    ):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if a.shape != b.shape:
            differing.add(name)
            assert resized(name)
            assert not np.asarray(b[150:]).any(), name
            b = b[:150]
        np.testing.assert_allclose(b, a, rtol=1e-6, err_msg=name)
    assert any("v_col" in name or "v_row" in name for name in differing)


def test_dims_do_not_depend_on_what_numbers_matrices():
    stack = projection(KEY, (200, 130, 150), ("experts", "width", "ffn"), 1.0, batch=1)["weight"].stacked(400)
    assert factored_dims(stack) == (2, 3)
    assert factored_dims(projection(KEY, (100, 500), ("width", "ffn"), 1.0)["weight"]) is None


def test_moments_of_bfloat16_parameters():
    tree = specs(192)
    optimizer = make_optimizer(OptimizerConfig(name="adafactor", weight_decay=0.0), tree, param_dtype="bfloat16")
    narrow = jax.tree.map(lambda p: jnp.asarray(p, jnp.bfloat16), draw(tree, 0))
    update, state = optimizer.update(narrow, optimizer.init(narrow), narrow)
    exact = make_optimizer(OptimizerConfig(name="adafactor", weight_decay=0.0), tree)
    wide = jax.tree.map(lambda p: p.astype(jnp.float32), narrow)
    expected, _ = exact.update(wide, exact.init(wide), wide)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), update, expected)
    assert {x.dtype for x in jax.tree.leaves(state) if x.ndim} == {jnp.dtype("bfloat16")}
