"""Optimizers against written-out references, schedules at their corners, decay masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.specs import RandomKey, map_specs, projection, table, vector
from training.config import OPTIMIZERS, SCHEDULES, OptimizerConfig, short_warmup_warning
from training.optimizer import learning_rate, make_optimizer

KEY = RandomKey()
LAYER = {
    "query": projection(KEY, (6, 4, 3), ("width", "heads", "head_dim"), 1.0, bias=True),
    "out": projection(KEY, (4, 3, 6), ("heads", "head_dim", "width"), 1.0, inputs=2),
    "norm": {"scale": vector(KEY, 6)},
}
SPECS = {
    "layers": map_specs(lambda spec: spec.stacked(2), LAYER),
    "tokens": {"weight": table(KEY, 10, 6, "vocab")},
}


def draw(seed):
    random = np.random.default_rng(seed)
    return map_specs(lambda spec: random.normal(size=spec.shape).astype(np.float32), SPECS)


def direction(config, gradients, params):
    optimizer = make_optimizer(config, SPECS)
    state = optimizer.init(params)
    for gradient in gradients:
        update, state = optimizer.update(gradient, state, params)
    return update


def test_adamw_equals_its_formula():
    config = OptimizerConfig(weight_decay=0.1, beta1=0.9, beta2=0.95)
    params, gradients = draw(0), [draw(1), draw(2), draw(3)]
    update = direction(config, gradients, params)
    for name, decay in (("weight", 0.1), ("bias", 0.0)):
        m = v = 0.0
        for gradient in gradients:
            g = gradient["layers"]["query"][name].astype(np.float64)
            m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
        expected = (m / (1 - 0.9**3)) / (np.sqrt(v / (1 - 0.95**3)) + 1e-8) + decay * params["layers"]["query"][name]
        np.testing.assert_allclose(update["layers"]["query"][name], expected, rtol=2e-5)


def test_muon_orthogonalises_each_matrix_of_a_stack():
    """Singular values of an update come out nearly equal, and its RMS is that of a typical Adam update."""
    update = direction(OptimizerConfig(name="muon", weight_decay=0.0), [draw(1)], draw(0))
    for name, shape in (("query", (6, 12)), ("out", (12, 6))):
        for layer in range(2):
            values = np.linalg.svd(np.asarray(update["layers"][name]["weight"][layer]).reshape(shape), compute_uv=False)
            scale = 0.2 * np.sqrt(max(shape))
            assert (values / scale > 0.6).all()
            assert (values / scale < 1.3).all()
    adam = direction(OptimizerConfig(weight_decay=0.0), [draw(1)], draw(0))
    np.testing.assert_allclose(update["tokens"]["weight"], adam["tokens"]["weight"], rtol=1e-6)


def test_muon_layers_do_not_mix():
    params, gradient = draw(0), draw(1)
    other = jax.tree.map(np.copy, gradient)
    other["layers"]["query"]["weight"][1] *= -3
    a, b = (
        direction(OptimizerConfig(name="muon"), [g], params)["layers"]["query"]["weight"] for g in (gradient, other)
    )
    np.testing.assert_allclose(a[0], b[0], rtol=1e-6)
    assert not np.allclose(a[1], b[1])


def test_lion_is_a_sign_and_sgd_is_momentum():
    config = OptimizerConfig(name="lion", weight_decay=0.0)
    assert set(np.unique(direction(config, [draw(1)], draw(0))["tokens"]["weight"])) == {-1.0, 1.0}
    update = direction(OptimizerConfig(name="sgd", weight_decay=0.0, momentum=0.9), [draw(1), draw(2)], draw(0))
    first, second = draw(1)["tokens"]["weight"], draw(2)["tokens"]["weight"]
    trace = second + 0.9 * first
    np.testing.assert_allclose(update["tokens"]["weight"], second + 0.9 * trace, rtol=1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_descends(name):
    """A quadratic's value falls by half in 60 steps."""
    target, params = draw(0), draw(1)
    lr = {"sgd": 0.05, "lion": 0.02}.get(name, 0.05)
    optimizer = make_optimizer(OptimizerConfig(name=name, weight_decay=0.0, momentum=0.9), SPECS)
    value = lambda p: sum(
        jnp.sum((a - b) ** 2) for a, b in zip(jax.tree.leaves(p), jax.tree.leaves(target), strict=True)
    )

    @jax.jit
    def step(params, state):
        update, state = optimizer.update(jax.grad(value)(params), state, params)
        return jax.tree.map(lambda p, u: p - lr * u, params, update), state

    before, state = value(params), optimizer.init(params)
    for _ in range(60):
        params, state = step(params, state)
    assert value(params) < before / 2


def test_only_matrices_and_tables_decay():
    assert map_specs(lambda spec: spec.decayed, SPECS) == {
        "layers": {"query": {"weight": True, "bias": False}, "out": {"weight": True}, "norm": {"scale": False}},
        "tokens": {"weight": True},
    }


def at(schedule: str, step: int, *, steps: int = 110, **options) -> np.float32:
    options = {"warmup_steps": 10, "final_lr": 0.1, **options}
    return np.float32(learning_rate(OptimizerConfig(lr=2.0, schedule=schedule, **options), steps)(step))


def test_schedules_at_their_corners():
    for schedule in SCHEDULES:
        assert at(schedule, 0) == pytest.approx(0.2)  # the first step already moves
        assert at(schedule, 4) == pytest.approx(1.0)
        assert at(schedule, 9) == 2.0
    assert at("constant", 109) == 2.0
    assert at("cosine", 59) == pytest.approx(2 * (0.1 + 0.9 / 2))
    assert at("linear", 59) == pytest.approx(2 * (1 - 0.9 / 2))
    assert at("wsd", 87, decay_fraction=0.2) == 2.0  # decays from step 88
    assert at("wsd", 88, decay_fraction=0.2) < 2.0
    assert at("wsd", 98, decay_fraction=0.2) == pytest.approx(2 * (1 - 0.9 / 2))


@pytest.mark.parametrize("final_lr", [0.1, 0.0, 1 / 3, 0.017])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize(("steps", "warmup"), [(100, 10), (100, 0), (7, 1), (2, 0), (12, 11)])
def test_a_decay_goes_from_the_peak_to_exactly_its_end(schedule, steps, warmup, final_lr):
    options = {"steps": steps, "warmup_steps": warmup, "final_lr": final_lr}
    assert at(schedule, max(warmup - 1, 0), **options) == 2.0
    assert at(schedule, steps - 1, **options) == np.float32(2.0) * np.float32(final_lr)
    assert at(schedule, steps - 2, **options) > at(schedule, steps - 1, **options)
    assert at(schedule, 10 * steps, **options) == at(schedule, steps - 1, **options)


def test_a_decay_of_twenty_steps_has_twenty_equal_ones():
    """As in the plan: 2.0, then twenty steps down to 0.2."""
    rates = np.array([at("wsd", step, steps=100, decay_fraction=0.2) for step in range(79, 100)])
    np.testing.assert_allclose(np.diff(rates), -0.09, rtol=1e-5)
    assert (rates[0], rates[-1]) == (2.0, np.float32(0.2))


def test_a_warmup_that_outlasts_the_run_is_told():
    config = OptimizerConfig(lr=1e-3, warmup_steps=50)
    assert short_warmup_warning(config, 50) is None
    told = short_warmup_warning(config, 20)
    assert "optimizer.warmup_steps=50 is more than train.steps=20" in told
    assert f"ends at {float(learning_rate(config, 20)(19)):.3g} and never reaches optimizer.lr=0.001" in told
