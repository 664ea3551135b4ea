"""From the command line to one frozen, validated object: Hydra composes YAML and overrides, dataclasses check them.

Each folder's dataclasses stand beside the code that they configure; here they are nested. Nothing slow is imported,
so that a typo is told in a fraction of a second.
"""

import contextlib
import dataclasses
import difflib
import hashlib
import inspect
import itertools
import json
import math
import os
import re
import sys
import types
import typing
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from checkpoint.config import CheckpointConfig
from data.corpus import DataConfig
from data.tokenizer import TokenizerConfig, vocab_size_of
from inference.config import SampleConfig
from model.config import ModelConfig, one_of
from parallel.config import ContextConfig, PipelineConfig
from parallel.mesh import MeshConfig, MicrobatchRequirement, Requirement, StageRequirement, resolve
from parallel.pipeline.schedules import DEFAULT_CHUNKS, Schedule, make, read_csv
from runtime.config import RuntimeConfig
from tracking.sinks import MetricsConfig, WandbConfig
from training import recipes
from training.config import OptimizerConfig, TrainConfig

CONF = Path(__file__).parent / "conf"
SEARCH = "hydra/sweeper=search"
EXPERIMENT = "experiment="
EXPERIMENTS = Path("experiments")
LAUNCHER = ("hydra/launcher=", "hydra.launcher.")


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives and what it is called."""

    dir: str | None = None  # null: runs/<name>-<digest of what decides the result>, so the same command goes on
    name: str = "nano"
    id: str | None = None  # W&B id; null: drawn once and kept in the run's config.yaml


@dataclass(frozen=True)
class Config:
    """A whole run."""

    seed: int = 0
    run: RunConfig = field(default_factory=RunConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    context: ContextConfig = field(default_factory=ContextConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)


# What decides the numbers of a run. Two runs that agree here are one run, on whatever mesh and machine.
IDENTITY = ("seed", "model", "optimizer", "data", "tokenizer", "train")
NOT_IDENTITY = {
    "train": (
        *("steps", "grad_accumulation", "remat", "loss_chunk", "nonfinite"),
        *("log_every", "eval_every", "eval_batches", "patience", "profile"),
    ),
    "model": ("attention_kernel", "scan_layers", "vocab_multiple"),
    "data": ("cache",),
}


# What each process of a run may be given for itself: its place, local folders, and what process 0 alone looks at.
OWN = (
    "runtime.process_id",
    "runtime.coordinator",
    "runtime.processes",
    "runtime.compile_cache",
    "data.cache",
    "run.id",
)
OWN_GROUPS = ("wandb",)


def shared(config: Config) -> dict[str, Any]:
    """The part of a config that all processes of a run must have been given alike, by dotted keys."""
    found = {}
    for group, value in _plain(config).items():
        keyed = {f"{group}.{name}": v for name, v in value.items()} if isinstance(value, dict) else {group: value}
        found |= {key: v for key, v in keyed.items() if key not in OWN and group not in OWN_GROUPS}
    return found


def identity(config: Config | dict) -> dict:
    """The part of a config (or of a run's config.yaml) that decides a run's numbers."""
    values = dataclasses.asdict(config) if isinstance(config, Config) else config

    def part(name: str):
        value, ignored = values.get(name), NOT_IDENTITY.get(name, ())
        return {k: v for k, v in value.items() if k not in ignored} if isinstance(value, dict) else value

    return json.loads(json.dumps({name: part(name) for name in IDENTITY}))


def differences(ours: dict, theirs: dict, prefix: str = "") -> list[str]:
    """The keys, dotted, in which two nested dicts differ, each with both values."""
    found = []
    for key in sorted(ours.keys() | theirs.keys()):
        a, b = ours.get(key), theirs.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key} ({b} there, {a} asked)")
    return found


# ---------------------------------------------------------------------------------------------------------- compose


def load(overrides: list[str]) -> Config:
    """The config of a list of overrides. Raises ValueError with one clear line."""
    _check_keys(overrides)
    _parsed(overrides)  # Hydra itself would not say which one it could not read
    # a key that no YAML mentions is still a field of a dataclass: ++ lets Hydra set either
    forced = [o if o.startswith(("+", "~")) or _is_group(o.split("=")[0]) else f"++{o}" for o in overrides]
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            composed = compose("config", forced)
        values = OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(_one_line(error)) from None
    return finish(build(Config, with_laws(values)))


def with_laws(values: dict) -> dict:
    """The composed values with numbers where they name published laws. Raises ValueError for an unknown law."""
    named = {key: values[key[0]].get(key[1]) for key in recipes.LAWS if isinstance(values.get(key[0]), dict)}
    named = {key: law for key, law in named.items() if isinstance(law, str)}
    for (group, name), law in named.items():
        one_of(f"{group}.{name}", law, ("a number", *recipes.LAWS[group, name]))
        values = values | {group: {k: v for k, v in values[group].items() if k != name}}
    if ("train", "batch_size") in named:  # until it is known, one that divides
        values["train"]["batch_size"] = values["train"].get("grad_accumulation", 1)
    for (group, name), law in named.items():  # each may depend on those before it
        config = finish(build(Config, values))
        number = recipes.number((group, name), law, config.model, config.train, config.optimizer)
        values = values | {group: values[group] | {name: number}}
    return values


def finish(config: Config) -> Config:
    """Fills in what follows from other fields and checks what spans several."""
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"seed={config.seed} must be at least 0 and below 2^32 = {2**32}")
    vocabulary = vocab_size_of(config.tokenizer)
    if config.model.vocab_size is None:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=vocabulary))
    model, train = config.model, config.train
    if model.vocab_size < vocabulary:
        raise ValueError(
            f"model.vocab_size={model.vocab_size} is smaller than the tokenizer's {vocabulary}; "
            f"set model.vocab_size={vocabulary} or null"
        )
    if model.positions == "learned" and model.max_positions < train.seq_len:
        raise ValueError(
            f"train.seq_len={train.seq_len} is longer than model.max_positions={model.max_positions} learned "
            f"positions; set model.max_positions={train.seq_len}"
        )
    if config.run.dir is None:
        digest = hashlib.sha256(json.dumps(identity(config), sort_keys=True).encode()).hexdigest()[:8]
        run = dataclasses.replace(config.run, dir=str(Path("runs") / f"{config.run.name}-{digest}"))
        config = dataclasses.replace(config, run=run)
    return config


def mesh_sizes(config: Config, devices: int) -> dict[str, int]:
    """The size of each mesh axis on `devices` devices. Raises ValueError with the nearest legal meshes."""
    return resolve(config.mesh, devices, requirements(config))


def requirements(config: Config) -> list[Requirement]:
    """What the model and the batch ask of a mesh, by the tables of parallel/sharding.py."""
    from parallel.sharding import requirement

    train = config.train
    microbatch = train.batch_size // train.grad_accumulation
    batch = "train.batch_size" + (f"/{train.grad_accumulation}" if train.grad_accumulation > 1 else "")
    schedule, microbatches, chunks = config.pipeline.schedule, config.pipeline.microbatches, config.pipeline.chunks
    stages = None
    if schedule.endswith(".csv"):
        table = read_csv(schedule)
        stages = table.stages
        microbatches, chunks = microbatches or table.microbatches, chunks or table.chunks
    return [
        *model_requirements(config.model),
        StageRequirement(config.model.layers, chunks or DEFAULT_CHUNKS.get(schedule, 1), stages),
        MicrobatchRequirement(batch, microbatch, microbatches),
        requirement(batch, microbatch, "batch"),
        requirement("train.seq_len", train.seq_len, "residual"),
        *context_requirements(config),
    ]


def context_requirements(config: Config) -> list[Requirement]:
    """What attention asks of a mesh whose context axis splits the sequence."""
    if config.context.style == "ring" and config.model.causal:  # an early and a late chunk for each device
        return [Requirement("train.seq_len", config.train.seq_len, ("context",), factor=2)]
    if config.context.style == "ulysses":
        return [Requirement("model.heads", config.model.heads, ("tensor", "context"))]
    return []


def model_requirements(model: ModelConfig) -> list[Requirement]:
    """What the parameters alone ask of a mesh."""
    from parallel.sharding import requirement

    experts = [requirement("model.experts", model.experts, "experts", stored=True)] if model.experts else []
    return [
        requirement("model.width", model.width, "width", stored=True),
        requirement("model.heads", model.heads, "heads"),
        requirement("model.kv_heads", model.kv_heads, "kv_heads"),
        requirement("model.ffn", model.ffn, "ffn"),
        *experts,
    ]


def pipeline_table(config: Config, sizes: dict[str, int]) -> Schedule | None:
    """The schedule of a mesh with stages, None for one without. Raises ValueError for a table that is not legal."""
    if sizes["pipe"] == 1:
        return None
    asked, train, stages = config.pipeline, config.train, sizes["pipe"]
    if asked.microbatches:
        microbatches = asked.microbatches
    elif asked.schedule.endswith(".csv"):
        microbatches = read_csv(asked.schedule).microbatches
    else:
        rows = train.batch_size // train.grad_accumulation // (sizes["data"] * sizes["fsdp"] * sizes["expert"])
        microbatches = max(m for m in range(1, rows + 1) if rows % m == 0 and m <= 2 * stages)
    return make(asked.schedule, stages, microbatches, asked.chunks)


def to_yaml(config: Config) -> str:
    """The resolved config, as written to a run directory; `load_run` reads it back."""
    return yaml.safe_dump(_plain(config), sort_keys=False)


def load_run(directory: str | Path) -> Config:
    """The config of a run directory. Raises ValueError when there is none or it is damaged."""
    path = Path(directory) / "config.yaml"
    if not path.exists():
        raise ValueError(f"{directory} is no run directory: it has no config.yaml")
    try:
        return build(Config, yaml.safe_load(path.read_text()))
    except (yaml.YAMLError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {_one_line(error)}") from None


def _plain(value):
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    return list(value) if isinstance(value, tuple) else value


# ------------------------------------------------------------------------------------------------------ command line


def command_line(arguments: list[str]) -> list[Config]:
    """The runs that a command line asks for: one, or with -m (--multirun) each of a Hydra sweep.

    The process becomes `python -m scaling search` with hydra/sweeper=search, `scaling run experiments/NAME/sweep.yaml`
    with experiment=NAME, and `scaling launch` with hydra/launcher=...: they start each run as a process of its own.

    Help is printed and ends the process with 0; a mistake is one line on stderr and exit code 2.
    """
    if {"-h", "--help"} & set(arguments):
        print(help_text())
        sys.exit(0)
    try:
        if {"-m", "--multirun"} & set(arguments):
            words = [a for a in arguments if a not in ("-m", "--multirun", SEARCH)]
            if SEARCH in arguments:
                _become("search", *words)
            if any(word.startswith(EXPERIMENT) for word in words):
                _become("run", *_experiment(words))
            if any(word.startswith(LAUNCHER) for word in words):
                _become("launch", *words)
            return multirun(words)
        return [load(arguments)]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        _tell_others(arguments, f"error: {error}")
        sys.exit(2)


def _tell_others(arguments: list[str], line: str) -> None:
    """Ends the other processes too where each was started by hand; a launcher gives all the same command."""
    place = [argument for argument in arguments if argument.startswith("runtime.")]
    if any(argument.startswith("runtime.coordinator=") for argument in place):
        with contextlib.suppress(ValueError):  # its place is the mistake
            runtime = load(place).runtime
            from runtime.start import join_and_leave  # here: it imports JAX

            join_and_leave(runtime, line)


def _become(*words: str) -> None:
    """Replaces this process by a command of `scaling`, which is not imported here."""
    os.execv(sys.executable, [sys.executable, "-m", "scaling", *words])


def _experiment(words: list[str]) -> list[str]:
    """The arguments of `python -m scaling run` for experiment=NAME, on a launcher if one is named."""
    (*_, name) = [word.removeprefix(EXPERIMENT) for word in words if word.startswith(EXPERIMENT)]
    sweep = EXPERIMENTS / name / "sweep.yaml"
    if not sweep.is_file():
        there = ", ".join(sorted(path.parent.name for path in EXPERIMENTS.glob("*/sweep.yaml")))
        raise ValueError(f"experiment={name}: there is no {sweep}; experiments with a sweep: {there}")
    if others := [word for word in words if not word.startswith((EXPERIMENT, *LAUNCHER))]:
        raise ValueError(f"experiment={name} is a whole sweep: {others[0]} belongs into the overrides of {sweep}")
    chosen = [word.partition("=")[2] for word in words if word.startswith(LAUNCHER[0])]
    launcher = ["--launcher", chosen[-1]] if chosen else []
    return [str(sweep), *launcher, *(word for word in words if word.startswith(LAUNCHER[1]))]


def combinations(overrides: list[str]) -> list[list[str]]:
    """Every combination of the comma-separated choices, in Hydra's order."""
    choices = [
        [f"{o.get_key_element()}={value}" for value in o.sweep_string_iterator()]
        if o.is_sweep_override()
        else [o.input_line]
        for o in _parsed(overrides)
    ]
    return [list(combination) for combination in itertools.product(*choices)]


def multirun(overrides: list[str]) -> list[Config]:
    """The config of every combination. Raises ValueError where two of them would be one run."""
    jobs = [load(combination) for combination in combinations(overrides)]
    for a, b in itertools.combinations(jobs, 2):
        if a.run.dir == b.run.dir and identity(a) == identity(b):
            apart = differences(_plain(a), _plain(b))
            raise ValueError(
                f"two jobs of the sweep are one run in {a.run.dir}: {'; '.join(apart)} does not decide its results; "
                "sweep run.dir too"
            )
    return jobs


def _parsed(overrides: list[str]) -> list[Override]:
    parser, parsed = OverridesParser.create(), []
    for override in overrides:
        try:
            parsed.append(parser.parse_override(override))
        except HydraException as error:
            problem = _one_line(error).partition(" See http")[0]
            raise ValueError(f"cannot read {override}: {problem}; put a text in quotes: key='\"...\"'") from None
    return parsed


def help_text() -> str:
    """Every key with its default and its comment."""
    groups = sorted(path.name for path in CONF.iterdir() if path.is_dir())
    presets = [f"  {g}={'|'.join(sorted(p.stem for p in (CONF / g).glob('*.yaml')))}" for g in groups]
    lines = [
        "python train.py [key=value ...]",
        "",
        "presets:",
        *presets,
        "",
        "keys, with the values of the default run:",
    ]
    return "\n".join(lines + _documented(load([])))


def _documented(values, prefix: str = "") -> list[str]:
    source, lines = inspect.getsource(type(values)), []
    for f in fields(values):
        value = getattr(values, f.name)
        if is_dataclass(value):
            lines += _documented(value, f"{prefix}{f.name}.")
            continue
        comment = re.search(rf"^    {f.name}: .*?  # (.*)$", source, re.MULTILINE)
        text = json.dumps(_plain(value)).strip('"')
        lines.append(f"  {prefix}{f.name}={text}" + (f"  # {comment[1]}" if comment else ""))
    return lines


# ------------------------------------------------------------------------------------------------- dict -> dataclass


def build(cls, values: dict, prefix: str = ""):
    """A frozen dataclass from nested dicts; unknown keys and wrong types raise ValueError with the valid choices."""
    hints, known = typing.get_type_hints(cls), [f.name for f in fields(cls)]
    if not isinstance(values, dict):
        raise ValueError(f"{prefix.rstrip('.') or 'config'}={values!r} should be a group of keys: {', '.join(known)}")
    for key in values:
        if key not in known:
            raise ValueError(_unknown(f"{prefix}{key}", [f"{prefix}{name}" for name in known]))
    made = {}
    for key, value in values.items():
        hint = hints[key]
        made[key] = build(hint, value, f"{prefix}{key}.") if is_dataclass(hint) else _typed(value, hint, prefix + key)
    return cls(**made)


def _typed(value, hint, name: str):
    choices = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for choice in choices:
        if choice is type(None) and value is None:
            return None
        if choice is float and isinstance(value, int | float) and not isinstance(value, bool):
            if math.isnan(value):
                raise ValueError(f"{name}={value} is not a number")
            return float(value)
        if choice is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        if choice in (bool, str) and isinstance(value, choice):
            return value
        if choice is str and isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)  # a name that reads like a number
        if typing.get_origin(choice) is tuple and isinstance(value, list | tuple):
            return tuple(_typed(item, typing.get_args(choice)[0], f"{name}[{i}]") for i, item in enumerate(value))
    spelled = " or ".join("null" if c is type(None) else getattr(c, "__name__", str(c)) for c in choices)
    raise ValueError(f"{name}={value!r} is {type(value).__name__}, but should be {spelled}")


