"""Questions whose answer is a span of a text: where it begins and where it ends.

A text that is too long is read in windows that overlap; a window without the answer points at its first token, and the
window that is surest answers. Judged by exact match and F1 of words, as SQuAD has them (Rajpurkar et al. 2016, 2018).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from finetune.metrics import exact_match, words_f1
from finetune.table import LeftOut, Row
from finetune.task import Example, Judged, Judgement, Setup
from finetune.task import Task as Base
from model.transformer import Transformer
from training.config import TrainConfig
from training.loss import LossSums
from training.step import Batch

NOWHERE = -1e30  # the logit of a token that no answer begins or ends at


@dataclass(frozen=True)
class Options:
    """Settings task.options.* of this task."""

    stride: int = 64  # tokens of a text that two neighbouring windows share
    question: int = 64  # tokens of a question at most
    answer: int = 30  # tokens of an answer at most
    unanswerable: bool = False  # rows without an answer are questions that the text does not answer

    def __post_init__(self):
        if self.stride < 0 or self.question < 1 or self.answer < 1:
            raise ValueError("task.options: stride must be 0 or more, question and answer 1 or more")


@dataclass(frozen=True)
class Window:
    """The part of a text that an example holds."""

    first: int  # token of the sequence at which it begins
    places_N2: np.ndarray  # where each of its tokens begins and ends in the text, in characters
    answers: list[tuple[int, int]]  # where the answers begin and end in the text; none where it does not answer


class Task(Base):
    """Extractive question answering."""

    Options = Options
    columns = {"question": "question", "context": "context", "answers": "answers"}
    optional = ("start",)
    metrics = {"f1": 1, "exact_match": 1, "loss": -1}

    def __init__(self, setup: Setup, options: Options):
        super().__init__(setup, options)
        self.labels = ("begin", "end")
        if setup.model.causal:
            raise ValueError("span_qa needs an encoder, model.causal=false: a decoder's first tokens know no end")

    def find_labels(self, rows: Sequence[Row]) -> tuple[str, ...]:
        """The two outputs of the head."""
        return ("begin", "end")

    def encode(self, rows: Sequence[Row], left_out: LeftOut) -> list[list[Example]]:
        """The windows of each row."""
        encode = self.setup.tokenizer.encode_places
        questions = [ids for ids, _ in encode([row.text("question") for row in rows])]
        contexts = encode([str(row.values.get("context") or "") for row in rows])
        return [self._windows(i, row, questions[i], *contexts[i], left_out) for i, row in enumerate(rows)]

    def _windows(self, number: int, row: Row, question, context, places_N2, left_out: LeftOut) -> list[Example]:
        begin, end = self.setup.tokenizer.begin_ids, self.setup.tokenizer.end_ids
        if not len(question) or not len(context):
            left_out.add("without a question or a text: left out", row.name)
            return []
        if (answers := self._answers(row, left_out)) is None:
            return []
        if len(question) > self.options.question:
            left_out.add(f"with a question longer than {self.options.question} tokens: cut", row.name)
        head = [*begin, *question[: self.options.question].tolist(), *end]
        room = self.setup.seq_len - len(head) - len(end)
        if room <= self.options.stride:
            raise ValueError(
                f"train.seq_len={self.setup.seq_len} leaves {room} tokens for the text, and windows share "
                f"task.options.stride={self.options.stride}: set a longer one or a smaller stride"
            )
        made, step = [], room - self.options.stride
        for first in range(0, max(1, len(context) - self.options.stride), step):
            part, places = context[first : first + room], places_N2[first : first + room]
            ids = np.array([*head, *part.tolist(), *end], np.int32)
            targets, allowed = np.zeros(len(ids), np.int32), np.zeros(len(ids), np.int32)
            allowed[0], allowed[len(head) : len(head) + len(part)] = 1, 1
            ends = _ends(places, answers[0]) if answers else None
            b, e = (0, 0) if ends is None else (len(head) + ends[0], len(head) + ends[1])
            targets[b] += 1
            targets[e] += 2
            mask = np.zeros(len(ids), np.float32)
            mask[0] = 1
            arrays = {"tokens_T": ids, "targets_T": targets, "allowed_T": allowed, "mask_T": mask}
            if self.setup.model.token_types:
                arrays["types_T"] = (np.arange(len(ids)) >= len(head)).astype(np.int32)
            made.append(Example(number, arrays, about=Window(len(head), places, answers)))
        return made

    def _answers(self, row: Row, left_out: LeftOut) -> list[tuple[int, int]] | None:
        """Where the answers of a row stand in its text, none of a question that the text does not answer; None, and a
        note, of a row that cannot be used.
        """
        context = str(row.values.get("context") or "")
        try:
            said = answers_of(row)
        except ValueError as error:
            left_out.add(f"refused ({error}): left out", row.name)
            return None
        found = [(text, start, place_of(context, text, start)) for text, start in said]
        there = [(place, place + len(text)) for text, _, place in found if place >= 0]
        if not there and (said or not self.options.unanswerable):
            what = "whose answer does not stand in the text" if said else "without an answer"
            left_out.add(f"{what}: left out", row.name)
            return None
        if len(there) < len(said):
            left_out.add("with one of several answers that does not stand in the text: without that one", row.name)
        if any(start not in (None, place) for _, start, place in found if place >= 0):
            left_out.add("whose answer does not stand at its start: taken from where it first does", row.name)
        return there

    def loss(self, model: Transformer, x_BTD: jax.Array, batch: Batch, config: TrainConfig) -> LossSums:
        """The mean of the cross-entropies of the beginning and the end, over the tokens of the window."""
        loss_B, right_B = _losses(_logits(model, x_BTD, batch), batch)
        counts_B = batch["mask_BT"].sum(1)
        return LossSums((loss_B * counts_B).sum(), jnp.zeros(()), (right_B * counts_B).sum())

    def answers(self, model: Transformer, x_BTD: jax.Array, batch: Batch, config: TrainConfig) -> dict[str, jax.Array]:
        """How likely each token is the beginning and the end, (B, T, 2), and the loss of each window."""
        logits_BT2 = _logits(model, x_BTD, batch)
        return {"logits_BT": logits_BT2, "loss_B": _losses(logits_BT2, batch)[0]}

    def judge(self, rows: Sequence[Row], examples: Sequence[Example], answers: Mapping[str, np.ndarray]) -> Judgement:
        """Exact match and F1 of each question, by the best of its answers."""
        places = {example.row: example.about.answers for example in examples}
        best: dict[int, tuple[float, str, float]] = {}  # row -> how sure, the answer, the loss
        for example, logits_T2, loss in zip(examples, answers["logits_BT"], answers["loss_B"], strict=True):
            context = str(rows[example.row].values["context"])
            sure, text = self._best(example.about, logits_T2, context)
            before = best.get(example.row, (-np.inf, "", 0.0))
            text = (sure, text) if sure > before[0] else before[:2]
            best[example.row] = (*text, max(float(loss), before[2]))
        matches, f1s, judged = [], [], []
        for number, (_, said, loss) in best.items():
            row = rows[number]
            context = str(row.values["context"])
            truths = [context[s:e] for s, e in places[number]] or [""]
            matches.append(max(exact_match(said, truth) for truth in truths))
            f1s.append(max(words_f1(said, truth) for truth in truths))
            truth = said if matches[-1] else truths[0]  # any of them is right
            judged.append(Judged(row.name, f"{row.text('question')} | {context}", truth, said, loss))
        return Judgement({"f1": float(np.mean(f1s)), "exact_match": float(np.mean(matches))}, judged)

    def _best(self, window: Window, logits_T2: np.ndarray, context: str) -> tuple[float, str]:
        """The likeliest span of a window beside pointing at its first token, how much likelier it is, and its text."""
        size = len(window.places_N2)
        scores_NN = logits_T2[window.first :][:size, 0][:, None] + logits_T2[window.first :][:size, 1][None]
        legal_NN = np.triu(np.ones((size, size), bool)) & ~np.triu(np.ones((size, size), bool), self.options.answer)
        b, e = np.unravel_index(np.where(legal_NN, scores_NN, -np.inf).argmax(), scores_NN.shape)
        sure = float(scores_NN[b, e] - logits_T2[0].sum())
        if sure < 0 and self.options.unanswerable:
            return sure, ""
        return sure, context[window.places_N2[b, 0] : window.places_N2[e, 1]]


def answers_of(row: Row) -> list[tuple[str, int | None]]:
    """The answers of a row, each with the character at which it is said to begin, if that is said.

    As SQuAD is spread ({"text": [...], "answer_start": [...]}), as its own files have them (a list of
    {"text", "answer_start"}), or as texts, with the column `start`. Raises ValueError for anything else.
    """
    value, starts = row.values.get("answers"), row.values.get("start")
    if isinstance(value, dict):
        value, starts = value.get("text"), value.get("answer_start")
    listed = [] if value is None else list(value) if isinstance(value, list | tuple) else [value]
    if all(isinstance(one, dict) for one in listed):
        listed, starts = [one.get("text") for one in listed], [one.get("answer_start") for one in listed]
    if not all(isinstance(one, str | int | float) for one in listed if one is not None):
        raise ValueError("answers that are neither texts nor {text, answer_start}")
    starts = list(starts) if isinstance(starts, list | tuple) else [starts]
    starts = starts if len(starts) == len(listed) else [None] * len(listed)
    starts = [int(start) if str(start).isdecimal() else None for start in starts]
    return [
        (str(one), start) for one, start in zip(listed, starts, strict=True) if one is not None and str(one).strip()
    ]


def place_of(context: str, answer: str, start: int | None) -> int:
    """The character at which an answer stands: at its start, or else where it first does; -1 where it does not."""
    return start if start is not None and context.startswith(answer, start) else context.find(answer)


def _ends(places_N2: np.ndarray, answer: tuple[int, int]) -> tuple[int, int] | None:
    """The tokens that an answer begins and ends in; None where it is not all inside of the window."""
    begins, ends = np.flatnonzero(places_N2[:, 1] > answer[0]), np.flatnonzero(places_N2[:, 0] < answer[1])
    if not len(begins) or not len(ends) or places_N2[0, 0] > answer[0] or places_N2[-1, 1] < answer[1]:
        return None
    return (int(begins[0]), int(ends[-1])) if begins[0] <= ends[-1] else None


def _logits(model: Transformer, x_BTD: jax.Array, batch: Batch) -> jax.Array:
    return jnp.where(batch["allowed_BT"][..., None] > 0, model.label_logits(x_BTD), NOWHERE)


def _losses(logits_BT2: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """The loss of each sequence, and 1 where both ends are right."""
    is_BT2 = jnp.stack([batch["targets_BT"] & 1, batch["targets_BT"] >> 1], -1) > 0
    log_BT2 = jax.nn.log_softmax(logits_BT2, axis=1)
    best_B12 = logits_BT2.max(1, keepdims=True)
    right_B = (jnp.where(is_BT2, logits_BT2, -jnp.inf).max(1, keepdims=True) >= best_B12).all((1, 2))
    return -jnp.where(is_BT2, log_BT2, 0).sum((1, 2)) / 2, right_B.astype(jnp.float32)
