"""Search spaces: Hydra's sweep grammar as distributions, points as overrides, mistakes in one line."""

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from scaling.search.space import parse_space

LAYOUT = [{"mesh.data": 4}, {"mesh.data": 2, "mesh.tensor": 2}]
SPACE = {
    "optimizer.lr": "tag(log, interval(1e-4, 1e-1))",
    "model.layers": "range(1, 9)",
    "model.width": "range(32, 129, 32)",
    "model.ffn": "tag(log, int(interval(64, 1024)))",
    "optimizer.final_lr": "range(0, 1, 0.25)",
    "optimizer": "choice(adamw, muon)",
    "train.remat": ["none", "full"],
    "layout": LAYOUT,
}


def test_hydras_grammar_as_distributions():
    assert parse_space(SPACE).distributions == {
        "optimizer.lr": FloatDistribution(1e-4, 1e-1, log=True),
        "model.layers": IntDistribution(1, 8),
        "model.width": IntDistribution(32, 128, step=32),
        "model.ffn": IntDistribution(64, 1024, log=True),
        "optimizer.final_lr": FloatDistribution(0.0, 0.75, step=0.25),
        "optimizer": CategoricalDistribution(["adamw", "muon"]),
        "train.remat": CategoricalDistribution(["none", "full"]),
        "layout": CategoricalDistribution(["mesh.data=4", "mesh.data=2 mesh.tensor=2"]),
    }


def test_points_are_overrides():
    space = parse_space(SPACE)
    point = space.point({"optimizer.lr": "1e-3", "layout": LAYOUT[1], "model.layers": 4, "train.remat": "full"})
    expected = ["optimizer.lr=0.001", "mesh.data=2", "mesh.tensor=2", "model.layers=4", "train.remat=full"]
    assert space.overrides(point) == expected
    assert space.keys() == {*SPACE, "mesh.data", "mesh.tensor"} - {"layout"}
    assert parse_space({"a.b": [True, None, 1e-5]}).distributions["a.b"].choices == ("true", "null", "1e-05")


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ({}, ["nothing to search"]),
        ({"seed": "5"}, ["seed: 5 is one value", "interval(a, b)"]),
        ({"seed": "choice(1"}, ["cannot read seed: choice(1"]),
        ({"optimizer.lr": "tag(log, interval(0, 1))"}, ["needs 0 < a < b"]),
        ({"optimizer.lr": "interval(2, 1)"}, ["needs a < b"]),
        ({"seed": "range(3, 3)"}, ["needs a < b"]),
        ({"seed": [1]}, ["seed needs two or more different choices, not 1"]),
        ({"layout": [{}, {"mesh.data": 2}]}, ["layout sets no key"]),
        ({"mesh.data": [1, 2], "layout": LAYOUT}, ["mesh.data is set twice"]),
    ],
)
def test_mistakes_in_a_space(space, words):
    with pytest.raises(ValueError) as told:
        parse_space(space)
    assert all(word in str(told.value) for word in words), told.value
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("point", "words"),
    [
        ({"optimizer.beta1": 0.9}, ["optimizer.beta1 is not searched", "optimizer.lr"]),
        ({"optimizer.lr": 1}, ["outside 0.0001 to 0.1"]),
        ({"optimizer.lr": "step"}, ["should be a number"]),
        ({"model.width": 48}, ["no step of 32 from 32"]),
        ({"optimizer": "sgd"}, ["optimizer=sgd is not among adamw, muon"]),
    ],
)
def test_mistakes_in_a_starting_point(point, words):
    with pytest.raises(ValueError) as told:
        parse_space(SPACE).point(point)
    assert all(word in str(told.value) for word in words), told.value
