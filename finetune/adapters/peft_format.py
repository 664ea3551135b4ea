"""Adapters in the files of the package peft: adapter_config.json and adapter_model.safetensors, in and out.

LoRA, rsLoRA and DoRA have the same parameters there, transposed; AdaLoRA goes out as the LoRA that it has become; IA3
has its factors. Format: peft's documentation, "Checkpoint format" (developer guides), and what version 0.21 writes.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from checkpoint.huggingface.families import Family
from checkpoint.huggingface.places import Place, place_of
from checkpoint.huggingface.safetensors import Safetensors, write_header
from finetune.adapter_config import Ia3Config, LoraConfig
from finetune.adapters.adaptation import matrices
from finetune.adapters.matrices import ADAPTER, Lora, Scaled, dims_of
from finetune.adapters.parts import Bottleneck, Prefix
from model.config import ModelConfig
from model.forms import Forms, branch, replaced
from model.forms import Path as Names
from model.specs import ParameterSpec, parameter_specs

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# What an adapter_config.json may ask for that changes the base or what is computed with it, and is refused.
UNKNOWN = ("bias", "modules_to_save", "layer_replication", "trainable_token_indices", "target_parameters", "lora_bias")
UNKNOWN += ("use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config")
# Beginnings of an adapter that leave the base as it is. Others (pissa, olora, corda, loftq, lora_ga) take what the
# adapter begins as from the base's weights, each time that peft opens it.
BEGINNINGS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True)
class Matrix:
    """A matrix of ours, and the module that it is there."""

    path: Names
    weight: ParameterSpec  # of one layer
    place: Place
    layers: int

    def modules(self) -> list[str]:
        """Its names, layer by layer."""
        return [self.place.of(layer, 0).removesuffix(".weight") for layer in range(self.layers)]


def found_in(family: Family, model: ModelConfig, paths: list[Names]) -> list[Matrix]:
    """These matrices of a model. Raises ValueError for experts, which peft has no modules for."""
    found, specs = [], parameter_specs(model)
    for path in paths:
        place, weight = place_of(family, model, (*path, "weight")), branch(specs, path)["weight"].of_one_layer()
        if weight.batch:
            raise ValueError(f"{'/'.join(path)}: peft has no modules for experts; choose adapter.targets without them")
        found.append(Matrix(path, weight, place, model.layers))
    return found


# ----------------------------------------------------------------------------------------------------------------- out


def export(folder: Path, family: Family, model: ModelConfig, forms: Forms, params: dict, about: dict) -> int:
    """Fills a folder that is there; returns the bytes of its tensors. `params` hold adapters, on the host, and `about`
    what else the config shall say.

    Raises ValueError for adapters that peft has no format for.
    """
    paths = [path for path, form in forms.items() if isinstance(form, Lora | Scaled)]
    if others := [form for form in forms.values() if isinstance(form, Bottleneck | Prefix)]:
        raise ValueError(f"peft has no format for {type(others[0]).__name__.lower()} adapters; it has lora and ia3")
    tensors, config = {}, {}
    for matrix in found_in(family, model, paths):
        if matrix.place.rows or matrix.place.heads:
            raise ValueError(
                f"{matrix.modules()[0]} holds several matrices of ours, and peft has one adapter for all of it: "
                "merge instead (python -m finetune merge)"
            )
        form, adapter = forms[matrix.path], branch(params, matrix.path)[ADAPTER]
        config |= _config(form) | {"task_type": "CAUSAL_LM" if model.causal else None}
        for layer, module in enumerate(matrix.modules()):
            its = lambda leaf, layer=layer: np.asarray(leaf[layer], np.float32)
            write = _lora_out if isinstance(form, Lora) else _factors_out
            tensors |= {f"{PREFIX}{module}.{name}": value for name, value in write(form, matrix, adapter, its)}
    last = lambda paths: sorted({m.rpartition(".")[2] for one in found_in(family, model, paths) for m in one.modules()})
    config |= {"target_modules": last(paths), **about}
    if config["peft_type"] == "IA3":
        config["feedforward_modules"] = last([path for path in paths if forms[path].inputs])
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    with (folder / WEIGHTS).open("wb") as file:
        write_header(file, {name: (value.dtype, value.shape) for name, value in sorted(tensors.items())})
        for _, value in sorted(tensors.items()):
            file.write(np.ascontiguousarray(value).tobytes())
    return sum(value.nbytes for value in tensors.values())


def _config(form: Lora | Scaled) -> dict[str, Any]:
    shared = {"inference_mode": True, "fan_in_fan_out": False, "modules_to_save": None}
    if isinstance(form, Scaled):
        return shared | {"peft_type": "IA3", "init_ia3_weights": True}
    lora = {"peft_type": "LORA", "r": form.rank, "lora_alpha": form.scale * form.rank, "use_rslora": False}
    return shared | lora | {"use_dora": form.magnitude, "lora_dropout": 0.0, "bias": "none", "init_lora_weights": True}


def _lora_out(form: Lora, matrix: Matrix, adapter: dict, its: Callable) -> Iterator[tuple[str, np.ndarray]]:
    rank, (inputs, _) = form.rank, dims_of(matrix.weight)
    a, b = its(adapter["a"]["weight"]), its(adapter["b"]["weight"])
    assert a.ndim == inputs + 1
    if "values" in adapter:
        a = a * its(adapter["values"])
    yield "lora_A.weight", a.reshape(-1, rank).T
    yield "lora_B.weight", _out_first(matrix, b, rank)
    if "magnitude" in adapter:
        yield "lora_magnitude_vector", _out_first(matrix, its(adapter["magnitude"])[None], 1)[:, 0]


def _out_first(matrix: Matrix, value: np.ndarray, rank: int) -> np.ndarray:
    """(rank, *out) as theirs, (out, rank)."""
    whole = np.zeros((value.size // rank, rank), np.float32)
    _outputs_place(matrix).put(whole, value, _thin(matrix, rank))
    return whole


def _factors_out(form: Scaled, matrix: Matrix, adapter: dict, its: Callable) -> Iterator[tuple[str, np.ndarray]]:
    factors = its(adapter["factors"])
    yield "ia3_l", factors.reshape(1, -1) if form.inputs else _out_first(matrix, factors[None], 1)


def _thin(matrix: Matrix, rank: int) -> ParameterSpec:
    """Of a matrix (rank, *out)."""
    weight, inputs = matrix.weight, len(matrix.weight.contracted)
    return replace(weight, shape=(rank, *weight.shape[inputs:]), axes=("rank", *weight.axes[inputs:]), contracted=(0,))


def _outputs_place(matrix: Matrix) -> Place:
    return replace(matrix.place, out_first=True)


# ------------------------------------------------------------------------------------------------------------------ in


@dataclass(frozen=True)
class Published:
    """An adapter in peft's files."""

    folder: Path
    config: dict[str, Any]
    tensors: Safetensors

    def find(self, module: str, *endings: str) -> np.ndarray | None:
        """A tensor of a module, by the first of these endings that there is."""
        for ending in endings:
            if f"{PREFIX}{module}.{ending}" in self.tensors.names():
                return np.asarray(self.tensors.tensor(f"{PREFIX}{module}.{ending}"), np.float32)
        return None


