"""Two answers in one sequence, each behind its prompt and unseen by the other: what tasks of preference share."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from finetune.chats import chat_template, marked
from finetune.table import LeftOut, Row
from finetune.task import Example, Setup
from finetune.task import Task as Base
from model.transformer import Transformer
from training.config import TrainConfig
from training.loss import token_losses
from training.step import Batch


class Answer(NamedTuple):
    """A prompt with an answer."""

    ids: np.ndarray  # int32 (T,)
    said: np.ndarray  # bool (T,): of the answer, not of the prompt


class TwoAnswers(Base):
    """A task that compares what the model says of two answers. Its options have a `template`."""

    def __init__(self, setup: Setup, options: Any):
        super().__init__(setup, options)
        if not setup.model.causal:
            raise ValueError(f"{setup.config.kind} needs a decoder, model.causal=true")
        self._template = None

    def answer(self, row: Row, role: str, prompt: Any) -> Answer:
        """A prompt with the answer in the column `role`: texts, or lists of messages. Raises ValueError for others."""
        answer, t = row.values.get(role), self.setup.tokenizer
        if isinstance(answer, list):
            self._template = self._template or chat_template(self.setup, self.options.template)
            before = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}] if prompt else []
            return Answer(*marked(self._template, [*before, *answer], ("assistant",), last=True))
        if not isinstance(answer, str) or not answer.strip():
            raise ValueError(f"no {role} answer" if role != "completion" else "no completion")
        before = [*t.begin_ids, *t.encode(str(prompt or "")).tolist()] or [t.eos_id]
        ids = np.array([*before, *t.encode(answer).tolist(), t.eos_id], np.int32)
        return Answer(ids, np.arange(len(ids)) >= len(before))

    def cut(self, answers: Sequence[Answer], name: str, left_out: LeftOut) -> list[Answer]:
        """The answers with what fits into half of a sequence each; a note where that is not all."""
        room = self.setup.seq_len // 2
        if max(len(answer.ids) for answer in answers) > room + 1:
            left_out.add(f"longer than half of train.seq_len={self.setup.seq_len} tokens: cut", name)
        return [Answer(ids[: room + 1], said[: room + 1]) for ids, said in answers]

    def example(self, number: int, answers: Sequence[Answer], **whole: np.ndarray) -> Example:
        """The sequence of two answers that fit; `whole`: arrays (X,) of it, by their names."""
        sizes = [len(answer.ids) - 1 for answer in answers]
        joined = lambda parts, dtype: np.concatenate(parts).astype(dtype)
        mask = np.zeros(sum(sizes), np.float32)
        mask[0] = 1  # the mean of the loss is over sequences
        arrays = {
            "tokens_T": joined([ids[:-1] for ids, _ in answers], np.int32),
            "targets_T": joined([ids[1:] for ids, _ in answers], np.int32),
            "said_T": joined([said[1:] for _, said in answers], np.int32),
            "segments_T": np.repeat(np.array([1, 2], np.int32), sizes),
            "places_T": joined([np.arange(size) for size in sizes], np.int32),
            "mask_T": mask,
        }
        return Example(number, arrays | whole)

    def log_probabilities(
        self, model: Transformer, x_BTD: jax.Array, batch: Batch, config: TrainConfig, *, mean: bool = False
    ) -> jax.Array:
        """Of the two answers: float32 (B, 2), nats, a sum over tokens or their mean."""
        nll_BT = token_losses(model, x_BTD, batch["targets_BT"], config.loss_chunk).nll_BT
        own = lambda k: (batch["segments_BT"] == k) & (batch["said_BT"] > 0)
        total = lambda k: -jnp.where(own(k), nll_BT, 0).sum(1)
        count = lambda k: jnp.maximum(own(k).sum(1), 1) if mean else 1
        return jnp.stack([total(k) / count(k) for k in (1, 2)], -1)
