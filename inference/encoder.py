"""What a model that writes no text says of whole sequences: a vector, or the logits of its labels.

Sequences go in batches of a few shapes that are compiled ahead.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from inference.generate import exact_matmuls
from inference.opening import Opened
from inference.requests import EncodeRequest
from model.config import LABELLED, ModelConfig
from model.transformer import Transformer
from parallel.sharding import replicated, shard, splits

SHORTEST = 16  # tokens that a sequence is padded to at least
CLASSES = "classes"  # model.head of labels for whole sequences
WAYS = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "first",
    "pooling_mode_lasttoken": "last",
    "pooling_mode_max_tokens": "max",
}


@dataclass(frozen=True)
class Pooling:
    """How a sequence's final vectors become one: mean, first, last or max; `unit` scales it to length 1."""

    how: str = "mean"
    unit: bool = True


def asked_pooling(how: str, folder: Path) -> Pooling:
    """The pooling that is asked for, "" for that of the model's folder. Raises ValueError as `pooling_of`."""
    if how == "none":
        raise ValueError(f"pooling=none: {folder} writes no text, and so would do nothing")
    return Pooling(how) if how else pooling_of(folder)


def pooling_of(folder: Path) -> Pooling:
    """What the folder of a model says (modules.json and 1_Pooling/config.json, as sentence-transformers write them).

    A folder that says nothing: the mean, scaled to length 1. Raises ValueError for what is not known here.
    """
    if not (folder / "modules.json").is_file():
        return Pooling()
    modules = json.loads((folder / "modules.json").read_text())
    kinds = [module["type"].rpartition(".")[2] for module in modules]
    if strange := [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]:
        raise ValueError(f"{folder}/modules.json has a module {strange[0]}; only Pooling and Normalize are known")
    path = next((module["path"] for module, kind in zip(modules, kinds, strict=True) if kind == "Pooling"), None)
    if path is None:
        raise ValueError(f"{folder}/modules.json has no module Pooling: it makes no vector of a sequence")
    asked = json.loads((folder / path / "config.json").read_text())
    ways = [name for name, on in asked.items() if name.startswith("pooling_mode_") and on is True]
    if asked.get("pooling_mode") in ("mean", "cls", "lasttoken", "max"):  # as newer versions write it
        ways = [next(name for name in WAYS if asked["pooling_mode"] in name)]
    if len(ways) != 1 or ways[0] not in WAYS:
        raise ValueError(
            f"{folder / path} asks for {', '.join(ways) or 'no pooling'}; one of {', '.join(WAYS)} is known"
        )
    return Pooling(WAYS[ways[0]], "Normalize" in kinds)


