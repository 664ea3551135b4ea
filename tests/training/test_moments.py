"""Moments in bfloat16: half the memory, and they follow what they average."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from config import compose
from model.specs import RandomKey, projection, table, vector
from parallel.mesh import AXES, make_mesh
from training.config import OptimizerConfig
from training.job import make_job
from training.moments import in_bfloat16
from training.optimizer import make_optimizer
from training.rounding import rounded

TINY = [
    *("model.width=16", "model.heads=2", "model.kv_heads=2", "model.head_dim=8", "model.ffn=32"),
    *("optimizer=adamw", "optimizer.moment_dtype=bfloat16"),
]
KEY = RandomKey()
SPECS = {
    "layers": {
        "matrix": projection(KEY, (4, 6), ("width", "ffn"), 1.0)["weight"].stacked(2),
        "norm": {"scale": vector(KEY, 4).stacked(2)},
    },
    "tokens": {"table": table(KEY, 10, 4, "vocab")},
}
PARAMS = {
    "layers": {"matrix": jnp.ones((2, 4, 6)), "norm": {"scale": jnp.ones((2, 4))}},
    "tokens": {"table": jnp.ones((10, 4))},
}


def test_rounding_is_to_a_neighbour_and_right_on_average():
    x = jnp.asarray([1.0, 1.001, 1.00390625, -1.0035, 3e-39, 0.0, jnp.inf], jnp.float32)
    every = jnp.arange(2**16, dtype=jnp.uint16)[:, None]  # all that can be drawn
    values = np.asarray(rounded(jnp.broadcast_to(x, (2**16, len(x))), every)).astype(np.float64)
    nearest = np.asarray(x.astype(jnp.bfloat16)).astype(np.float64)
    finite = np.isfinite(nearest)
    assert (values[:, ~finite] == nearest[~finite]).all()
    for column in np.flatnonzero(finite):
        found = np.unique(values[:, column])
        assert len(found) <= 2
        assert nearest[column] in found
        np.testing.assert_allclose(values[:, column].mean(), float(x[column]), rtol=1e-5, atol=1e-41)


@pytest.mark.parametrize("name", ["adamw", "lion", "muon", "sgd"])
def test_only_moments_shrink(name):
    state = make_optimizer(OptimizerConfig(name=name, moment_dtype="bfloat16"), SPECS).init(PARAMS)
    wide = make_optimizer(OptimizerConfig(name=name), SPECS).init(PARAMS)
    size = lambda state: sum(leaf.nbytes for leaf in jax.tree.leaves(state) if leaf.ndim > 1)
    assert size(state) * 2 == size(wide) or (name == "muon" and size(state) < size(wide))
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        assert (leaf.dtype == jnp.bfloat16) == isinstance(path[-1], jax.tree_util.DictKey), path


def followed(transformation, shrunk: float, steps: int) -> float:
    """The mean second moment, of what float32 has, after gradients fall from 1 to `shrunk`."""
    params = {"tokens": {"table": jnp.zeros((64, 64))}}

    @jax.jit
    def run(state):
        gradient = lambda size: jax.tree.map(lambda p: jnp.full_like(p, size), params)
        first = lambda _, state: transformation.update(gradient(1.0), state)[1]
        then = lambda _, state: transformation.update(gradient(shrunk), state)[1]
        return jax.lax.fori_loop(0, steps, then, jax.lax.fori_loop(0, steps, first, state))

    state = run(transformation.init(params))
    adam = getattr(state, "inner", state)
    return float(adam.nu["tokens"]["table"].astype(jnp.float32).mean())


def test_a_second_moment_follows_where_plain_rounding_stands_still():
    """beta2 = 0.999: a step changes less than half of the last bit."""

    def plain(inner):
        to = lambda dtype: lambda state: state._replace(nu=jax.tree.map(lambda v: v.astype(dtype), state.nu))
        narrow, widen = to(jnp.bfloat16), to(jnp.float32)

        def update(updates, state, params=None):
            updates, state = inner.update(updates, widen(state), params)
            return updates, narrow(state)

        return optax.GradientTransformation(lambda params: narrow(inner.init(params)), update)

    adam = optax.scale_by_adam(b2=0.999)
    exact = followed(adam, 0.1, 2000)
    assert followed(in_bfloat16(adam), 0.1, 2000) == pytest.approx(exact, rel=0.003)
    assert abs(followed(plain(adam), 0.1, 2000) / exact - 1) > 0.2


def moments_after(gradients: list[dict]) -> dict:
    """Adam's moments, an inner state as a dict, after these gradients."""
    adam = in_bfloat16(optax.scale_by_adam(b2=0.999))
    update = jax.jit(lambda gradient, state: adam.update(gradient, state)[1])
    state = adam.init(gradients[0])
    for gradient in gradients:
        state = update(gradient, state)
    return {"mu": state.inner.mu, "nu": state.inner.nu}


