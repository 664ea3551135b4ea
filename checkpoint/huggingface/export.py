"""Parameters of ours as a Hugging Face folder: sharded safetensors, config, tokenizer, generation config."""

import json
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from checkpoint.huggingface.config_json import family_of
from checkpoint.huggingface.families import Family
from checkpoint.huggingface.places import Place, place_of
from checkpoint.huggingface.safetensors import DTYPES, INDEX, write_header
from model.config import ModelConfig
from model.specs import LAYERS, ParameterSpec, leaves, parameter_specs

SHARD_BYTES = 5_000_000_000  # of one file at most, as transformers has it
Piece = tuple[tuple[str, ...], ParameterSpec, Place, int, int]  # path, spec of a layer, place, layer, expert


def export(
    folder: Path,
    config: ModelConfig,
    json_config: dict[str, Any],
    params: dict,
    dtype: str,
    texts: dict[str, str],
) -> int:
    """Writes the folder, whole or not at all; returns the bytes of its tensors.

    `json_config` is its config.json, `params` are in the model's order of layers, on whatever mesh; `texts` are further
    files by name. Raises ValueError if the folder is there already.
    """
    if folder.exists():
        raise ValueError(f"{folder} is there already: choose another folder")
    family, stored = family_of(json_config), np.dtype(DTYPES[dtype])
    tensors = pieces_of(family, config)
    shapes = {name: pieces[0][2].shape(pieces[0][1]) for name, pieces in tensors.items()}
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        files = _files(shapes, stored)
        for file, names in files.items():
            with (beside / file).open("wb") as opened:
                write_header(opened, {name: (stored, shapes[name]) for name in names})
                for name in names:
                    opened.write(tensor_of(tensors[name], shapes[name], params).astype(stored).tobytes())
        total = sum(int(np.prod(shape)) * stored.itemsize for shape in shapes.values())
        if len(files) > 1:
            where = {name: file for file, names in files.items() for name in names}
            index = {"metadata": {"total_size": total}, "weight_map": where}
            (beside / INDEX).write_text(json.dumps(index, indent=2))
        torch_name = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}[dtype]
        (beside / "config.json").write_text(json.dumps({**json_config, "dtype": torch_name}, indent=2) + "\n")
        for name, text in texts.items():
            (beside / name).write_text(text)
        os.chmod(beside, 0o755)
        beside.rename(folder)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return total


def pieces_of(family: Family, config: ModelConfig) -> dict[str, list[Piece]]:
    """Every tensor of theirs, with the parameters of ours that it is made of."""
    tensors = defaultdict(list)
    for path, spec in leaves(parameter_specs(config)):
        place, stacked = place_of(family, config, path), spec.axes[0] == LAYERS
        one = spec.of_one_layer() if stacked else spec
        for layer in range(config.layers if stacked else 1):
            for expert in range(config.experts if place.by_expert else 1):
                tensors[place.of(layer, expert)].append((path, one, place, layer if stacked else -1, expert))
    return dict(tensors)


def _files(shapes: dict[str, tuple[int, ...]], dtype: np.dtype) -> dict[str, list[str]]:
    """Names of the files, each with the tensors in it."""
    files, room = [[]], SHARD_BYTES
    for name, shape in shapes.items():
        size = int(np.prod(shape)) * dtype.itemsize
        if size > room and files[-1]:
            files, room = [*files, []], SHARD_BYTES
        files[-1].append(name)
        room -= size
    if len(files) == 1:
        return {"model.safetensors": files[0]}
    return {f"model-{i:05d}-of-{len(files):05d}.safetensors": names for i, names in enumerate(files, 1)}


def tensor_of(pieces: list[Piece], shape: tuple[int, ...], params: dict) -> np.ndarray:
    """One tensor of theirs, of this shape, from the parameters that lie in it; on the host, in their dtype."""
    whole = None
    for piece, value in zip(pieces, _values(pieces, params), strict=True):
        spec, place = piece[1:3]
        whole = np.empty(shape, value.dtype) if whole is None else whole
        rows = spec.rows if spec.rows is not None else len(value)
        place.put(whole, value[:rows], spec)
    return whole


def _values(pieces: list[Piece], params: dict) -> Iterator[np.ndarray]:
    for path, _, place, layer, expert in pieces:
        value: Any = params
        for name in path:
            value = value[name]
        value = value if layer < 0 else value[layer]
        yield np.asarray(jax.device_get(value[expert] if place.by_expert else value))
