"""What a run is: every room's settings nested in one frozen object, and what of it decides a run's numbers.

Each room's dataclass stands beside the code that it configures. Nothing slow is imported here.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from checkpoint.config import CheckpointConfig, WeightsConfig
from data.corpus import DataConfig
from data.prepared import tokenizer_of
from data.tokenizer import TokenizerConfig, vocab_size_of
from evaluation.config import EvaluationConfig
from finetune.adapter_config import AdapterConfig, NoAdapter
from finetune.config import TaskConfig
from inference.config import SampleConfig
from model.config import ModelConfig
from parallel.config import ContextConfig, PipelineConfig
from parallel.mesh import MeshConfig
from runtime.config import RuntimeConfig
from tracking.sinks import MetricsConfig, WandbConfig
from training.config import OptimizerConfig, TrainConfig


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives and what it is called."""

    dir: str | None = None  # null: runs/<name>-<digest of what decides the result>, so the same command goes on
    name: str = "nano"  # the first part of the directory's name, where run.dir does not give one
    id: str | None = None  # W&B id; null: drawn once and kept in the run's config.yaml


@dataclass(frozen=True)
class Config:
    """A whole run: every setting of train.py, each room's dataclass under its group; frozen, checked by `finish`."""

    seed: int = 0  # of the parameters, the order of the data and dropout
    run: RunConfig = field(default_factory=RunConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    context: ContextConfig = field(default_factory=ContextConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    adapter: AdapterConfig = field(default_factory=NoAdapter)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    task: TaskConfig | None = None  # what the model is tuned for, task=PRESET and task.*; null: pretraining on text


# What decides the numbers of a run. Two runs that agree here are one run, on whatever mesh and machine.
IDENTITY = ("seed", "model", "weights", "optimizer", "data", "tokenizer", "train", "task")
NOT_IDENTITY = {
    "train": (
        *("steps", "grad_accumulation", "remat", "loss_chunk", "nonfinite"),
        *("log_every", "eval_every", "eval_batches", "patience", "profile"),
    ),
    "model": ("attention_kernel", "scan_layers", "vocab_multiple", "labels"),
    "data": ("cache", "cache_gb", "replicas"),
    "weights": ("path",),
    "task": ("labels", "metric"),  # labels follow from the data, whose digest is compared
}


# What each process of a run may be given for itself: its place, local folders, and what process 0 alone looks at.
OWN = {
    "runtime": ("process_id", "coordinator", "processes", "compile_cache"),
    "data": ("cache", "cache_gb", "replicas"),
    "run": ("id",),
    "weights": ("path",),
    "wandb": tuple(one.name for one in fields(WandbConfig)),
    "metrics": ("prometheus_port", "prometheus_host"),
}


def shared(config: Config) -> dict[str, Any]:
    """What all processes of a run must have been given alike, by dotted keys."""
    found = {}
    for group, value in dataclasses.asdict(config).items():
        keyed = {f"{group}.{name}": v for name, v in value.items()} if isinstance(value, dict) else {group: value}
        own = {f"{group}.{name}" for name in OWN.get(group, ())}
        found |= {key: v for key, v in keyed.items() if key not in own}
    return found


def identity(config: Config | dict) -> dict:
    """The part of a config (or of a run's config.yaml) that decides a run's numbers."""
    values = dataclasses.asdict(config) if isinstance(config, Config) else config

    def part(name: str):
        value, ignored = values.get(name), NOT_IDENTITY.get(name, ())
        kept = {k: v for k, v in value.items() if k not in ignored} if isinstance(value, dict) else value
        if name == "data" and kept.get("mixture"):  # of each source, too
            sources = kept["mixture"].items()
            kept["mixture"] = {key: {k: v for k, v in one.items() if k not in ignored} for key, one in sources}
        return kept

    if values["train"].get("compute_dtype") == "auto":  # the same run, and directory, on every machine
        values = values | {"train": values["train"] | {"compute_dtype": "float32"}}
    adapted = values.get("adapter", {}).get("kind", "none") != "none"
    names = (*IDENTITY, "adapter") if adapted else IDENTITY  # a run without keeps the directory that it always had
    found = {name: part(name) for name in names}
    if found["task"] is None:  # runs that were pretrained before there were tasks go on
        del found["task"]
    return json.loads(json.dumps(found))


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


def finish(config: Config) -> Config:
    """Fills in what follows from other fields and checks what spans several.

    What follows: vocab_size of the tokenizer, the head of a task, tokenizer of a prepared corpus, and run.dir.
    Raises ValueError for a seed out of range, and for a vocabulary or learned positions that are too few.
    """
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"seed={config.seed} must be at least 0 and below 2^32 = {2**32}")
    vocabulary = None
    for prepared in config.data.prepared:
        tokenizer, vocabulary = tokenizer_of(prepared, config.tokenizer)
        config = dataclasses.replace(config, tokenizer=tokenizer)
    vocabulary = vocabulary or vocab_size_of(config.tokenizer)
    if config.model.vocab_size is None:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=vocabulary))
    if config.task is not None and config.task.head and config.task.head != config.model.head.removesuffix("_gelu"):
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, head=config.task.head))
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
