"""What a sweep runs: sizes by one stated rule, tokens by a compute budget, and the bill before anything is paid.

Conventions, here and in every table and fit: N counts all parameters, a tied table once, without padding; D is tokens
of training; C = 6 N D. With tied tables each parameter of a matrix multiplies each token, so that 6 N D is what the
model really computes, attention scores aside. `model_flops` counts these too, and is what speed is judged by.

The rule of sizes: the dial is the width. layers = width / aspect, rounded, at least 1; heads = the largest number up
to width / head_dim that cuts the width into even parts; ffn = ffn_ratio * width, up to a multiple of 8.
"""

import itertools
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import yaml

from model.config import ModelConfig, one_of
from model.counts import flops_per_token, parameter_count
from scaling.fit.laws import FLOPS_PER_TOKEN_AND_PARAMETER

LETTERS = {"isoflop": "C", "product": "D", "ladder": "DperN"}  # what the name of a group begins with
GRIDS = tuple(LETTERS)
DECIDED = ("model.width", "train.steps", "train.batch_size", "train.seq_len", "seed", "run.dir")
PRECISION = "train.compute_dtype"  # float32 unless a sweep says so: its runs are compared across machines
LEAST_STEPS = 20  # fewer tell of the warm-up only


@dataclass(frozen=True)
class SweepConfig:
    """A sweep.yaml. A group is a budget (isoflop), a number of tokens (product) or all of a ladder.

    Raises ValueError for values out of range, or that do not fit the grid.
    """

    name: str  # runs go to runs/<name>
    grid: str  # isoflop (sizes at each budget) | product (widths x tokens) | ladder (widths, D / N the same)
    widths: tuple[int, ...]  # the dial, in rising order
    budgets: tuple[float, ...] = ()  # isoflop: training FLOPs C = 6 N D, in rising order
    sizes: int = 6  # isoflop: neighbours of `widths` that each budget has
    tokens: tuple[float, ...] = ()  # product: D, in rising order
    tokens_per_parameter: float = 20.0  # isoflop: D / N that the sizes of a budget lie around; ladder: of all runs
    aspect: int = 32  # width / layers
    head_dim: int = 32  # width / heads, about
    ffn_ratio: float = 8 / 3  # ffn / width, about
    seeds: tuple[int, ...] = (1,)  # how many, from 0 on: one number for all groups, or one for each
    batch_size: tuple[int, ...] = (16,)  # sequences a step: one for all groups, or one for each
    lr: tuple[float, ...] = (2e-3,)  # of the narrowest width: one for all groups, or one for each
    lr_exponent: float = 0.0  # lr falls as width to the power of minus this; 0 where lr transfers over widths
    warmup: float = 0.1  # share of the steps
    evaluations: int = 1  # of a run, evenly spaced; the last is at its end
    eval_sequences: int = 512  # held-out sequences, the same ones for every run
    over: dict[str, tuple] = field(default_factory=dict)  # keys of train.py: each run once for every combination
    overrides: tuple[str, ...] = ()  # of train.py, for every run

    def __post_init__(self):
        one_of("grid", self.grid, GRIDS)
        if not self.name or "/" in self.name:
            raise ValueError(f"name={self.name!r} must be the name of a folder")
        needed = {"isoflop": "budgets", "product": "tokens", "ladder": "tokens_per_parameter"}[self.grid]
        for name in dict.fromkeys(("widths", needed, "seeds", "batch_size", "lr")):
            values = getattr(self, name)
            if not values or not all(0 < x < math.inf for x in np.atleast_1d(values)):
                raise ValueError(f"{name}={values} must be above 0; grid={self.grid} needs widths and {needed}")
        for name in ("widths", "budgets", "tokens"):
            values = getattr(self, name)
            if any(b <= a for a, b in itertools.pairwise(values)):
                raise ValueError(f"{name}={list(values)} must rise")
        for name in ("aspect", "head_dim", "ffn_ratio", "sizes", "evaluations", "eval_sequences"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup={self.warmup} must be a share of the steps, from 0 to below 1")
        if self.grid == "isoflop" and self.sizes > len(self.widths):
            raise ValueError(f"sizes={self.sizes} at each budget, but there are {len(self.widths)} widths")
        for name in ("seeds", "batch_size", "lr"):
            if len(getattr(self, name)) not in (1, groups := len(self.groups())):
                raise ValueError(f"{name}={list(getattr(self, name))} must be one for all or one for each: {groups}")
        for key, values in self.over.items():
            if key in DECIDED:
                raise ValueError(f"over: {key} is decided by the grid; none of {', '.join(DECIDED)} can stand here")
            if not isinstance(values, tuple) or not values or len(set(values)) < len(values):
                raise ValueError(f"over: {key}: {values} should be a list of different values")
        for batch in self.batch_size:
            if self.eval_sequences % batch:
                raise ValueError(
                    f"eval_sequences={self.eval_sequences} does not divide by batch_size={batch}: runs of different "
                    "batches would be judged by different texts"
                )

    def groups(self) -> tuple[float, ...]:
        """The budgets, numbers of tokens, or the ladder's one D / N."""
        return {"isoflop": self.budgets, "product": self.tokens, "ladder": (self.tokens_per_parameter,)}[self.grid]

    def of_group(self, name: str, group: int):
        """The value of seeds, batch_size or lr for a group, by its place."""
        values = getattr(self, name)
        return values[group] if len(values) > 1 else values[0]


@dataclass(frozen=True)
class Run:
    """One run of a sweep: what decides it, and what follows from that."""

    label: str  # group and width; runs that differ by their seed share it
    group: str  # as in the column `group` of results.jsonl
    seed: int
    model: ModelConfig
    batch_size: int  # sequences
    seq_len: int
    steps: int
    lr: float
    base: tuple[str, ...]  # overrides of train.py that all runs share
    settings: dict[str, int | float | str]  # keys of the config that this run sets besides

    @property
    def overrides(self) -> tuple[str, ...]:
        """The overrides of train.py for this run; run.dir comes besides, from `scaling.sweep.run.place`."""
        return (*self.base, *(f"{key}={value}" for key, value in self.settings.items()))

    @property
    def tokens(self) -> int:
        """D: whole steps, so that it may be off from what was asked by half a step."""
        return self.steps * self.batch_size * self.seq_len

    @property
    def parameters(self) -> int:
        """N: all parameters, embeddings included."""
        return parameter_count(self.model).total

    @property
    def flops(self) -> float:
        """C = 6 N D, the training FLOPs by which budgets are given."""
        return float(FLOPS_PER_TOKEN_AND_PARAMETER * self.parameters * self.tokens)

    @property
    def flops_per_token(self) -> float:
        """With attention scores: what the machine works through."""
        return flops_per_token(self.model, self.seq_len)


def load_sweep(path: str | Path) -> SweepConfig:
    """Reads a sweep.yaml. Raises ValueError for unknown or missing keys and values out of range."""
    try:
        values = yaml.safe_load(Path(path).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} does not parse: {' '.join(str(error).split())}") from None
    fields = SweepConfig.__dataclass_fields__
    if not isinstance(values, dict):
        raise ValueError(f"{path} should hold keys: {', '.join(fields)}")
    if unknown := [key for key in values if key not in fields]:
        raise ValueError(f"{path}: unknown {unknown[0]}; valid: {', '.join(fields)}")
    if missing := [key for key in ("name", "grid", "widths") if key not in values]:
        raise ValueError(f"{path} has no {missing[0]}")
    try:
        sweep = SweepConfig(**{key: _typed(key, value, str(fields[key].type)) for key, value in values.items()})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if any(override.startswith(f"{PRECISION}=") for override in sweep.overrides):
        return sweep
    return replace(sweep, overrides=(*sweep.overrides, f"{PRECISION}=float32"))


def _typed(key: str, value, hint: str):
    """The value as the field's type; one value stands for a tuple of one. YAML reads 1e12, without a point, as text."""
    if key == "over":
        if not isinstance(value, dict):
            raise ValueError(f"over: {value!r} should hold keys of train.py, each with a list of values")
        return {name: tuple(values) if isinstance(values, list) else values for name, values in value.items()}
    kind = next(kind for kind in (int, float, str) if kind.__name__ in hint.replace("tuple", ""))
    taken = (int, float, str) if kind is float else kind

    def one(item):
        try:
            if isinstance(item, bool) or not isinstance(item, taken):
                raise ValueError
            return kind(item)
        except ValueError:
            raise ValueError(f"{key}: {item!r} should be {kind.__name__}") from None

    if not hint.startswith("tuple"):
        return one(value)
    return tuple(one(item) for item in (value if isinstance(value, list) else [value]))


def shape(sweep: SweepConfig, width: int, template: ModelConfig) -> ModelConfig:
    """The model of a width, by the rule in this file's head; all that is no size is the template's.

    Raises ValueError for a width without a legal number of heads.
    """
    heads = next((h for h in range(max(1, width // sweep.head_dim), 0, -1) if width % (2 * h) == 0), None)
    if heads is None:
        raise ValueError(f"width {width} is odd: no number of heads cuts it into even parts")
    sizes = {"layers": max(1, round(width / sweep.aspect)), "width": width, "heads": heads, "kv_heads": heads}
    sizes |= {"head_dim": width // heads, "ffn": 8 * math.ceil(sweep.ffn_ratio * width / 8 - 1e-9)}
    return replace(template, **sizes)


def design(sweep: SweepConfig, template: ModelConfig, seq_len: int) -> list[Run]:
    """All runs, group by group, widths rising, then seeds. `template`: the model that sweep.overrides give.

    Raises ValueError for a run of fewer than LEAST_STEPS steps.
    """
    runs = []
    for (place, value), chosen in itertools.product(enumerate(sweep.groups()), _combinations(sweep.over)):
        models = [_with(shape(sweep, width, template), chosen) for width in sweep.widths]
        name = "".join(f"-{_short(key, one)}" for key, one in chosen.items() if len(sweep.over[key]) > 1)
        group = f"{LETTERS[sweep.grid]}{value:.4g}".replace("e+", "e") + name
        for model in _around(models, value, sweep) if sweep.grid == "isoflop" else models:
            n = parameter_count(model).total
            tokens = {"isoflop": value / (FLOPS_PER_TOKEN_AND_PARAMETER * n), "product": value, "ladder": value * n}
            for seed in range(sweep.of_group("seeds", place)):
                runs.append(_run(sweep, model, tokens[sweep.grid], place, group, seed, seq_len, chosen))
    return runs


def _combinations(over: dict[str, tuple]) -> list[dict]:
    return [dict(zip(over, values, strict=True)) for values in itertools.product(*over.values())]


def _with(model: ModelConfig, chosen: dict) -> ModelConfig:
    """The model with the chosen keys of the config's group `model`, which go before the rule of sizes."""
    own = {key.removeprefix("model."): value for key, value in chosen.items() if key.startswith("model.")}
    if unknown := own.keys() - ModelConfig.__dataclass_fields__.keys():
        raise ValueError(f"over: unknown model.{min(unknown)}; valid: {', '.join(ModelConfig.__dataclass_fields__)}")
    return replace(model, **own)


def _short(key: str, value) -> str:
    """A key and its value in the name of a folder."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return f"{key.rpartition('.')[2]}{value:g}" if number else re.sub(r"[^\w.]+", "_", str(value))


def _around(models: list[ModelConfig], budget: float, sweep: SweepConfig) -> list[ModelConfig]:
    """The neighbouring sizes whose mean log N is nearest to that of a run with tokens_per_parameter."""
    goal = math.log(budget / FLOPS_PER_TOKEN_AND_PARAMETER / sweep.tokens_per_parameter) / 2
    logs = np.log([parameter_count(model).total for model in models])
    means = np.convolve(logs, np.full(sweep.sizes, 1 / sweep.sizes), "valid")
    first = int(np.abs(means - goal).argmin())
    return models[first : first + sweep.sizes]


def _run(
    sweep: SweepConfig, model: ModelConfig, tokens: float, place: int, group: str, seed: int, seq_len: int, chosen: dict
) -> Run:
    batch = sweep.of_group("batch_size", place)
    steps, label = round(tokens / (batch * seq_len)), f"{group}-w{model.width}"
    if steps < LEAST_STEPS:
        raise ValueError(
            f"{label}: {tokens:.3g} tokens / ({batch} x {seq_len}) = {steps} steps, fewer than {LEAST_STEPS}; "
            "lower batch_size or widths, or raise the budget"
        )
    lr = float(f"{sweep.of_group('lr', place) * (model.width / sweep.widths[0]) ** -sweep.lr_exponent:.4g}")
    sizes = ("layers", "width", "heads", "kv_heads", "head_dim", "ffn")
    settings = {
        **{f"model.{name}": getattr(model, name) for name in sizes},
        "train.steps": steps,
        "train.batch_size": batch,
        "train.eval_batches": sweep.eval_sequences // batch,
        "train.eval_every": math.ceil(steps / sweep.evaluations),
        "optimizer.lr": lr,
        "optimizer.warmup_steps": round(sweep.warmup * steps),
        "wandb.group": sweep.name,
        "wandb.name": f"{label}-s{seed}",
        "seed": seed,
        **chosen,
    }
    lr = settings["optimizer.lr"]
    return Run(label, group, seed, model, batch, seq_len, steps, lr, sweep.overrides, settings)


# ---------------------------------------------------------------------------------------------------------------- bill


@dataclass(frozen=True)
class Measured:
    """How fast a run on this machine was."""

    flops_per_token: float
    tokens_per_s: float  # within its steps
    overhead_s: float  # what the process took besides: imports, compiling, evaluation, saving


def expected_seconds(run: Run, measured: Iterable[Measured]) -> float | None:
    """How long a run takes, from runs measured on this machine; None without any.

    Speed is interpolated over the FLOPs of a token, both in logs. Beyond the largest model measured, FLOP/s stay what
    they were; below the smallest, tokens/s do.
    """
    by_flops: dict[float, list[Measured]] = {}
    for one in measured:
        by_flops.setdefault(one.flops_per_token, []).append(one)
    if not by_flops:
        return None
    flops = np.array(sorted(by_flops))
    speeds = np.array([np.median([one.tokens_per_s for one in by_flops[f]]) for f in flops])
    overhead = np.median([one.overhead_s for several in by_flops.values() for one in several])
    speed = np.exp(np.interp(math.log(run.flops_per_token), np.log(flops), np.log(speeds)))
    speed *= min(1.0, flops[-1] / run.flops_per_token)
    return float(overhead + run.tokens / speed)
