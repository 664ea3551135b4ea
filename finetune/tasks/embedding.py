"""Vectors of texts that lie close where the texts belong together: contrastive, with the whole batch as negatives.

A sequence holds a text and its partner (and perhaps a text that looks like one and is none) as parts that do not see
each other. The loss is that of choosing each text's partner among those of all sequences of the batch, on whatever
mesh, and the other way round (van den Oord et al. 2018; Henderson et al. 2017). A vector is the mean over a part's
tokens, scaled to length 1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from finetune.table import LeftOut, Row
from finetune.task import Example, Judged, Judgement
from finetune.task import Task as Base
from finetune.texts import cut_to
from model.transformer import Transformer
from parallel.sharding import shard
from training.config import TrainConfig
from training.loss import LossSums
from training.step import Batch

NONE = -1e30  # the score of what is no candidate


@dataclass(frozen=True)
class Options:
    """Settings task.options.* of this task."""

    temperature: float = 0.05  # similarities, from -1 to 1, are divided by it
    symmetric: bool = True  # partners choose texts, too

    def __post_init__(self):
        if not self.temperature > 0:
            raise ValueError(f"task.options.temperature={self.temperature} must be above 0")


class Task(Base):
    """Embeddings from pairs."""

    Options = Options
    columns = {"text": "text", "positive": "positive"}
    optional = ("negative",)
    metrics = {"mrr": 1, "recall_at_1": 1, "recall_at_5": 1, "loss": -1}
    whole_batch = True

    @property
    def _roles(self) -> tuple[str, ...]:
        return ("text", "positive", *(("negative",) if "negative" in self.setup.config.columns else ()))

    def encode(self, rows: Sequence[Row], left_out: LeftOut) -> list[list[Example]]:
        """One example of each row that has all its texts."""
        roles, t = self._roles, self.setup.tokenizer
        tokens = {role: t.encode_batch([row.text(role) for row in rows]) for role in roles}
        room, made = self.setup.seq_len // len(roles), []
        for number, row in enumerate(rows):
            if empty := next((role for role in roles if not len(tokens[role][number])), None):
                left_out.add(f"with an empty {empty}: left out", row.name)
                made.append([])
                continue
            parts = [cut_to(self.setup, tokens[role][number], room, row.name, left_out) for role in roles]
            sizes = list(map(len, parts))
            mask = np.zeros(sum(sizes), np.float32)
            mask[0] = 1
            arrays = {"tokens_T": np.concatenate(parts), "mask_T": mask}
            arrays["segments_T"] = np.repeat(np.arange(1, len(sizes) + 1, dtype=np.int32), sizes)
            arrays["places_T"] = np.concatenate([np.arange(size, dtype=np.int32) for size in sizes])
            made.append([Example(number, arrays)])
        return made

    def _vectors(self, x_BTD: jax.Array, batch: Batch) -> jax.Array:
        """Float32 (B, parts, D), of length 1."""
        of_BKT = batch["segments_BT"][:, None] == jnp.arange(1, len(self._roles) + 1)[:, None]
        weight_BKT = of_BKT / jnp.maximum(of_BKT.sum(-1, keepdims=True), 1)
        x_BKD = jnp.einsum("BKT,BTD->BKD", weight_BKT, x_BTD.astype(jnp.float32))
        x_BKD = shard(x_BKD, "batch", None, "width")
        return x_BKD * jax.lax.rsqrt(jnp.maximum(jnp.square(x_BKD).sum(-1, keepdims=True), 1e-12))

    def loss(self, model: Transformer, x_BTD: jax.Array, batch: Batch, config: TrainConfig) -> LossSums:
        """The cross-entropy of each text's partner among all of the batch."""
        vectors_BKD, counts_B = self._vectors(x_BTD, batch), batch["mask_BT"].sum(1)
        text_BD, partner_BD = vectors_BKD[:, 0], vectors_BKD[:, 1]
        candidates_ND = jnp.concatenate([vectors_BKD[:, k] for k in range(1, len(self._roles))])
        there_N = jnp.tile(counts_B, len(self._roles) - 1) > 0
        loss_B, right_B = self._choice(text_BD, candidates_ND, there_N)
        if self.options.symmetric:
            loss_B = (loss_B + self._choice(partner_BD, text_BD, counts_B > 0)[0]) / 2
        return LossSums((loss_B * counts_B).sum(), jnp.zeros(()), (right_B * counts_B).sum())

    def _choice(self, x_BD: jax.Array, candidates_ND: jax.Array, there_N: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of each x: the loss of choosing the candidate of the same number, and 1 where that is the likeliest."""
        scores_BN = jnp.where(there_N, x_BD @ candidates_ND.T / self.options.temperature, NONE)
        own_B = (x_BD * candidates_ND[: len(x_BD)]).sum(-1) / self.options.temperature
        right_B = scores_BN.argmax(1) == jnp.arange(len(x_BD))
        return jax.nn.logsumexp(scores_BN, axis=1) - own_B, right_B.astype(jnp.float32)

    def answers(self, model: Transformer, x_BTD: jax.Array, batch: Batch, config: TrainConfig) -> dict[str, jax.Array]:
        """The vectors of each sequence's parts."""
        return {"vectors_BX": self._vectors(x_BTD, batch)}

    def judge(self, rows: Sequence[Row], examples: Sequence[Example], answers: Mapping[str, np.ndarray]) -> Judgement:
        """How well each text finds its partner among those of all held-out rows; partners of one wording are one.

        What is as close as the partner comes before it, and so does what is no number: vectors that are all the same
        find nothing.
        """
        text_ND, partner_ND = answers["vectors_BX"][:, 0], answers["vectors_BX"][:, 1]
        wordings = [rows[example.row].text("positive") for example in examples]
        number = {wording: i for i, wording in reversed(list(enumerate(wordings)))}
        distinct = sorted(number.values())
        place = {i: at for at, i in enumerate(distinct)}
        ranks, judged = np.zeros(len(examples)), []
        for i, example in enumerate(examples):
            scores_M = partner_ND[distinct] @ text_ND[i]
            own = place[number[wordings[i]]]
            ranks[i] = (~(scores_M < scores_M[own])).sum()
            first = np.where(np.arange(len(scores_M)) == own, -np.inf, scores_M).argmax()  # of the others
            said = wordings[distinct[int(first)]] if ranks[i] > 1 else wordings[i]
            row = rows[example.row]
            judged.append(Judged(row.name, row.text("text"), wordings[i], said, float(scores_M.max() - scores_M[own])))
        found = {"mrr": float((1 / ranks).mean())}
        return Judgement(found | {f"recall_at_{k}": float((ranks <= k).mean()) for k in (1, 5)}, judged)
