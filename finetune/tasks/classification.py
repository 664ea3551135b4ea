"""Texts, or pairs of texts, to labels: one of several, any number of several, or a number (regression).

The label is read off the first token of an encoder, through its pooler, and off the last one of a decoder: as
`AutoModelForSequenceClassification` of transformers has it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from finetune.metrics import confusion_of, labels_report, matthews, multilabel_report, pearson
from finetune.table import LeftOut, Row
from finetune.task import Example, Judged, Judgement, Setup
from finetune.task import Task as Base
from finetune.texts import around
from model.transformer import Transformer
from training.config import TrainConfig
from training.loss import LossSums
from training.step import Batch

KINDS = {  # task.options.kind -> what it is judged by
    "one": {"accuracy": 1, "f1_macro": 1, "matthews": 1, "loss": -1},
    "several": {"f1_micro": 1, "f1_macro": 1, "accuracy": 1, "loss": -1},
    "regression": {"mse": -1, "pearson": 1, "loss": -1},
}


@dataclass(frozen=True)
class Options:
    """Settings task.options.* of this task."""

    kind: str = "one"  # label of a text | several (any number of them) | regression (a number)
    separator: str = ","  # several: between the labels of a row

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"task.options.kind={self.kind} is not one of {', '.join(KINDS)}")


class Task(Base):
    """Classification and regression of whole texts."""

    Options = Options
    columns = {"text": "text", "label": "label"}
    optional = ("pair",)

    def __init__(self, setup: Setup, options: Options):
        super().__init__(setup, options)
        self.metrics = KINDS[options.kind]

    def find_labels(self, rows: Sequence[Row]) -> tuple[str, ...]:
        """The names that training rows have: sorted, as numbers where all are."""
        if self.options.kind == "regression":
            return ("value",)
        found = {name for row in rows for name in self._names(row)}
        if all(name.lstrip("-").isdecimal() for name in found):
            return tuple(sorted(found, key=int))
        return tuple(sorted(found))

    def _names(self, row: Row) -> list[str]:
        label = row.text("label")
        if self.options.kind == "several":
            value = row.values.get("label")
            names = value if isinstance(value, list) else label.split(self.options.separator)
            return [name for name in (str(name).strip() for name in names) if name]
        return [label] if label else []

    def _value(self, row: Row) -> np.ndarray | str:
        """The target of a row, float32 of (labels,), or why there is none."""
        if self.options.kind == "regression":
            try:
                value = float(row.text("label"))
            except ValueError:
                value = math.nan
            return np.array([value], np.float32) if math.isfinite(value) else "with no number as its label"
        names = self._names(row)
        if not names and self.options.kind == "one":
            return "without a label"
        if strange := [name for name in names if name not in self.labels]:
            return f"with a label that is none of task.labels ({strange[0]})"
        return np.array([name in names for name in self.labels], np.float32)

    def encode(self, rows: Sequence[Row], left_out: LeftOut) -> list[list[Example]]:
        """One example of each row with a text and a known label."""
        texts = around(self.setup, rows, ("text", "pair"), left_out)
        return [
            self._example(i, row, arrays, left_out) for i, (row, arrays) in enumerate(zip(rows, texts, strict=True))
        ]

    def _example(self, number: int, row: Row, arrays: dict | None, left_out: LeftOut) -> list[Example]:
        if arrays is None:
            return []
        value = self._value(row)
        if isinstance(value, str):
            left_out.add(f"{value}: left out", row.name)
            return []
        mask = np.zeros(len(arrays["tokens_T"]), np.float32)
        mask[-1 if self.setup.model.causal else 0] = 1
        return [Example(number, {**arrays, "mask_T": mask, "label_X": value})]

    def _logits(self, model: Transformer, x_BTD: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Float32 logits_BC of the token that is read, and 1 for each sequence that counts."""
        mask_BT1 = batch["mask_BT"][..., None]
        x_B1D = jnp.where(mask_BT1 > 0, x_BTD, 0).sum(1, keepdims=True)
        return model.label_logits(x_B1D)[:, 0], batch["mask_BT"].sum(1)

    def loss(self, model: Transformer, x_BTD: jax.Array, batch: Batch, config: TrainConfig) -> LossSums:
        """Cross-entropy of one label, the mean of that of each of several, or squared error."""
        logits_BC, counts_B = self._logits(model, x_BTD, batch)
        loss_B, right_B = _losses(self.options.kind, logits_BC, batch["label_BX"])
        return LossSums((loss_B * counts_B).sum(), jnp.zeros(()), (right_B * counts_B).sum())

    def answers(self, model: Transformer, x_BTD: jax.Array, batch: Batch, config: TrainConfig) -> dict[str, jax.Array]:
        """The logits, and the loss of each sequence."""
        logits_BC, _ = self._logits(model, x_BTD, batch)
        return {"logits_BX": logits_BC, "loss_B": _losses(self.options.kind, logits_BC, batch["label_BX"])[0]}

    def judge(self, rows: Sequence[Row], examples: Sequence[Example], answers: Mapping[str, np.ndarray]) -> Judgement:
        """Accuracy and F1 of labels, or the error of numbers."""
        truth_NC, logits_NC = np.stack([example.arrays["label_X"] for example in examples]), answers["logits_BX"]
        said_N = self._spelled(logits_NC)
        true_N = self._spelled(truth_NC * 2 - 1 if self.options.kind == "several" else truth_NC)
        judged = [
            Judged(rows[example.row].name, rows[example.row].text("text"), truth, said, float(loss))
            for example, truth, said, loss in zip(examples, true_N, said_N, answers["loss_B"], strict=True)
        ]
        if self.options.kind == "regression":
            errors_N = logits_NC[:, 0] - truth_NC[:, 0]
            found = {"mse": float(np.mean(errors_N**2)), "pearson": pearson(logits_NC[:, 0], truth_NC[:, 0])}
            return Judgement(found, judged)
        if self.options.kind == "several":
            metrics, by_label = multilabel_report(truth_NC > 0, logits_NC > 0, self.labels)
            return Judgement(metrics, judged, by_label=by_label)
        confusion_CC = confusion_of(truth_NC.argmax(1), logits_NC.argmax(1), len(self.labels))
        metrics, by_label = labels_report(confusion_CC, self.labels)
        return Judgement(metrics | {"matthews": matthews(confusion_CC)}, judged, confusion_CC, by_label)

    def _spelled(self, values_NC: np.ndarray) -> list[str]:
        """Labels, or numbers, in words."""
        if self.options.kind == "regression":
            return [f"{value:.4g}" for value in values_NC[:, 0]]
        if self.options.kind == "one":
            return [self.labels[best] for best in values_NC.argmax(1)]
        return [
            ", ".join(name for name, x in zip(self.labels, row, strict=True) if x > 0) or "none" for row in values_NC
        ]


def _losses(kind: str, logits_BC: jax.Array, label_BC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The loss of each sequence, and 1 where it is right."""
    if kind == "regression":
        loss_BC = jnp.square(logits_BC - label_BC)
        return loss_BC.mean(1), jnp.zeros_like(loss_BC[:, 0])
    if kind == "several":
        right_BC = (logits_BC > 0) == (label_BC > 0)
        loss_BC = jax.nn.softplus(logits_BC) - label_BC * logits_BC
        return loss_BC.mean(1), right_BC.all(1).astype(jnp.float32)
    loss_B = -(jax.nn.log_softmax(logits_BC) * label_BC).sum(1)
    return loss_B, (logits_BC.argmax(1) == label_BC.argmax(1)).astype(jnp.float32)
