"""Adapters beside a model that answers requests: read from runs and from folders of peft, checked against the model.

A run's adapters fit the weights that they were trained on, in the form that the run kept these in, and no others.
"""

import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from checkpoint.huggingface.config_json import family_of, write_config
from checkpoint.huggingface.families import Family
from config.schema import Config
from finetune.adapter_config import AdapterConfig
from finetune.adapters import peft_format
from finetune.adapters.adaptation import Adaptation, adaptation, is_adapter, matrices
from finetune.adapters.base import in_base_forms
from finetune.adapters.matrices import ADAPTER, Lora, Narrow
from finetune.adapters.switched import Places
from finetune.adapters.tables import Frozen
from inference.adapter_books import Adapter
from inference.engine_options import EngineOptions
from inference.opening import Found, Opened, find_model, read_trained
from model.config import ModelConfig
from model.forms import Path as Names
from model.forms import branch
from model.specs import leaves, map_specs, parameter_specs
from model.transformer import describe
from tracking.run_directory import RunDirectory
from training.trainable import chosen

SWITCHED = "lora, rslora, dora, adalora and qlora"  # what can be served beside others


class AdapterReader:
    """Reads adapters of one model. `check` needs no arrays; `put_base` comes before `read`."""

    def __init__(self, base: Found):
        """Raises ValueError for a model that has adapters of its own."""
        if base.config.adapter.kind not in ("none", "freeze", "qat"):
            raise ValueError(
                f"{base.path} has adapters of its own (adapter.kind={base.config.adapter.kind}): serve its base "
                f"{base.config.weights.path}, with --adapter NAME={base.path}"
            )
        self.base = base
        self._opened: Opened | None = None
        self._first: tuple[str, Adaptation] | None = None  # an adapter that says what the base is kept in

    # ---- before any array is read ----

    def check(self, name: str, path: Path) -> None:
        """Raises ValueError or OSError for what cannot be served beside this model, as far as settings tell."""
        if _is_published(path):
            self._published(path)
            return
        found = _found(path)
        config, base = found.config, self.base
        adapts = adaptation(config.adapter, config.model, config.train.steps)
        _check_kind(name, path, config, adapts)
        if base.forms:
            raise ValueError(f"{base.path} is compressed, and {path} was trained on what it was made of: serve that")
        if config.weights.path is None:
            raise ValueError(f"{path} stands on the weights that its seed draws: there is no base to serve beside it")
        if found.tokenizer.digest != base.tokenizer.digest:
            raise ValueError(f"{path} was trained with another tokenizer than that of {base.path}")
        ours, theirs = (dict(leaves(parameter_specs(model))) for model in (base.config.model, config.model))
        for part, spec in ours.items():
            if part not in theirs or theirs[part].shape != spec.shape:
                raise ValueError(f"{path} is of another model than {base.path}: {'/'.join(part)} differs")
        if self._opened is None and self._first is None:
            self._first = name, adapts
        kept, wanted = self._kept(), _bases(adapts)
        if kept != wanted:
            there = f"{self._first[0]} on one in {_told(kept)}" if self._first else f"{base.path} is in {_told(kept)}"
            raise ValueError(f"{name} was trained on a base in {_told(wanted)}, and {there}: serve them apart")

    def _kept(self) -> dict:
        """The forms of the base."""
        return _bases(self._first[1]) if self._first else dict(self.base.forms)

    # ---- arrays ----

    def put_base(self, opened: Opened) -> Opened:
        """The model in the form that its adapters were trained on. Raises ValueError where its own form is another."""
        adapts = self._first and self._first[1]
        if adapts is not None and adapts.base_forms:
            with jax.set_mesh(opened.mesh):
                params = in_base_forms(adapts, opened.description, opened.params, opened.mesh)
                description = describe(opened.config.model, forms=adapts.base_forms)
            opened = replace(opened, description=description, params=params)
        self._opened = replace(opened, params={})
        return opened

    def read(self, name: str, path: Path) -> Adapter:
        """An adapter on the host. Raises ValueError or OSError as `check`, and for another base's, by its digest."""
        self.check(name, path)
        values, digest = (self._of_peft if _is_published(path) else self._of_run)(path)
        rank = max(own["a"].shape[-1] for own in values.values())
        for matrix, own in values.items():
            if not all(np.isfinite(value).all() for value in own.values()):
                raise ValueError(f"{path}: {matrix} has numbers that are not finite")
        return Adapter(name, path, digest, rank, values, int(time.time()))

    def _of_run(self, path: Path) -> tuple[dict, str]:
        opened, config = self._opened, _found(path).config
        asked = config.weights.digest or opened.digest
        if not opened.digest.startswith(asked):
            raise ValueError(
                f"{path} was trained on other weights (digest {asked[:8]}) than those of {opened.path} "
                f"({opened.digest[:8]}): adapters fit no other base"
            )
        adapts = adaptation(config.adapter, config.model, config.train.steps)
        with jax.set_mesh(opened.mesh):
            description = describe(config.model, forms=adapts.forms)
            read = read_trained(path, config, adapts, description, opened.mesh)
            return values_of(adapts, jax.device_get(read.params)), read.digest

    def _of_peft(self, path: Path) -> tuple[dict, str]:
        published, family, config = self._published(path)
        model = self.base.config.model
        adapts = adaptation(config, model, 1)
        with jax.set_mesh(self._opened.mesh):
            shapes = chosen(describe(model, forms=adapts.forms).shapes, is_adapter)
        begun = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
        params = peft_format.read(published, family, model, adapts.forms, begun)
        files = [(path / name).read_bytes() for name in (peft_format.CONFIG, peft_format.WEIGHTS)]
        return values_of(adapts, params), hashlib.sha256(b"".join(files)).hexdigest()

    def _published(self, path: Path) -> tuple[peft_format.Published, Family, AdapterConfig]:
        published, base = peft_format.open_published(path), self.base
        family = family_at(base.path, base.config, base.reach)
        config = peft_format.adapter_of(published, family, base.config.model)
        if config.kind != "lora":
            raise ValueError(f"{path}: adapters of kind {config.kind} are not switched by request; {SWITCHED} are")
        return published, family, config


