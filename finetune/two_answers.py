"""Two answers in one sequence, each behind its prompt and unseen by the other: what tasks of preference share."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from finetune.chats import chat_template, marked, messages_of
from finetune.table import LeftOut, Row
from finetune.task import Example, Setup
from finetune.task import Task as Base
from model.transformer import Transformer
from training.config import TrainConfig
from training.loss import token_losses
from training.step import Batch

Said = str | list[dict]  # a text, or messages


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

    def answer(self, prompt: Said, said: Said) -> Answer:
        """An answer behind a prompt, as `sides_of` tells them apart. Raises ValueError where the template refuses them.

        Two texts are joined as they are. Where one is messages, both go through the chat template: a text is then what
        the user, or the assistant, says.
        """
        t = self.setup.tokenizer
        if isinstance(prompt, list) or isinstance(said, list):
            self._template = self._template or chat_template(self.setup, self.options.template)
            messages = [*_messages(prompt, "user"), *_messages(said, "assistant")]
            return Answer(*marked(self._template, messages, ("assistant",), last=True))
        before = [*t.begin_ids, *t.encode(prompt).tolist()] or [t.eos_id]
        ids = np.array([*before, *t.encode(said).tolist(), t.eos_id], np.int32)
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


def sides_of(row: Row, role: str) -> tuple[Said, Said]:
    """The prompt of a row, and the answer in the column `role`: texts or messages. Raises ValueError for anything else.

    Of messages the last one is the answer, and what stands before it belongs to the prompt. They may begin with the
    prompt itself, as whole dialogues do, and it is not said twice.
    """
    prompt, said = row.values.get("prompt"), row.values.get(role)
    if isinstance(prompt, dict):
        raise ValueError("prompt: neither a text nor a list of messages")
    prompt = messages_of(row, "prompt") if isinstance(prompt, list) and prompt else str(prompt or "")
    if not isinstance(said, list):
        if not isinstance(said, str) or not said.strip():
            raise ValueError(f"no {role} answer" if role != "completion" else "no completion")
        return prompt, said
    said, before = messages_of(row, role), _messages(prompt, "user")
    asked = [str(message.get("content")).strip() for message in said[:-1] if message["role"] == "user"]
    if isinstance(prompt, str) and prompt and asked:
        if prompt.strip() not in asked:
            raise ValueError(f"{role}: a dialogue in which the user does not say the prompt")
        before = []
    whole = said if said[: len(before)] == before else [*before, *said]
    return whole[:-1], whole[-1:]


def _messages(said: Said, role: str) -> list[dict]:
    return said if isinstance(said, list) else [{"role": role, "content": said}] if said else []
