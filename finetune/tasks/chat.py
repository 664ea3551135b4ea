"""Dialogues, through the model's own chat template: the next token of what chosen roles say.

The template is that of the weights. Dialogues share a sequence where they fit, and do not see each other.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from finetune.chats import chat_template, marked, messages_of
from finetune.table import LeftOut, Row
from finetune.task import Example, Setup
from finetune.task import Task as Base
from finetune.texts import next_tokens


@dataclass(frozen=True)
class Options:
    """Settings task.options.* of this task."""

    roles: tuple[str, ...] = ("assistant",)  # whose words are learned
    template: str = ""  # a folder or file with a chat template; "": that of the tokenizer


class Task(Base):
    """Instruction tuning."""

    Options = Options
    columns = {"messages": "messages"}
    metrics = {"loss": -1, "accuracy": 1, "perplexity": -1}
    packs = True

    def __init__(self, setup: Setup, options: Options):
        super().__init__(setup, options)
        self._template = chat_template(setup, options.template)

    def encode(self, rows: Sequence[Row], left_out: LeftOut) -> list[list[Example]]:
        """One example of each dialogue."""
        return [self._example(number, row, left_out) for number, row in enumerate(rows)]

    def _example(self, number: int, row: Row, left_out: LeftOut) -> list[Example]:
        try:
            ids, counts = marked(self._template, messages_of(row, "messages"), self.options.roles)
        except ValueError as error:
            left_out.add(f"refused ({error}): left out", row.name)
            return []
        return next_tokens(self.setup, number, row.name, ids, counts, left_out)

    def of_sums(self, loss: float, right: float) -> dict[str, float]:
        """The share of tokens that are told right, and perplexity."""
        return {"accuracy": right, "perplexity": math.exp(min(loss, 700))}