def sizes_of(places: Places | None, opened: Opened) -> dict[str, tuple[int, float]]:
    """What places take, as room.check_room counts: ranks of all adapters, and bytes of one beside all its matrices on
    each device.
    """
    if places is None:
        return {}
    one = replace(places, count=1, rank=1, stretched=False)
    specs = [one.specs(weight) for weight in one.matrices(opened.config.model).values()]
    entries = sum(jax.tree.leaves([map_specs(lambda spec: math.prod(spec.shape), each) for each in specs]))
    each = entries * opened.config.model.layers * opened.dtype.itemsize / opened.mesh.size
    return {"max_adapters x max_adapter_rank": (places.count * places.rank, each)}


def places_for(model: ModelConfig, adapters: Sequence[Adapter], options: EngineOptions) -> Places | None:
    """Places for these adapters, and as many more as the options say; None where there is none of either.

    With more places than adapters any matrix may have one. Raises ValueError for options that do not fit.
    """
    count = max(options.max_adapters, len(adapters))
    if not count:
        return None
    if not model.causal:
        raise ValueError("adapters are switched by request where a model generates text; this one is an encoder")
    if options.max_adapters and len(adapters) > options.max_adapters:
        raise ValueError(f"{len(adapters)} adapters are more than max_adapters={options.max_adapters}")
    rank = options.max_adapter_rank or max((adapter.rank for adapter in adapters), default=0)
    if not rank:
        raise ValueError(f"max_adapters={count}: say max_adapter_rank, too, as there is no adapter to take it from")
    specs, more = parameter_specs(model), count > len(adapters)
    dense = [path for path in matrices(model) if not branch(specs, path)["weight"].of_one_layer().batch]
    wanted = {name for adapter in adapters for name in adapter.values}
    paths = tuple(path for path in dense if more or "/".join(path[1:]) in wanted)
    return Places(count, rank, paths, more or any(adapter.stretched for adapter in adapters))


def values_of(adapts: Adaptation, params: dict) -> dict[str, dict[str, np.ndarray]]:
    """What a run trained, as Adapter has it: the scale, and singular values, go into the thin matrices."""
    found, wide = {}, lambda x: np.asarray(x, np.float32)
    for path, form in adapts.forms.items():
        if isinstance(form, Lora):
            adapter = branch(params, path)[ADAPTER]
            a, b = (wide(adapter[name]["weight"]) for name in ("a", "b"))
            if "values" in adapter:
                values = wide(adapter["values"])
                a = a * values.reshape(len(a), *(1,) * (a.ndim - 2), -1)
            own = {"a": a, "b": form.scale * b}
            found["/".join(path[1:])] = own | (
                {"magnitude": wide(adapter["magnitude"])} if "magnitude" in adapter else {}
            )
    return found


def family_at(path: Path, config: Config, reach: int) -> Family:
    """How the published form of a model names its matrices. Raises ValueError for a model that no family can say."""
    for folder in (RunDirectory(path).pretrained, path):
        if (folder / "config.json").is_file():
            return family_of(json.loads((folder / "config.json").read_text()))
    return family_of(write_config(config.model, reach))


def _is_published(path: Path) -> bool:
    return (path / peft_format.CONFIG).is_file()


def _found(path: Path) -> Found:
    if not RunDirectory(path).config.exists():
        raise ValueError(f"{path} is no run directory (no config.yaml), nor a folder of peft ({peft_format.CONFIG})")
    return find_model(path)


def _check_kind(name: str, path: Path, config: Config, adapts: Adaptation | None) -> None:
    """Raises ValueError for what is not added to matrices."""
    kind = config.adapter.kind
    if kind == "none":
        raise ValueError(f"{path} has no adapters: adapter.kind=none")
    specs = parameter_specs(config.model)
    for path_in, form in adapts.forms.items():
        if not isinstance(form, Lora | Frozen) and path_in not in adapts.base_forms:
            raise ValueError(f"{name}: adapters of kind {kind} are not switched by request; {SWITCHED} are")
        if isinstance(form, Lora) and branch(specs, path_in)["weight"].of_one_layer().batch:
            raise ValueError(
                f"{name} has adapters of experts ({'/'.join(path_in[1:])}), which are not switched by request: "
                "serve it merged, by python -m finetune merge"
            )
    if trained := adapts.trained_of(config.model):
        raise ValueError(f"{name} has trained the model's own {trained[0]}: merge it (python -m finetune merge)")


def _bases(adapts: Adaptation) -> dict[Names, object]:
    return dict(adapts.base_forms)


def _told(forms: dict) -> str:
    kinds = {"bfloat16" if isinstance(form, Narrow) else type(form).__name__.lower() for form in forms.values()}
    return " and ".join(sorted(kinds)) or "float"