def keys(cls=Config, prefix: str = "") -> list[str]:
    """All keys that can be overridden, dotted."""
    hints = typing.get_type_hints(cls)
    return [
        key
        for f in fields(cls)
        for key in (keys(hints[f.name], f"{prefix}{f.name}.") if is_dataclass(hints[f.name]) else [f"{prefix}{f.name}"])
    ]


def _is_group(key: str) -> bool:
    return (CONF / key).is_dir()


def _check_keys(overrides: list[str]) -> None:
    valid = keys()
    for override in overrides:
        key, equals, value = override.partition("=")
        key = key.lstrip("+~")
        if not equals:
            raise ValueError(f"{override} is no override; write key=value, as in train.steps=100")
        if _is_group(key):
            presets = sorted(path.stem for path in (CONF / key).glob("*.yaml"))
            if value not in presets:
                raise ValueError(_unknown(f"{key}={value}", [f"{key}={preset}" for preset in presets]))
        elif key not in valid and not any(name.startswith(f"{key}.") for name in valid):
            group = key.rpartition(".")[0]
            raise ValueError(_unknown(key, [k for k in valid if k.startswith(f"{group}.")] or valid, valid))


def _unknown(key: str, near: list[str], valid: list[str] | None = None) -> str:
    guess = difflib.get_close_matches(key, valid or near, 1)
    hint = f"; did you mean {guess[0]}?" if guess else ""
    names = near if len(near) < 60 else sorted({name.partition(".")[0] for name in near})
    return f"unknown {key}{hint} valid: {', '.join(names)}" if hint else f"unknown {key}; valid: {', '.join(names)}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