class Encoder:
    """The compiled programs that turn rows of tokens into vectors, or into logits where the model's head has classes.

    For the one thread that owns the devices.
    """

    def __init__(self, opened: Opened, rows: int, length: int, pooling: str = ""):
        """rows: sequences of one step at most, length: tokens of the longest; pooling: as `asked_pooling` has it.

        Raises ValueError as that, and for a head that was not read with the weights.
        """
        _refuse_unread_classes(opened.path, opened.config.model)
        self.opened, self.pooling = opened, asked_pooling(pooling, opened.path)
        self.types = opened.config.model.token_types  # kinds of tokens that it tells apart; 0: no such table
        with jax.set_mesh(opened.mesh):
            self.rows, even = [splits("batch")], splits("residual")
        while self.rows[-1] < rows:
            self.rows.append(self.rows[-1] * 2)
        self.lengths = [-(-min(SHORTEST, length) // even) * even]
        while self.lengths[-1] < length:
            self.lengths.append(-(-min(self.lengths[-1] * 2, length) // even) * even)
        self.compiled: dict[tuple[int, int], jax.stages.Compiled] = {}

    def compile(self) -> None:
        """Compiles every shape."""
        opened, mesh = self.opened, self.opened.mesh
        encode = partial(_vectors, dtype=opened.dtype, pooling=self.pooling)
        encode = jax.jit(encode, out_shardings=replicated(mesh))
        with jax.set_mesh(mesh), exact_matmuls(opened.dtype):
            model = opened.description.bind(opened.params)
            for rows in self.rows:
                for length in self.lengths:
                    tokens_BT = np.zeros((rows, length), np.int32)
                    batch = tokens_BT, np.zeros(rows, np.int32), tokens_BT if self.types else None
                    self.compiled[rows, length] = encode.lower(model, *batch).compile()
        self._model = model

    def bucket(self, tokens: int) -> int:
        """The length that a sequence is padded to."""
        return next(length for length in self.lengths if length >= tokens)

    def run(self, requests: Sequence[EncodeRequest]) -> np.ndarray:
        """Float32 (requests, D), or logits of classes (requests, C), of at most as many as a step takes."""
        rows = next(rows for rows in self.rows if rows >= len(requests))
        T = self.bucket(max(len(request.tokens) for request in requests))
        tokens_BT, lengths_B = np.zeros((rows, T), np.int32), np.zeros(rows, np.int32)
        types_BT = np.zeros((rows, T), np.int32) if self.types else None
        for row, request in enumerate(requests):
            tokens_BT[row, : len(request.tokens)] = request.tokens
            lengths_B[row] = len(request.tokens)
            if self.types and request.types:  # one type is that of both texts of a pair (RoBERTa)
                types_BT[row, : len(request.types)] = np.minimum(request.types, self.types - 1)
        return np.asarray(self.compiled[rows, T](self._model, tokens_BT, lengths_B, types_BT))[: len(requests)]


def _refuse_unread_classes(folder: Path, config: ModelConfig) -> None:
    """Where a head of classes was not read with the weights, answers would not be what the model was made for."""
    path = folder / "config.json"
    architecture = (json.loads(path.read_text()).get("architectures") or [""])[0] if path.is_file() else ""
    if "Classification" in architecture and config.head not in LABELLED:
        raise ValueError(f"{path} says {architecture}, and its tensors have no such head of classes")


def _vectors(model: Transformer, tokens_BT, lengths_B, types_BT, *, dtype, pooling: Pooling) -> jax.Array:
    """Float32 (B, D), or logits (B, C): of each row's first tokens, as many as its length."""
    tokens_BT = shard(tokens_BT, "batch", None)
    types_BT = None if types_BT is None else shard(types_BT, "batch", None)
    real_BT = jnp.arange(tokens_BT.shape[1]) < lengths_B[:, None]
    x_BTD, _, _ = model(tokens_BT, segments_BT=real_BT.astype(jnp.int32), types_BT=types_BT, dtype=dtype)
    last_B = jnp.maximum(lengths_B - 1, 0)
    if model.config.head == CLASSES:  # read where they were trained: finetune/tasks/classification.py
        at_B = last_B if model.config.causal else jnp.zeros_like(last_B)
        return model.label_logits(jnp.take_along_axis(x_BTD, at_B[:, None, None], axis=1))[:, 0]
    x_BTD, real_BT1 = x_BTD.astype(jnp.float32), real_BT[..., None]
    if pooling.how == "mean":
        x_BD = jnp.where(real_BT1, x_BTD, 0).sum(1) / jnp.maximum(lengths_B, 1)[:, None]
    elif pooling.how == "max":
        x_BD = jnp.where(real_BT1, x_BTD, -jnp.inf).max(1)
    else:
        at_B = last_B if pooling.how == "last" else jnp.zeros_like(last_B)
        x_BD = jnp.take_along_axis(x_BTD, at_B[:, None, None], axis=1)[:, 0]
    if pooling.unit:
        x_BD /= jnp.maximum(jnp.linalg.norm(x_BD, axis=-1, keepdims=True), 1e-12)
    return x_BD
