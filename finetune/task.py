"""What a task is: how a row becomes tokens and targets, what is minimised, and how answers are judged.

A file of finetune/tasks/ (or one of your own, task.kind=FILE.py) holds one, a class `Task` that inherits from the one
here. See docs/finetune.md for one written from scratch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar

import jax
import numpy as np

from data.packing import Batch as HostBatch
from data.tokenizer import Tokenizer
from finetune.config import TaskConfig
from finetune.table import LeftOut, Row
from model.config import ModelConfig
from model.transformer import Transformer
from training.config import TrainConfig
from training.loss import LossSums
from training.step import Batch, cross_entropy

Writer = Callable[[list[list[int]], int], list[list[int]]]  # prompts, and how many tokens at most -> what is written


@dataclass(frozen=True)
class Setup:
    """What a task knows of its run."""

    config: TaskConfig
    model: ModelConfig
    tokenizer: Tokenizer
    seq_len: int
    seed: int = 0
    tokenizer_path: str = ""  # where it was read from; "": nowhere


@dataclass(frozen=True)
class NoOptions:
    """Of a task without settings of its own."""


@dataclass(frozen=True, eq=False)
class Example:
    """One sequence. `arrays` by name: those that end in _T have an entry for each token, those in _X are of the whole.

    tokens_T int32 and mask_T float32 (what the mean of the loss counts) are always there, targets_T int32 where the
    loss asks for them; segments_T (from 1) and places_T where a sequence has parts that do not see each other. What is
    missing of these follows: one segment, places from 0.
    """

    row: int  # its number in the table
    arrays: Mapping[str, np.ndarray]
    about: Any = None  # what `judge` wants to know of it

    def __len__(self) -> int:
        return len(self.arrays["tokens_T"])


@dataclass(frozen=True)
class Judged:
    """An answer beside what was right, for a person."""

    name: str  # of the row
    text: str
    truth: str
    answer: str
    loss: float  # how wrong it is: the worst come first


@dataclass(frozen=True, eq=False)
class Judgement:
    """How a model did on held-out rows."""

    metrics: dict[str, float]
    judged: list[Judged] = field(default_factory=list)
    confusion: np.ndarray | None = None  # (truths, answers), counts
    by_label: dict[str, dict[str, float]] = field(default_factory=dict)  # label -> precision, recall, f1, support


class Task:
    """The part that tasks share."""

    Options: ClassVar[type] = NoOptions  # a frozen dataclass of the settings task.options.*
    columns: ClassVar[dict[str, str]] = {"text": "text"}  # what it asks for -> the usual name of the column
    optional: ClassVar[tuple[str, ...]] = ()  # those that a table may lack
    metrics: dict[str, int] = MappingProxyType({"loss": -1})  # that it is judged by -> 1: more is better, -1: less
    packs: ClassVar[bool] = False  # several examples share a sequence
    whole_batch: ClassVar[bool] = False  # the loss compares sequences, so that no batch may be cut
    reads_text: ClassVar[bool] = False  # data=... instead of rows, each batch as `change` makes it
    wants_teacher: ClassVar[bool] = False  # batches hold what another model says of them: finetune/teacher.py
    wants_reference: bool = False  # batches hold what `answers` calls said_BX of the first model, as reference_BX

    def __init__(self, setup: Setup, options: Any):
        self.setup, self.options = setup, options
        self.labels: tuple[str, ...] = ()

    def find_labels(self, rows: Sequence[Row]) -> tuple[str, ...]:
        """The names of the labels that training rows have, in order; none where the task has no labels."""
        return ()

    def encode(self, rows: Sequence[Row], left_out: LeftOut) -> list[list[Example]]:
        """The examples of each row: usually one; none, and a note in `left_out`, of one that cannot be used."""
        raise NotImplementedError

    def change(self, batch: HostBatch, number: int, rows: np.ndarray) -> HostBatch:
        """Of a task that reads text: a batch of pretraining as this task wants it, a pure function of the seed, the
        batch's number (below 0: held-out ones) and those of its rows."""
        raise NotImplementedError

    def loss(self, model: Transformer, x_BTD: jax.Array, batch: Batch, config: TrainConfig) -> LossSums:
        """Sums over what counts, of final hidden vectors; by default the cross-entropy of targets_BT where mask_BT."""
        return cross_entropy(model, x_BTD, batch, config)

    def answers(self, model: Transformer, x_BTD: jax.Array, batch: Batch, config: TrainConfig) -> dict[str, jax.Array]:
        """What `judge` needs of a batch: arrays by name, (B, T) where it ends in _BT, (B, ...) otherwise."""
        return {}

    def judge(self, rows: Sequence[Row], examples: Sequence[Example], answers: Mapping[str, np.ndarray]) -> Judgement:
        """What the answers, (examples, ...), are worth."""
        return Judgement({})

    def judge_texts(self, rows: Sequence[Row], examples: Sequence[Example], write: Writer) -> Judgement | None:
        """What the model writes is worth; None where it is not asked to."""
        return None

    def of_sums(self, loss: float, right: float) -> dict[str, float]:
        """Metrics that follow from the mean loss and the share of what counts that is right."""
        return {}
