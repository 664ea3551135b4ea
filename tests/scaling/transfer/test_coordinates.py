"""Coordinate checks: muP is flat in width, CompleteP in depth, and the standard parametrization is neither."""

from dataclasses import replace

import jax
import pytest
from every import few_of

from config import compose
from parallel.mesh import AXES, make_mesh
from scaling.transfer.activations import at_width, measure
from scaling.transfer.coordinates import Check, judge
from training.job import make_job

pytestmark = pytest.mark.long

SMALL = ["model.heads=2", "model.kv_heads=1", "model.head_dim=16", "model.width=32", "model.ffn=64", "model.layers=1"]
SMALL += ["model.vocab_size=256", "train.batch_size=4", "train.seq_len=16", "optimizer.schedule=constant"]
SMALL += ["optimizer.warmup_steps=0", "model.base_width=32", "model.scan_layers=true"]


def check(dial, sizes, *overrides, steps=6):
    cfg = compose.load([*SMALL, *overrides])
    mesh = make_mesh(dict.fromkeys(AXES, 1), jax.devices()[:1])
    found = {}
    with jax.set_mesh(mesh):
        for size in sizes:
            model = at_width(cfg.model, size) if dial == "width" else replace(cfg.model, layers=size)
            found[size] = measure(make_job(replace(cfg, model=model), mesh), 1, steps)
    return Check(dial, {s: f[0] for s, f in found.items()}, {s: f[1] for s, f in found.items()})


# a learning rate with which six steps do more than the initial noise in the logits, which falls with the width
RATES = {"adamw": 2e-3, "muon": 1e-2, "lion": 2e-3, "sgd": 0.3}


def how(optimizer):
    return [f"optimizer={optimizer}", f"optimizer.lr={RATES[optimizer]}", "optimizer.weight_decay=0"]


@pytest.mark.parametrize("optimizer", few_of(RATES, ["adamw", "muon"]))
def test_mup_is_flat_from_32_to_256(optimizer):
    lines = judge(check("width", (32, 256), "model.parametrization=mup", *how(optimizer)))
    assert all(line.flat for line in lines), told(lines)


def test_the_standard_parametrization_is_not():
    lines = {line.name: line for line in judge(check("width", (32, 256), *how("adamw")))}
    assert not lines["last layer"].flat
    assert lines["logits"].change > 0.4


@pytest.mark.parametrize(("parametrization", "flat"), [("complete_p", True), ("mup", False)])
def test_only_complete_p_is_flat_in_depth(parametrization, flat):
    """At a rate with which the steps do more than the blocks' initial noise, which falls with the depth."""
    rule = [f"model.parametrization={parametrization}", "model.base_depth=4"]
    lines = judge(check("layers", (4, 16), *rule, *how("adamw"), "optimizer.lr=0.008"))
    assert [line.name for line in lines] == ["embedding", "last layer", "head input", "logits"]
    assert all(line.flat for line in lines) == flat, told(lines)


def told(lines):
    return [f"{line.name} {line.size:+.2f} {line.change:+.2f}" for line in lines]


def test_experts_too():
    kind = ["model.experts=4", "model.shared_experts=1", "model.tied_embeddings=false"]
    lines = judge(check("width", (32, 256), "model.parametrization=mup", *kind, *how("adamw")))
    assert all(line.flat for line in lines), told(lines)


def test_widths_that_do_not_come_out_whole_are_refused():
    model = compose.load(SMALL).model
    assert at_width(at_width(model, 96), 32) == model
    with pytest.raises(ValueError, match=r"model.kv_heads = 1 \* 48 / 32 is not a whole number"):
        at_width(model, 48)