def draw(seed: int) -> dict:
    random = np.random.default_rng(seed)
    return {
        "layers": {"matrix": random.normal(size=(4, 8, 6)).astype(np.float32)},
        "tokens": {"table": random.normal(size=(16, 8)).astype(np.float32)},
    }


def assert_equal(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_the_mesh_changes_nothing():
    """Bitwise: an entry is rounded by the same draw wherever it lies."""
    gradients = [draw(seed) for seed in range(3)]
    mesh = make_mesh(dict.fromkeys(AXES, 1) | {"fsdp": 4, "tensor": 2})
    specs = {"layers": {"matrix": P(None, "fsdp", "tensor")}, "tokens": {"table": P("tensor", "fsdp")}}
    place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    split = moments_after([jax.tree.map(place, gradient, specs) for gradient in gradients])
    assert_equal(split, moments_after(gradients))


def test_neither_the_order_of_layers_nor_the_padding_of_a_vocabulary_matters():
    """Bitwise: both depend on the mesh."""
    gradients, order = [draw(seed) for seed in range(3)], np.asarray([2, 0, 3, 1])
    plain = moments_after(gradients)

    def moved(tree: dict, rows: int) -> dict:
        table = np.pad(np.asarray(tree["tokens"]["table"]), ((0, rows), (0, 0)))
        return {"layers": {"matrix": tree["layers"]["matrix"][order]}, "tokens": {"table": table}}

    other = moments_after([moved(gradient, 5) for gradient in gradients])
    assert_equal(other, {name: moved(moments, 5) for name, moments in plain.items()})


def test_moments_lie_like_their_parameters():
    cfg = compose.load([*TINY, "model.layers=2"])
    mesh = make_mesh(dict.fromkeys(AXES, 1) | {"fsdp": 2, "tensor": 2}, jax.devices()[:4])
    with jax.set_mesh(mesh):
        state = make_job(cfg, mesh).abstract
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.dtype == jnp.bfloat16]
    specs = lambda leaves: sorted(str((leaf.shape, leaf.sharding.spec)) for leaf in leaves)
    assert specs(moments) == specs(2 * jax.tree.leaves(state.params))


def test_the_rounding_is_drawn_anew_for_each_step_and_parameter():
    x = {"a": jnp.full((64, 64), 1.0 / 3), "b": jnp.full((64, 64), 1.0 / 3)}
    keep = in_bfloat16(optax.GradientTransformation(lambda p: {"m": p}, lambda u, s, p=None: (u, {"m": u})))
    _, first = keep.update(x, keep.init(x))
    _, second = keep.update(x, first)
    a, b = first.inner["m"]["a"], first.inner["m"]["b"]
    assert 0.3 < float((a != b).mean()) < 0.7
    assert 0.3 < float((a != second.inner["m"]["a"]).mean()) < 0.7
    assert jnp.array_equal(a, keep.update(x, keep.init(x))[1].inner["m"]["a"])


@pytest.mark.parametrize("overrides", [["optimizer.moment_dtype=float8"], ["optimizer.name=adafactor"]])
def test_what_cannot_be_is_one_clear_line(overrides):
    with pytest.raises(ValueError, match=r"optimizer\.moment_dtype="):
        compose.load([*TINY, *overrides])
