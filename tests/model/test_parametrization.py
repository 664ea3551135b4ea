"""The parametrizations' table: nothing changes at the base size, factors follow the kinds, the mesh changes nothing."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from every import few_of
from meshes import MODELS, assert_changes_nothing

from config import compose
from model import parametrization
from model.config import ModelConfig
from model.initialise import draw
from model.parametrization import Factors
from model.specs import RandomKey, projection
from model.transformer import describe
from parallel.mesh import AXES, make_mesh
from training import parity
from training.config import OptimizerConfig
from training.optimizer import make_optimizer

MUP = ("model.parametrization=mup", "model.base_width=12", "optimizer=adamw")
COMPLETE_P = ("model.parametrization=complete_p", "model.base_width=12", "model.base_depth=1", "optimizer=adamw")


def description(*overrides):
    with jax.set_mesh(make_mesh(dict.fromkeys(AXES, 1), jax.devices()[:1])):
        return describe(compose.load([*overrides]).model)


def factors(*overrides):
    found = description(*overrides)
    return parametrization.factors_of(found.config, found.specs)


@pytest.mark.parametrize("rule", ["mup", "complete_p"])
def test_at_the_base_size_it_is_the_standard_one(rule):
    """Bitwise, apart from the scale of attention, which is set here."""
    same = ("model.attention_scale=0.3", "optimizer=adamw")
    base = (f"model.parametrization={rule}", "model.base_width=48", "model.base_depth=2")
    ours, standard = (
        parity.trace(compose.load([*MODELS["moe"], *same, *extra]), parity.ONE_DEVICE) for extra in (base, ())
    )
    assert ours.losses == standard.losses
    for name, end in standard.end.items():
        assert np.array_equal(ours.end[name], end), name


def test_factors_follow_the_kinds():
    """Width 4 times and depth 3 times the base."""
    sizes = ["model.width=64", "model.base_width=16", "model.layers=6", "model.base_depth=2", "model.qk_norm=true"]
    found = factors("model=moe_nano", *sizes, "model.parametrization=complete_p")
    layer, moe = found["layers"], found["layers"]["moe"]
    assert found["tokens"]["weight"] == found["final_norm"]["scale"] == Factors(1, 1 / 4, False)
    assert (
        layer["attention"]["query"]["weight"]
        == layer["attention"]["out"]["weight"]
        == moe["up"]["weight"]
        == Factors(1 / 4, 1 / 12, True)
    )
    assert moe["router"]["weight"] == Factors(1 / 4, 1 / 3, False)
    assert layer["attention_norm"]["scale"] == Factors(1, 1 / 12, False)
    assert layer["attention"]["query_norm"]["scale"] == Factors(1, 1 / 3, False)
    found = factors("model=moe_nano", *sizes, "model.parametrization=mup")
    assert found["layers"]["moe"]["up"]["weight"] == Factors(1 / 4, 1 / 4, True)
    found = factors("model=moe_nano", *sizes)
    assert {one.change for one in jax.tree.leaves(found)} == {one.gradient for one in jax.tree.leaves(found)} == {1}


def test_multipliers_and_scales():
    sizes = ["model.width=64", "model.head_dim=32", "model.layers=8", "model.embedding_scale=true"]
    base = ["model.base_width=16", "model.base_depth=2"]
    p = parametrization
    got = {}
    for rule in ("standard", "mup", "complete_p"):
        c = compose.load([*sizes, *base, f"model.parametrization={rule}"]).model
        got[rule] = p.embedding_multiplier(c), p.attention_scale(c), p.logit_multiplier(c), p.residual_multiplier(c)
    assert got["standard"] == (8, 32**-0.5, 1, 1)
    assert got["mup"] == (4, 1 / 32, 1 / 4, 1)
    assert got["complete_p"] == (4, 1 / 32, 1 / 4, 1 / 4)
    c = compose.load([*sizes, *base, "model.parametrization=complete_p"]).model
    assert p.matrix_std(c, 100) == pytest.approx(0.1)
    assert p.matrix_std(c, 100, residual=True) == pytest.approx(0.05)  # of 2 layers, not of 8
    assert p.router_std(c) == pytest.approx(1 / 16)
    spec = projection(RandomKey(), (400, 400), ("width", "ffn"), 0.05)["weight"]
    assert float(draw(spec, jax.random.key(0)).std()) == pytest.approx(0.05, rel=0.02)


@pytest.mark.parametrize(("name", "share"), [("adamw", 1 / 4), ("lion", 1 / 4), ("adafactor", 1 / 4), ("muon", 1 / 2)])
def test_updates_are_those_of_the_base_model_times_a_factor(name, share):
    """Epsilon included, which is as large as the gradients here; weight decay is not scaled."""
    tree = lambda seed: {"layers": {"w": np.float32(np.random.default_rng(seed).normal(size=(1, 8, 8)))}}
    params, gradient = tree(0), tree(1)
    specs = {"layers": {"w": projection(RandomKey(), (8, 8), ("width", "ffn"), 1.0)["weight"].stacked(1)}}
    base = ModelConfig(parametrization="mup", width=128, base_width=128)
    wider = replace(base, width=512)
    settings = OptimizerConfig(name=name, eps=1.0, weight_decay=0.5)

    def direction(gradient, model=None):
        optimizer = make_optimizer(settings, specs, model)
        update = optimizer.update(gradient, optimizer.init(params), params)[0]
        return update["layers"]["w"] - 0.5 * params["layers"]["w"]

    update = direction(jax.tree.map(lambda g: g / 4, gradient), wider)
    np.testing.assert_allclose(update, share * direction(gradient), rtol=1e-4, atol=1e-6)
    assert np.array_equal(direction(gradient, base), direction(gradient))


MESHES = [("llama", "tensor", MUP), ("moe", "pipe", COMPLETE_P)]


@pytest.mark.long
@pytest.mark.parametrize(("model", "axis", "rule"), few_of(MESHES, MESHES[1:]))
def test_the_mesh_changes_nothing(model, axis, rule):
    assert_changes_nothing(model, {axis: 2}, extra=rule)


def test_complete_p_needs_a_stream_that_no_norm_rescales():
    with pytest.raises(ValueError, match="set model.norm_position=pre, both or output"):
        compose.load(["model.parametrization=complete_p", "model.norm_position=post"])
    with pytest.raises(ValueError, match="model.base_width=0 must be 1 or more"):
        compose.load(["model.base_width=0"])
