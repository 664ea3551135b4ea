"""A task of one's own: texts to stars, 1 to 5, which are labels with an order. See docs/finetune.md."""

import jax
import jax.numpy as jnp
import numpy as np

from finetune.task import Example, Judged, Judgement
from finetune.task import Task as Base
from finetune.texts import around
from training.loss import LossSums


class Task(Base):
    columns = {"text": "text", "stars": "stars"}  # what the rows have -> the usual name of the column
    metrics = {"mean_error": -1, "loss": -1}  # 1: more is better, -1: less; the first picks the best checkpoint

    def find_labels(self, rows):
        return ("1", "2", "3", "4", "5")

    def encode(self, rows, left_out):
        made = []
        for number, (row, arrays) in enumerate(zip(rows, around(self.setup, rows, ["text"], left_out), strict=True)):
            if arrays is None or row.text("stars") not in self.labels:
                left_out.add("without a text or stars: left out", row.name)
                made.append([])
                continue
            mask = np.zeros(len(arrays["tokens_T"]), np.float32)
            mask[0] = 1  # the mean of the loss counts one token a text, the first
            stars = np.array([float(row.text("stars"))], np.float32)
            made.append([Example(number, {**arrays, "mask_T": mask, "stars_X": stars})])
        return made

    def expected(self, model, x_BTD):
        share_BC = jax.nn.softmax(model.label_logits(x_BTD[:, :1])[:, 0])
        return share_BC @ jnp.arange(1.0, 6.0)

    def loss(self, model, x_BTD, batch, config):
        counts_B = batch["mask_BT"].sum(1)  # 0 where a row only fills up the last batch
        error_B = jnp.square(self.expected(model, x_BTD) - batch["stars_BX"][:, 0])
        return LossSums((error_B * counts_B).sum(), jnp.zeros(()), ((error_B < 0.25) * counts_B).sum())

    def answers(self, model, x_BTD, batch, config):
        return {"stars_B": self.expected(model, x_BTD)}

    def judge(self, rows, examples, answers):
        truth_N = np.array([example.arrays["stars_X"][0] for example in examples])
        error_N = np.abs(answers["stars_B"] - truth_N)
        judged = [
            Judged(rows[e.row].name, rows[e.row].text("text"), f"{t:.0f}", f"{s:.0f}", float(x))
            for e, t, s, x in zip(examples, truth_N, answers["stars_B"], error_N, strict=True)
        ]
        return Judgement({"mean_error": float(error_N.mean())}, judged)
