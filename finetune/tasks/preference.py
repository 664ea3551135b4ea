"""Of two answers the better one: DPO and its relatives, beside a reference, which is the model as the run begins.

A sequence holds the prompt with the chosen answer and, unseen by it, the prompt with the rejected one. The reference's
log-probabilities are computed once, before the first step, and kept with the run.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from finetune.table import LeftOut, Row
from finetune.task import Example, Judged, Judgement, Setup
from finetune.two_answers import TwoAnswers, sides_of
from model.transformer import Transformer
from training.config import TrainConfig
from training.loss import LossSums
from training.step import Batch

LOSSES = ("sigmoid", "hinge", "ipo", "simpo", "orpo")
BY_TOKEN = ("ipo", "simpo", "orpo")  # of the mean log-probability of an answer's tokens, not of their sum
ALONE = ("simpo", "orpo")  # without a reference
SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class Options:
    """Settings task.options.* of this task."""

    # sigmoid (DPO, 2305.18290) | hinge (SLiC, 2305.10425) | ipo (2310.12036) | simpo (2405.14734) | orpo (2403.07691)
    loss: str = "sigmoid"
    beta: float = 0.1  # how much a difference weighs; of orpo the weight of the odds beside the likelihood
    margin: float = 0.0  # simpo: by how much the chosen answer is to be likelier
    smoothing: float = 0.0  # sigmoid: share of the pairs that are believed to be the wrong way round
    template: str = ""  # of rows with messages: a folder or file with a chat template; "": that of the tokenizer

    def __post_init__(self):
        if self.loss not in LOSSES:
            raise ValueError(f"task.options.loss={self.loss} is not one of {', '.join(LOSSES)}")
        if not self.beta > 0 or not 0 <= self.smoothing < 0.5 or self.margin < 0:
            raise ValueError("task.options: beta must be above 0, smoothing at least 0 and below 0.5, margin 0 or more")


class Task(TwoAnswers):
    """Preference tuning."""

    Options = Options
    columns = {"chosen": "chosen", "rejected": "rejected"}
    optional = ("prompt",)
    metrics = {"accuracy": 1, "margin": 1, "loss": -1}

    def __init__(self, setup: Setup, options: Options):
        super().__init__(setup, options)
        self.wants_reference = options.loss not in ALONE

    def encode(self, rows: Sequence[Row], left_out: LeftOut) -> list[list[Example]]:
        """One example of each row with two answers that differ."""
        return [self._example(number, row, left_out) for number, row in enumerate(rows)]

    def _example(self, number: int, row: Row, left_out: LeftOut) -> list[Example]:
        try:
            sides = [self.answer(*sides_of(row, role)) for role in SIDES]
        except ValueError as error:
            left_out.add(f"refused ({error}): left out", row.name)
            return []
        sides = self.cut(sides, row.name, left_out)
        if np.array_equal(sides[0].ids, sides[1].ids) or not all(side.said[1:].any() for side in sides):
            left_out.add("whose answers do not differ: left out", row.name)
            return []
        return [self.example(number, sides)]

    def _losses(self, model: Transformer, x_BTD: jax.Array, batch: Batch, config: TrainConfig):
        """The loss of each pair, by how much the chosen answer is preferred, and the log-probabilities."""
        o = self.options
        said_B2 = self.log_probabilities(model, x_BTD, batch, config, mean=o.loss in BY_TOKEN)
        moved_B2 = said_B2 - batch["reference_BX"] if "reference_BX" in batch else said_B2
        ahead_B = moved_B2[:, 0] - moved_B2[:, 1]
        return pair_losses(o, said_B2, ahead_B), o.beta * ahead_B, said_B2

    def loss(self, model: Transformer, x_BTD: jax.Array, batch: Batch, config: TrainConfig) -> LossSums:
        """Sums over pairs."""
        loss_B, margin_B, _ = self._losses(model, x_BTD, batch, config)
        counts_B = batch["mask_BT"].sum(1)
        return LossSums((loss_B * counts_B).sum(), jnp.zeros(()), ((margin_B > 0) * counts_B).sum())

    def answers(self, model: Transformer, x_BTD: jax.Array, batch: Batch, config: TrainConfig) -> dict[str, jax.Array]:
        """How much the chosen answer is preferred, the loss, and what a reference is made of."""
        loss_B, margin_B, said_B2 = self._losses(model, x_BTD, batch, config)
        return {"loss_B": loss_B, "margin_B": margin_B, "said_BX": said_B2}

    def judge(self, rows: Sequence[Row], examples: Sequence[Example], answers: Mapping[str, np.ndarray]) -> Judgement:
        """How often the chosen answer is preferred, and by how much."""
        margin_N, judged = answers["margin_B"], []
        for example, margin, loss in zip(examples, margin_N, answers["loss_B"], strict=True):
            row = rows[example.row]
            text = " | ".join(f"{role}: {row.values.get(role)}" for role in ("prompt", *SIDES))
            judged.append(Judged(row.name, text, "chosen", "chosen" if margin > 0 else "rejected", float(loss)))
        return Judgement({"accuracy": float((margin_N > 0).mean()), "margin": float(margin_N.mean())}, judged)


def pair_losses(o: Options, said_B2: jax.Array, ahead_B: jax.Array) -> jax.Array:
    """The loss of each pair: of log-probabilities, and by how much the chosen one has gained on the rejected one."""
    log_sigmoid = jax.nn.log_sigmoid
    if o.loss == "sigmoid":
        right, wrong = log_sigmoid(o.beta * ahead_B), log_sigmoid(-o.beta * ahead_B)
        return -(1 - o.smoothing) * right - o.smoothing * wrong
    if o.loss == "hinge":
        return jax.nn.relu(1 - o.beta * ahead_B)
    if o.loss == "ipo":
        return jnp.square(ahead_B - 1 / (2 * o.beta))
    if o.loss == "simpo":
        return -log_sigmoid(o.beta * ahead_B - o.margin)
    against_B2 = jnp.log1p(-jnp.exp(jnp.minimum(said_B2, -1e-6)))  # of the mean token not being said
    odds_B = ahead_B - (against_B2[:, 0] - against_B2[:, 1])
    return -said_B2[:, 0] - o.beta * log_sigmoid(odds_B)