def open_published(folder: Path) -> Published:
    """The adapter of a folder. Raises ValueError in one line for what is missing or is not known here."""
    try:
        config = json.loads((folder / CONFIG).read_text())
        kind = config["peft_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / CONFIG} is no adapter's config ({type(error).__name__})") from None
    if kind not in ("LORA", "IA3"):
        raise ValueError(f"{folder}: peft_type={kind} is not known here; LORA and IA3 are")
    for name in UNKNOWN:
        if config.get(name) not in (None, False, "none", [], {}):
            raise ValueError(f"{folder}: {name}={config[name]!r} is not known here")
    if (begun := config.get("init_lora_weights")) not in BEGINNINGS:
        raise ValueError(
            f"{folder}: init_lora_weights={begun!r} changes the base: convert the adapter to an ordinary one (peft: "
            "save_pretrained with path_initial_model_for_weight_conversion)"
        )
    if not (folder / WEIGHTS).is_file():
        raise ValueError(f"{folder} has no {WEIGHTS}; pickled adapters are not read")
    return Published(folder, config, Safetensors(folder / WEIGHTS))


def adapter_of(published: Published, family: Family, model: ModelConfig) -> LoraConfig | Ia3Config:
    """The settings of a run with this adapter. Raises ValueError where it has no place in the model."""
    there = [matrix for matrix in found_in(family, model, _dense(model)) if _has(published, matrix)]
    known = {f"{PREFIX}{module}" for matrix in there for module in matrix.modules()}
    for name in sorted(published.tensors.names()):
        if re.sub(r"\.(lora_(A|B|magnitude_vector)(\.weight)?|ia3_l)$", "", name) not in known:
            raise ValueError(f"{published.folder}: {name} has no place in a model of {family.model_type}")
    names = tuple("/".join(matrix.path[1:]) for matrix in there)
    if not names:
        raise ValueError(f"{published.folder}: {WEIGHTS} has no adapter of a matrix")
    if published.config["peft_type"] == "IA3":
        return Ia3Config(targets=names)
    rank = max(published.find(module, "lora_A.weight").shape[0] for module in _modules(published, there))
    alpha, dora = float(published.config.get("lora_alpha", rank)), bool(published.config.get("use_dora"))
    return LoraConfig(rank=rank, alpha=alpha, dora=dora, targets=names)


