"""Grids of sweeps: sizes by the rule, tokens by the budget, overrides that train.py reads as planned, the bill."""

import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from config.compose import load
from model.config import ModelConfig
from model.counts import parameter_count
from scaling.sweep.design import Measured, SweepConfig, design, expected_seconds, load_sweep, shape

EXAMPLE = Path(__file__).parents[3] / "experiments" / "isoflop_cpu" / "sweep.yaml"
TEMPLATE = ModelConfig(vocab_size=512)
BATCH = {"batch_size": (2,), "eval_sequences": 4}
SMALL = SweepConfig("small", "isoflop", (8, 16, 32, 64), budgets=(1e10, 1e11), sizes=3, **BATCH)


def test_isoflop_keeps_its_budget_and_its_sizes():
    runs = design(replace(SMALL, seeds=(2, 1)), TEMPLATE, seq_len=16)
    assert [run.seed for run in runs] == [0, 1] * 3 + [0] * 3
    for run in runs:
        n = parameter_count(run.model).total
        half_a_step = run.batch_size * run.seq_len / 2
        assert abs(run.tokens - float(run.group[1:]) / (6 * n)) <= half_a_step
        assert run.flops == 6 * n * run.tokens
    small, large = ([run.model.width for run in runs if run.group == group] for group in ("C1e10", "C1e11"))
    assert sorted(set(small)) < sorted(set(large)), "a larger budget lies around larger sizes"


@pytest.mark.parametrize(
    ("grid", "more"), [("product", {"tokens": (3200.0, 6400.0)}), ("ladder", {"tokens_per_parameter": 2.0})]
)
def test_other_grids(grid, more):
    runs = design(SweepConfig("other", grid, (8, 16, 24), **BATCH, **more), TEMPLATE, 16)
    assert len(runs) == 3 * len(more.get("tokens", (1,)))
    for run in runs:
        asked = float(run.group[1:]) if grid == "product" else 2 * run.parameters
        assert run.tokens == pytest.approx(asked, abs=16)


def test_the_rule_of_sizes():
    for width in range(8, 400, 2):
        model = shape(SMALL, width, TEMPLATE)
        assert model.heads * model.head_dim == width
        assert model.head_dim % 2 == 0
        assert model.head_dim >= min(width, SMALL.head_dim)
        assert model.layers == max(1, round(width / 32))
        assert 0 <= model.ffn - 8 / 3 * width < 8
    with pytest.raises(ValueError, match="width 9 is odd"):
        shape(SMALL, 9, TEMPLATE)


def test_the_example_says_what_it_runs():
    sweep = load_sweep(EXAMPLE)
    base = load(list(sweep.overrides))
    runs = design(sweep, base.model, base.train.seq_len)
    assert len(sweep.budgets) >= 5
    for budget in {run.group for run in runs}:
        assert len({run.model.width for run in runs if run.group == budget}) >= 6
    assert min(run.parameters for run in runs) < 4e4
    assert max(run.parameters for run in runs) > 3e6
    assert [max(r.seed for r in runs if r.group == g) for g in dict.fromkeys(r.group for r in runs)][:3] == [2, 2, 0]
    for run in (runs[0], runs[-1]):  # what the command line gives is the model of the plan
        config = load(list(run.overrides))
        assert asdict(config.model) == asdict(run.model)
        assert (config.train.steps, config.optimizer.lr, config.seed) == (run.steps, run.lr, run.seed)
        assert config.train.eval_batches * config.train.batch_size == sweep.eval_sequences


def test_learning_rates_and_batches_of_groups():
    sweep = replace(SMALL, lr=(1e-2, 2e-2), batch_size=(2, 4), lr_exponent=1.0)
    for run in design(sweep, TEMPLATE, 16):
        first = run.group == "C1e10"
        assert run.batch_size == (2 if first else 4)
        assert run.lr == pytest.approx((1e-2 if first else 2e-2) * 8 / run.model.width, rel=1e-3)


def test_over_runs_every_combination():
    over = {"optimizer.lr": (1e-3, 2e-3), "model.parametrization": ("standard", "mup"), "model.layers": (2,)}
    runs = design(replace(SMALL, over=over), TEMPLATE, 16)
    plain = {run.label: run for run in design(SMALL, TEMPLATE, 16)}
    assert len(runs) == 4 * len(plain)
    assert len({run.label for run in runs}) == len(runs)
    seen = {(run.lr, run.model.parametrization) for run in runs}
    assert seen == {(1e-3, "standard"), (1e-3, "mup"), (2e-3, "standard"), (2e-3, "mup")}
    assert {run.model.layers for run in runs} == {2}
    for run in runs:
        assert run.settings["optimizer.lr"] == run.lr
        assert run.flops == pytest.approx(float(run.group[1:5]), rel=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("grid: square", "grid=square is not one of isoflop, product, ladder"),
        ("sizes: 9", "sizes=9 at each budget, but there are 4 widths"),
        ("budgets: []", "grid=isoflop needs widths and budgets"),
        ("budgets: [1e11, 1e10]", "must rise"),
        ("seeds: [1, 2, 3]", r"one for each: 2"),
        ("batch_size: 3", "eval_sequences=4 does not divide by batch_size=3"),
        ("width: 3", "unknown width; valid: name"),
        ("lr: fast", "lr: 'fast' should be float"),
        ("seeds: 1.5", "seeds: 1.5 should be int"),
        ("over: {optimizer.lr: 1}", "over: optimizer.lr: 1 should be a list"),
        ("over: {seed: [1, 2]}", "over: seed is decided by the grid"),
        ("sizes: [", "does not parse"),
    ],
)
def test_mistakes_are_told_with_the_choices(tmp_path, change, message):
    keys = ("name: x", "grid: isoflop", "widths: [8, 16, 32, 64]", "budgets: [1e10, 1e11]")
    rest = ("sizes: 3", "eval_sequences: 4", "batch_size: 2")
    lines = [line for line in (*keys, *rest) if line.split(":")[0] != change.split(":")[0]]
    path = tmp_path / "sweep.yaml"
    path.write_text("\n".join([*lines, change]))
    with pytest.raises(ValueError, match=message) as told:
        load_sweep(path)
    assert "\n" not in str(told.value)


def test_a_run_of_a_few_steps_is_refused():
    with pytest.raises(ValueError, match=r"C1e\+?06-w8: .* tokens / \(2 x 16\) = 1 steps, fewer than 20"):
        design(replace(SMALL, budgets=(1e6,)), TEMPLATE, 16)


def test_expected_time_follows_measured_runs():
    run = design(SMALL, TEMPLATE, 16)[0]
    assert expected_seconds(run, []) is None
    flops = run.flops_per_token
    speeds = [Measured(flops / 4, 4000.0, 3.0), Measured(flops * 4, 1000.0, 5.0)]
    assert expected_seconds(run, speeds) == pytest.approx(4 + run.tokens / 2000)  # half way, in logs
    assert expected_seconds(run, speeds[:1]) == pytest.approx(3 + run.tokens / 1000)  # beyond: the same FLOP/s
    assert expected_seconds(run, speeds[1:]) == pytest.approx(5 + run.tokens / 1000)  # below: the same tokens/s
    assert math.isfinite(expected_seconds(run, speeds))
