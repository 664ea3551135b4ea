"""One text from another, as a summary or a translation, by a decoder: the next token of the target behind a prompt.

Judged by the loss, and by ROUGE, BLEU and chrF of what the model writes (packages rouge-score and sacrebleu).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from finetune.metrics import bleu, chrf, rouge
from finetune.table import LeftOut, Row
from finetune.task import Example, Judged, Judgement, Setup, Writer
from finetune.task import Task as Base
from finetune.texts import next_tokens

NAMES = {"rouge": ("rouge1", "rouge2", "rougeL"), "bleu": ("bleu",), "chrf": ("chrf",)}  # task.options.by -> metrics
MEASURES = {"rouge": rouge, "bleu": bleu, "chrf": chrf}


@dataclass(frozen=True)
class Options:
    """Settings task.options.* of this task."""

    prompt: str = "{source}\n"  # what stands before the target
    write: int = 0  # tokens that the model writes of each held-out row, to be judged; 0: none, the loss alone
    judged: int = 100  # held-out rows at most for which it writes
    by: tuple[str, ...] = ("rouge", "bleu", "chrf")  # what the texts are judged by

    def __post_init__(self):
        if "{source}" not in self.prompt:
            raise ValueError(f"task.options.prompt={self.prompt!r} has no {{source}} in it")
        if self.write < 0 or self.judged < 1:
            raise ValueError("task.options: write must be 0 or more, judged 1 or more")
        if strange := next((name for name in self.by if name not in NAMES), None):
            raise ValueError(f"task.options.by={strange} is not one of {', '.join(NAMES)}")


class Task(Base):
    """Text to text."""

    Options = Options
    columns = {"source": "source", "target": "target"}
    packs = True

    def __init__(self, setup: Setup, options: Options):
        super().__init__(setup, options)
        written = [metric for by in options.by for metric in NAMES[by]] if options.write else []
        self.metrics = {"loss": -1, "accuracy": 1, "perplexity": -1, **dict.fromkeys(written, 1)}
        if not setup.model.causal:
            raise ValueError("seq2seq needs a decoder, model.causal=true")

    def encode(self, rows: Sequence[Row], left_out: LeftOut) -> list[list[Example]]:
        """One example of each row: the prompt, the target and an end."""
        t = self.setup.tokenizer
        prompts = t.encode_batch([self._prompt(row) for row in rows])
        targets, made = t.encode_batch([row.text("target") for row in rows]), []
        for number, row in enumerate(rows):
            if not row.text("source") or not len(targets[number]):
                left_out.add("with an empty source or target: left out", row.name)
                made.append([])
                continue
            before = np.array([*t.begin_ids, *prompts[number].tolist()], np.int32)
            ids = np.concatenate([before, targets[number], np.array([t.eos_id], np.int32)])
            counts = np.arange(len(ids)) >= len(before)
            made.append(next_tokens(self.setup, number, row.name, ids, counts, left_out, about=before))
        return made

    def _prompt(self, row: Row) -> str:
        return self.options.prompt.replace("{source}", row.text("source"))

    def judge_texts(self, rows: Sequence[Row], examples: Sequence[Example], write: Writer) -> Judgement | None:
        """ROUGE, BLEU and chrF of what the model writes behind the first prompts."""
        if not self.options.write:
            return None
        chosen = examples[: self.options.judged]
        written = write([example.about.tolist() for example in chosen], self.options.write)
        said = [self.setup.tokenizer.decode(ids).strip() for ids in written]
        truth = [rows[example.row].text("target") for example in chosen]
        found, judged = {}, []
        for name in self.options.by:
            found |= MEASURES[name](said, truth)
        for example, text, right in zip(chosen, said, truth, strict=True):
            judged.append(Judged(rows[example.row].name, rows[example.row].text("source"), right, text, 0.0))
        return Judgement(found, judged)

    def of_sums(self, loss: float, right: float) -> dict[str, float]:
        """The share of tokens that are told right, and perplexity."""
        return {"accuracy": right, "perplexity": math.exp(min(loss, 700))}