def settings(published: Published, family: Family, model: ModelConfig) -> list[str]:
    """The overrides of such a run. Raises as `adapter_of`."""
    config = adapter_of(published, family, model)
    targets = f"adapter.targets=[{','.join(config.targets)}]"
    if isinstance(config, Ia3Config):
        return ["adapter=ia3", targets]
    numbers = [f"adapter.{name}={getattr(config, name)}" for name in ("rank", "alpha")]
    return ["adapter=lora", *numbers, f"adapter.dora={str(config.dora).lower()}", targets]


def _dense(model: ModelConfig) -> list[Names]:
    specs = parameter_specs(model)
    return [path for path in matrices(model) if not branch(specs, path)["weight"].of_one_layer().batch]


def _modules(published: Published, there: list[Matrix]) -> Iterator[str]:
    for matrix in there:
        yield from (m for m in matrix.modules() if published.find(m, "lora_A.weight", "ia3_l") is not None)


def _has(published: Published, matrix: Matrix) -> bool:
    return any(published.find(module, "lora_A.weight", "ia3_l") is not None for module in matrix.modules())


def read(published: Published, family: Family, model: ModelConfig, forms: Forms, params: dict) -> dict:
    """The adapters in the places of ours: `params` is a nested dict of arrays like them, on the host, as they begin.

    Layers without an adapter keep the magnitude that they begin with. Raises ValueError for shapes that do not fit.
    """
    paths = [path for path, form in forms.items() if isinstance(form, Lora | Scaled)]
    for matrix in found_in(family, model, paths):
        form, adapter = forms[matrix.path], branch(params, matrix.path)[ADAPTER]
        adapter = _copied(adapter)
        for layer, module in enumerate(matrix.modules()):
            put = _lora_in if isinstance(form, Lora) else _factors_in
            try:
                put(published, form, matrix, module, adapter, layer)
            except ValueError as error:
                raise ValueError(f"{published.folder}: {module} does not fit: {error}") from None
        params = replaced(params, (*matrix.path, ADAPTER), adapter)
    return params


def _copied(tree: dict) -> dict:
    return {name: _copied(leaf) if isinstance(leaf, dict) else np.array(leaf) for name, leaf in tree.items()}


def _lora_in(published: Published, form: Lora, matrix: Matrix, module: str, adapter: dict, layer: int) -> None:
    a, b = published.find(module, "lora_A.weight"), published.find(module, "lora_B.weight")
    if a is None or b is None:  # this layer has none
        adapter["b"]["weight"][layer] = 0
        return
    rank = a.shape[0]
    scale = _scale(published.config, module, rank) / form.scale
    inputs = adapter["a"]["weight"].shape[1:-1]
    adapter["a"]["weight"][layer] = 0
    adapter["a"]["weight"][layer][..., :rank] = a.T.reshape(*inputs, rank)
    adapter["b"]["weight"][layer] = 0
    adapter["b"]["weight"][layer][:rank] = scale * _outputs_place(matrix).ours(b, _thin(matrix, rank))
    if form.magnitude:
        magnitude = published.find(module, "lora_magnitude_vector", "lora_magnitude_vector.weight")
        if magnitude is None:
            raise ValueError("its lora_magnitude_vector is missing")
        adapter["magnitude"][layer] = _outputs_place(matrix).ours(magnitude[:, None], _thin(matrix, 1))[0]


def _scale(config: dict[str, Any], module: str, rank: int) -> float:
    """What the product is multiplied by; patterns are regular expressions of a name's end, and the first one counts."""
    alpha = float(config.get("lora_alpha", rank))
    for pattern, own in (config.get("alpha_pattern") or {}).items():
        try:
            fits = re.match(rf"(.*\.)?({pattern})$", module)
        except re.error as error:
            raise ValueError(f"alpha_pattern {pattern!r} is no regular expression: {error}") from None
        if fits:
            alpha = float(own)
            break
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _factors_in(published: Published, form: Scaled, matrix: Matrix, module: str, adapter: dict, layer: int) -> None:
    factors = published.find(module, "ia3_l")
    if factors is None:
        adapter["factors"][layer] = 1
        return
    shape = adapter["factors"].shape[1:]
    inner = factors.shape[0] == 1 and factors.shape[1] > 1
    if inner != form.inputs:
        raise ValueError("its factors are of inputs where ours are of outputs, or the other way round")
    value = factors.reshape(shape) if inner else _outputs_place(matrix).ours(factors, _thin(matrix, 1))[0]
    adapter["factors"][layer] = value
