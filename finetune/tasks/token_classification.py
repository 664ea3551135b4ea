"""A tag for each word, as for names in a text: BIO tags, judged by whole spans.

A word's tag is read off its first token (off the last one of a decoder, which has seen the word by then); the word's
other tokens count nothing. Words come as a list, or as a text with spaces between them, and tags likewise.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from finetune.metrics import confusion_of, spans_report
from finetune.table import LeftOut, Row
from finetune.task import Example, Judged, Judgement
from finetune.task import Task as Base
from finetune.texts import of_words
from model.transformer import Transformer
from training.config import TrainConfig
from training.loss import LossSums
from training.step import Batch

OUTSIDE = "O"
SHOWN = 300  # labels with which a confusion matrix is still one for a person


class Task(Base):
    """Tags of words."""

    columns = {"words": "words", "tags": "tags"}
    metrics = {"f1": 1, "precision": 1, "recall": 1, "accuracy": 1, "loss": -1}

    def find_labels(self, rows: Sequence[Row]) -> tuple[str, ...]:
        """All tags: first the one of words outside of any span, then the others, sorted."""
        found = {tag for row in rows for tag in listed(row, "tags")}
        return tuple(sorted(found, key=lambda tag: (tag != OUTSIDE, tag)))

    def encode(self, rows: Sequence[Row], left_out: LeftOut) -> list[list[Example]]:
        """One example of each row that has as many known tags as words."""
        words = [listed(row, "words") for row in rows]
        tokens = of_words(self.setup, words)
        return [self._example(i, row, words[i], tokens[i], left_out) for i, row in enumerate(rows)]

    def _example(self, number: int, row: Row, words: list[str], tokens: list[np.ndarray], left_out: LeftOut):
        tags = listed(row, "tags")
        if not words or len(words) != len(tags):
            left_out.add("without a tag for each word: left out" if words else "without words: left out", row.name)
            return []
        if strange := next((tag for tag in tags if tag not in self.labels), None):
            left_out.add(f"with a tag that is none of task.labels ({strange}): left out", row.name)
            return []
        begin, end = self.setup.tokenizer.begin_ids, self.setup.tokenizer.end_ids
        room, at, ids, places = self.setup.seq_len - len(end), len(begin), [*begin], []
        for part in tokens:
            if at + len(part) > room:
                break
            places.append((at + len(part) - 1 if self.setup.model.causal else at) if len(part) else -1)
            ids += part.tolist()
            at += len(part)
        ids += end
        arrays = {"tokens_T": np.array(ids, np.int32), "targets_T": np.zeros(len(ids), np.int32)}
        mask = np.zeros(len(ids), np.float32)
        for place, tag in zip(places, tags, strict=False):
            if place >= 0:
                mask[place], arrays["targets_T"][place] = 1, self.labels.index(tag)
        if not mask.any():
            fits = len(places) == len(words)
            longer = f"whose first word is longer than train.seq_len={self.setup.seq_len}"
            left_out.add(f"{'none of whose words has a token' if fits else longer}: left out", row.name)
            return []
        if len(places) < len(words):
            left_out.add(f"longer than train.seq_len={self.setup.seq_len} tokens: cut", row.name)
        if self.setup.model.token_types:
            arrays["types_T"] = np.zeros(len(ids), np.int32)
        return [Example(number, {**arrays, "mask_T": mask}, about=places)]

    def loss(self, model: Transformer, x_BTD: jax.Array, batch: Batch, config: TrainConfig) -> LossSums:
        """The cross-entropy of the tags."""
        loss_BT, right_BT, _ = _losses(model, x_BTD, batch)
        mask_BT = batch["mask_BT"]
        return LossSums((loss_BT * mask_BT).sum(), jnp.zeros(()), (right_BT * mask_BT).sum())

    def answers(self, model: Transformer, x_BTD: jax.Array, batch: Batch, config: TrainConfig) -> dict[str, jax.Array]:
        """The tag of each token, and the mean loss of each sequence."""
        loss_BT, _, said_BT = _losses(model, x_BTD, batch)
        mask_BT = batch["mask_BT"]
        return {"said_BT": said_BT, "loss_B": (loss_BT * mask_BT).sum(1) / jnp.maximum(mask_BT.sum(1), 1)}

    def judge(self, rows: Sequence[Row], examples: Sequence[Example], answers: Mapping[str, np.ndarray]) -> Judgement:
        """Precision, recall and F1 of spans; a word that was cut off is answered with no span."""
        truths, saids, judged = [], [], []
        for example, said_T, loss in zip(examples, answers["said_BT"], answers["loss_B"], strict=True):
            row = rows[example.row]
            truth = listed(row, "tags")
            said = [self.labels[said_T[place]] if place >= 0 else OUTSIDE for place in example.about]
            said += [OUTSIDE] * (len(truth) - len(said))
            truths.append(truth)
            saids.append(said)
            text = " ".join(listed(row, "words"))
            judged.append(Judged(row.name, text, " ".join(truth), " ".join(said), float(loss)))
        metrics, by_label = spans_report(truths, saids)
        names = self.labels if OUTSIDE in self.labels else (*self.labels, OUTSIDE)
        flat = lambda lists: np.array([names.index(tag) for tags in lists for tag in tags])
        confusion = confusion_of(flat(truths), flat(saids), len(names))
        accuracy = float(np.diag(confusion).sum() / confusion.sum())
        confusion = confusion if len(names) <= SHOWN and names == self.labels else None
        return Judgement(metrics | {"accuracy": accuracy}, judged, confusion, by_label)


def listed(row: Row, role: str) -> list[str]:
    """A value as a list of words."""
    value = row.values.get(role)
    return [str(word) for word in value] if isinstance(value, list | tuple) else row.text(role).split()


def _losses(model: Transformer, x_BTD: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Loss of each token's tag, 1 where it is right, and the tag that is answered."""
    logits_BTC = model.label_logits(x_BTD)
    target_BTC = jax.nn.one_hot(batch["targets_BT"], logits_BTC.shape[-1])
    said_BT = logits_BTC.argmax(-1)
    right_BT = (said_BT == batch["targets_BT"]).astype(jnp.float32)
    return -(jax.nn.log_softmax(logits_BTC) * target_BTC).sum(-1), right_BT, said_BT
