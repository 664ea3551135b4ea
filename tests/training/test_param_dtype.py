"""Parameters in bfloat16: half the memory, and they train as those in float32 do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from every import few_of

from config import compose
from parallel.mesh import AXES, make_mesh
from training.job import make_job
from training.rounding import stored_as

TINY = [
    *("model.width=32", "model.heads=4", "model.kv_heads=4", "model.head_dim=8", "model.ffn=64", "model.layers=2"),
    *("train.batch_size=8", "train.seq_len=16", "model.vocab_size=256", "train.steps=150"),
    *("optimizer=adamw", "optimizer.beta2=0.999", "optimizer.schedule=constant", "optimizer.warmup_steps=0"),
]


def batch(step: int) -> dict[str, np.ndarray]:
    """Sequences that count up from anywhere in steps of 1 to 3, modulo 64: to be learned, but not at once."""
    random = np.random.default_rng(step)
    rows = random.integers(0, 64, (8, 1)) + random.integers(1, 4, (8, 1)) * np.arange(17)
    rows = (rows % 64).astype(np.int32)
    return {"tokens_BT": rows[:, :-1], "targets_BT": rows[:, 1:], "mask_BT": np.ones((8, 16), np.float32)}


@functools.cache
def trained(param_dtype: str, lr: float, steps: int = 150, **sizes: int):
    """Losses, and the parameters before and after, float32."""
    cfg = compose.load([*TINY, f"train.param_dtype={param_dtype}", f"optimizer.lr={lr}"])
    mesh = make_mesh(dict.fromkeys(AXES, 1) | sizes, jax.devices()[: int(np.prod([*sizes.values(), 1]))])
    wide = lambda tree: jax.tree.map(lambda p: np.asarray(p.astype(jnp.float32)), tree)
    losses = []
    with jax.set_mesh(mesh):
        job = make_job(cfg, mesh)
        state, step = job.init(0), job.step
        start = wide(state.params)
        for number in range(steps):
            state, metrics = step(state, batch(number))
            losses.append(metrics["train/loss"])
        assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype(param_dtype)}
        return np.asarray(losses), start, wide(state.params)


def changes(run) -> dict[str, np.ndarray]:
    """By parameter, how far its entries have moved."""
    _, start, end = run
    flat = lambda tree: {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}
    end = flat(end)
    return {name: end[name] - x for name, x in flat(start).items()}


@pytest.mark.long
@pytest.mark.parametrize("lr", few_of([1e-3, 3e-4], [1e-3]))
def test_the_loss_follows_that_of_float32(lr):
    """Over the last 30 steps the mean loss is that of float32 to 1%, after a fall of a seventh and more."""
    narrow, exact = trained("bfloat16", lr)[0], trained("float32", lr)[0]
    assert exact[-30:].mean() < exact[0] * (0.6 if lr == 1e-3 else 0.85)
    np.testing.assert_allclose(narrow[-30:].mean(), exact[-30:].mean(), rtol=0.01)


@pytest.mark.parametrize("lr", few_of([1e-3, 3e-4], [1e-3]))
def test_no_parameter_stands_still(lr):
    """Norm scales begin at 1, where a step of 0.001 is an eighth to a quarter of bfloat16's last bit.

    Matrices and tables end where float32's do. An entry of a scale walks at random about where float32's goes, by 0.03
    after 150 steps (a standard deviation, from the bit of 1/128 taken with probability 0.13), so their mean is held
    against float32's: 32 entries, four deviations.
    """
    narrow, exact = changes(trained("bfloat16", lr)), changes(trained("float32", lr))
    for name, moved in narrow.items():
        scale = "scale" in name
        assert (moved == 0).mean() < (0.3 if scale else 0.05), name
        if scale:
            assert abs(moved.mean() - exact[name].mean()) < 4 * 0.03 / 32**0.5, name
        else:
            assert np.corrcoef(moved.ravel(), exact[name].ravel())[0, 1] > 0.95, name


def test_the_mean_of_many_roundings_is_the_value():
    """An entry of 1 that is to fall by 1e-3 in each of 400 steps: to the nearest it never would."""
    fall = lambda step, x: stored_as(x, {"x": x["x"].astype(jnp.float32) - 1e-3}, step)
    end = jax.jit(lambda x: jax.lax.fori_loop(0, 400, fall, x))({"x": jnp.ones(4096, jnp.bfloat16)})["x"]
    assert abs(float(end.astype(jnp.float32).mean()) - 0.6) < 0.005


def test_rounding_is_the_same_on_every_mesh():
    """Bitwise for equal input, whatever the sharding, the order of layers and the padding of the vocabulary."""
    random = np.random.default_rng(0)
    values = {
        "layers": {"matrix": random.normal(size=(4, 8, 6)).astype(np.float32)},
        "tokens": {"weight": random.normal(size=(16, 8)).astype(np.float32)},
    }
    order = np.asarray([2, 0, 3, 1])
    moved = {
        "layers": {"matrix": values["layers"]["matrix"][order]},
        "tokens": {"weight": np.pad(values["tokens"]["weight"], ((0, 8), (0, 0)))},
    }

    @jax.jit
    def store(new):
        return stored_as(jax.tree.map(lambda x: x.astype(jnp.bfloat16), new), new, jnp.int32(3))

    one = store(values)
    mesh = make_mesh(dict.fromkeys(AXES, 1) | {"fsdp": 4, "tensor": 2})
    place = lambda x, *dims: jax.device_put(x, jax.NamedSharding(mesh, jax.P(*dims)))
    other = store(
        {
            "layers": {"matrix": place(moved["layers"]["matrix"], None, "fsdp", "tensor")},
            "tokens": {"weight": place(moved["tokens"]["weight"], "tensor", "fsdp")},
        }
    )
    np.testing.assert_array_equal(other["layers"]["matrix"], one["layers"]["matrix"][order])
    np.testing.assert_array_equal(other["tokens"]["weight"][:16], one["tokens"]["weight"])
    assert not np.asarray(other["tokens"]["weight"][16:]).any()


def test_a_number_that_is_none_stays_none():
    """Random bits added to some kinds of NaN carry into a number."""
    nan = jax.lax.bitcast_convert_type(jnp.full(64, 0x7FFFFFFF, jnp.uint32), jnp.float32)
    x = {"x": jnp.concatenate([nan, jnp.full(64, jnp.inf)])}
    stored = stored_as({"x": jnp.zeros(128, jnp.bfloat16)}, x, jnp.int32(0))["x"]
    assert jnp.isnan(stored[:64]).all()
    assert jnp.isinf(stored[64:]).all()


MESHES = [{"fsdp": 2, "tensor": 2}, {"pipe": 2}]


@pytest.mark.long
@pytest.mark.parametrize("sizes", few_of(MESHES, MESHES[:1]), ids=str)
def test_meshes_agree(sizes):
    """A rounding flips where a mesh changes the last bit of a float32: losses agree to 1e-3, as bfloat16's would."""
    one, many = trained("bfloat16", 1e-3, 20), trained("bfloat16", 1e-3, 20, **sizes)
    jax.tree.map(np.testing.assert_array_equal, many[1], one[1])
    np.testing.assert_allclose(many[0], one[0], rtol=1e-3)
