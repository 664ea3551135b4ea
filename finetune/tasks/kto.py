"""Answers that are each good or bad, no pairs of them: KTO (Ethayarajh et al. 2024, arXiv 2402.01306).

Beside each answer stands the same prompt with the answer to another one. What the model says of these foreign answers,
beside the reference, estimates how far it has moved on the whole: the point from which gains and losses are counted.
The estimate is one number of the whole batch, over all devices, and has no gradient. As in preference.py the
reference is the model as the run begins, and a sequence holds both answers, unseen by each other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from finetune.table import LeftOut, Row
from finetune.task import Example, Judged, Judgement
from finetune.two_answers import Answer, Said, TwoAnswers, sides_of
from model.transformer import Transformer
from training.config import TrainConfig
from training.loss import LossSums
from training.step import Batch

LABELS = {"true": 1.0, "1": 1.0, "false": 0.0, "0": 0.0}  # good or bad, in any case of letters
NAMES = ("bad", "good")


@dataclass(frozen=True)
class Options:
    """Settings task.options.* of this task."""

    beta: float = 0.1  # how fast a gain or a loss counts less, the larger it is
    desirable: float = 1.0  # weight of good answers: times their number 1 to 4/3 of that of bad ones (section 4.2)
    undesirable: float = 1.0  # weight of bad answers
    template: str = ""  # of rows with messages: a folder or file with a chat template; "": that of the tokenizer

    def __post_init__(self):
        if not self.beta > 0 or min(self.desirable, self.undesirable) < 0 or not self.desirable + self.undesirable:
            raise ValueError("task.options: beta must be above 0; desirable and undesirable 0 or more, and not both 0")


class Usable(NamedTuple):
    """What a row says."""

    prompt: Said
    said: Said  # the completion
    answer: Answer  # the one behind the other
    good: float  # 1, or 0 where it is bad


class Task(TwoAnswers):
    """Tuning on answers that are good or bad."""

    Options = Options
    columns = {"completion": "completion", "label": "label"}
    optional = ("prompt",)
    metrics = {"accuracy": 1, "margin": 1, "kl": -1, "loss": -1}
    whole_batch = True
    wants_reference = True

    def encode(self, rows: Sequence[Row], left_out: LeftOut) -> list[list[Example]]:
        """One example of each row with a completion and a label; beside it the completion of the next other prompt."""
        good = [self._usable(row, left_out) for row in rows]
        usable = [number for number, one in enumerate(good) if one is not None]
        if len(usable) == 1:
            why = "without another row, whose completion it would be compared with: left out"
            left_out.add(why, rows[usable[0]].name)
            return [[] for _ in rows]
        made: list[list[Example]] = [[] for _ in rows]
        others = next_other([repr(good[number].prompt) for number in usable])
        for number, other in zip(usable, others, strict=True):
            own, foreign, name = good[number], good[usable[other]], rows[number].name
            try:
                answers = [own.answer, self.answer(own.prompt, foreign.said)]
            except ValueError as error:
                left_out.add(f"refused ({error}): left out", name)
                continue
            answers = self.cut(answers, name, left_out)
            if not all(answer.said[1:].any() for answer in answers):
                left_out.add("whose prompt leaves no room for an answer: left out", name)
                continue
            made[number] = [self.example(number, answers, good_X=np.array([own.good], np.float32))]
        return made

    def _usable(self, row: Row, left_out: LeftOut) -> Usable | None:
        label = LABELS.get(row.text("label").lower())
        if label is None:
            left_out.add(f"with a label that is none of {', '.join(LABELS)}: left out", row.name)
            return None
        try:
            prompt, said = sides_of(row, "completion")
            return Usable(prompt, said, self.answer(prompt, said), label)
        except ValueError as error:
            left_out.add(f"refused ({error}): left out", row.name)
            return None

    def _losses(self, model: Transformer, x_BTD: jax.Array, batch: Batch, config: TrainConfig):
        """The loss of each answer, what both of a sequence have gained on the reference, their log-probabilities."""
        said_B2 = self.log_probabilities(model, x_BTD, batch, config)
        gained_B2 = said_B2 - batch.get("reference_BX", said_B2)  # of the reference itself nothing
        counts_B = batch["mask_BT"].sum(1)
        loss_B = kto_losses(self.options, gained_B2, batch["good_BX"][:, 0], counts_B)
        return loss_B, gained_B2, said_B2

    def loss(self, model: Transformer, x_BTD: jax.Array, batch: Batch, config: TrainConfig) -> LossSums:
        """Sums over answers; right is a good one that has gained more than the model has moved, a bad one less."""
        loss_B, gained_B2, _ = self._losses(model, x_BTD, batch, config)
        counts_B, good_B = batch["mask_BT"].sum(1), batch["good_BX"][:, 0]
        right_B = (gained_B2[:, 0] > moved(gained_B2, counts_B)) == (good_B > 0)
        return LossSums((loss_B * counts_B).sum(), jnp.zeros(()), (right_B * counts_B).sum())

    def answers(self, model: Transformer, x_BTD: jax.Array, batch: Batch, config: TrainConfig) -> dict[str, jax.Array]:
        """What the answers have gained, the loss, and what a reference is made of."""
        loss_B, gained_B2, said_B2 = self._losses(model, x_BTD, batch, config)
        return {"loss_B": loss_B, "gained_BX": gained_B2, "said_BX": said_B2}

    def judge(self, rows: Sequence[Row], examples: Sequence[Example], answers: Mapping[str, np.ndarray]) -> Judgement:
        """How many answers lie on their side of the point of reference, that of all held-out rows (`kl`, nats), and by
        how much good ones have gained more than bad ones (`margin`, times beta)."""
        gained_N, loss_N = answers["gained_BX"][:, 0], answers["loss_B"]
        good_N = np.array([example.arrays["good_X"][0] for example in examples]) > 0
        kl = max(0.0, float(answers["gained_BX"][:, 1].mean()))
        said_N = gained_N > kl
        mean = lambda side_N: float(gained_N[side_N].mean()) if side_N.any() else 0.0
        margin = self.options.beta * (mean(good_N) - mean(~good_N))
        judged = []
        for example, good, said, loss in zip(examples, good_N, said_N, loss_N, strict=True):
            row = rows[example.row]
            text = " | ".join(f"{role}: {row.values.get(role)}" for role in ("prompt", "completion"))
            judged.append(Judged(row.name, text, NAMES[int(good)], NAMES[int(said)], float(loss)))
        return Judgement({"accuracy": float((said_N == good_N).mean()), "margin": margin, "kl": kl}, judged)


def moved(gained_B2: jax.Array, counts_B: jax.Array) -> jax.Array:
    """The point of reference of a batch (equation 8): how far the model has moved from the reference, nats, 0 or more.

    The mean gain of foreign answers over the sequences that count, wherever these lie on the mesh; it has no gradient.
    """
    mean = (gained_B2[:, 1] * counts_B).sum() / jnp.maximum(counts_B.sum(), 1)
    return jax.lax.stop_gradient(jnp.maximum(mean, 0))


def kto_losses(o: Options, gained_B2: jax.Array, good_B: jax.Array, counts_B: jax.Array) -> jax.Array:
    """The loss of each answer: its weight minus its value (equations 7 and 8).

    gained_B2: nats that the answer of each row, and a foreign one, have gained on the reference; good_B 1 or 0;
    counts_B 0 for sequences that only fill up a batch.
    """
    ahead_B = o.beta * (gained_B2[:, 0] - moved(gained_B2, counts_B))
    good, bad = o.desirable * jax.nn.sigmoid(-ahead_B), o.undesirable * jax.nn.sigmoid(ahead_B)
    return jnp.where(good_B > 0, good, bad)


def next_other(prompts: Sequence[str]) -> list[int]:
    """For each place the next one, around the end, that has another prompt; the next one where all are the same."""
    count = len(prompts)
    if len(set(prompts)) < 2:
        return [(place + 1) % count for place in range(count)]
    found = [0] * (2 * count)
    for place in range(2 * count - 2, -1, -1):
        after = (place + 1) % count
        found[place] = after if prompts[after] != prompts[place % count] else found[place + 1]
    return found[:count]
