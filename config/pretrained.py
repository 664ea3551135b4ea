"""model.from=PATH: the model, the tokenizer and the first weights of a run, from what lies at a path."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from checkpoint.digests import MANIFEST
from checkpoint.huggingface.opened import open_pretrained
from config.build import plain
from model.config import ModelConfig
from model.specs import leaves, parameter_specs

FROM = "model.from"


@dataclass(frozen=True)
class Beginning:
    """The model, the tokenizer and the weights that a run begins from, as model.from=PATH names them."""

    path: Path
    model: ModelConfig
    tokenizer: dict[str, Any] | None  # values of the group; None: the weights bring none
    digest: str


def beginning_of(path: str, load_run: Callable, *, allow_pickle: bool = False) -> Beginning:
    """What lies at a path: the directory of a run, a Hugging Face folder, a .gguf file. Raises ValueError."""
    folder = Path(path).expanduser()
    if (folder / "config.yaml").exists():
        return _of_run(folder, load_run(folder))
    opened = open_pretrained(path, allow_pickle=allow_pickle)
    tokenizer = None if opened.tokenizer is None else {"kind": "file", "path": os.path.abspath(opened.tokenizer)}
    return Beginning(opened.path, opened.config, tokenizer, opened.fingerprint())


def _of_run(folder: Path, config) -> Beginning:
    if (folder / "compressed").exists():
        raise ValueError(f"{FROM}={folder} is compressed, and codes are not trained: give what it was made of")
    checkpoints = Path(config.checkpoint.dir or folder / "checkpoints")
    manifests = sorted(checkpoints.glob(f"*[0-9]/{MANIFEST}"))
    if not manifests:
        raise ValueError(f"{FROM}={folder}: {checkpoints} holds no checkpoint")
    tokenizer = {"kind": config.tokenizer.kind}
    if tokenizer["kind"] != "bytes":
        tokenizer = {"kind": "file", "path": os.path.abspath(folder / "tokenizer.json")}
    return Beginning(folder, config.model, tokenizer, hashlib.sha256(manifests[-1].read_bytes()).hexdigest()[:32])


def with_weights(values: dict, beginning: Beginning, overrides: list[str]) -> dict:
    """The composed values of a run that begins from weights; what the user set of model.* or tokenizer stays.

    Raises ValueError for a preset beside the weights, which are a model already.
    """
    named = [override.partition("=")[0].lstrip("+~") for override in overrides]
    if "model" in named:
        preset = next(override for override in overrides if override.startswith("model="))
        raise ValueError(f"{preset} and {FROM}={beginning.path}: the weights are of a model already; leave one out")
    model = plain(beginning.model)
    for key in named:
        if key.startswith("model."):
            *groups, last = key.split(".")[1:]
            ours, theirs = values["model"], model
            for group in groups:
                ours, theirs = ours[group], theirs.setdefault(group, {})
            theirs[last] = ours[last]
    values = values | {"model": model}
    own = any(key.partition(".")[0] == "tokenizer" for key in named)
    if beginning.tokenizer is not None and own and values["tokenizer"]["kind"] != beginning.tokenizer["kind"]:
        kind = values["tokenizer"]["kind"]
        raise ValueError(f"tokenizer.kind={kind}: the weights of {beginning.path} know the tokens of their tokenizer")
    if beginning.tokenizer is not None and not own:
        values["tokenizer"] = beginning.tokenizer
    longest = model["max_positions"] if model["positions"] == "learned" else values["train"]["seq_len"]
    if "train.seq_len" not in named and longest < values["train"]["seq_len"]:
        values["train"] = {**values["train"], "seq_len": longest}
    if "run.name" not in named:
        values["run"] = {**values["run"], "name": beginning.path.stem}
    return values | {"weights": {"path": os.path.abspath(beginning.path), "digest": beginning.digest}}


def check_shapes(model: ModelConfig, beginning: Beginning, *, new_head: bool = False) -> None:
    """Raises ValueError where settings beside the weights ask for parameters of other shapes, or for others.

    new_head: the head may be another one.
    """
    if new_head:
        model = replace(model, head=beginning.model.head, labels=beginning.model.labels)
    shapes = lambda config: {path: spec.shape for path, spec in leaves(parameter_specs(config))}
    if shapes(model) != shapes(beginning.model):
        fields = ModelConfig.__dataclass_fields__
        name = next(name for name in fields if getattr(model, name) != getattr(beginning.model, name))
        theirs = getattr(beginning.model, name)
        raise ValueError(f"model.{name}={getattr(model, name)}: the weights of {beginning.path} have {theirs}")
