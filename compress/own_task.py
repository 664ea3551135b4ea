"""A run's own task, where it has one: its rows to calibrate with, and its metrics before and after."""

from dataclasses import replace

import numpy as np

from compress.cost import Cost
from finetune.measure import Question, measured, question
from finetune.opening import encoded, open_task, read_sides
from inference.opening import Found, Opened


def question_of(found: Found, rows: int) -> Question | None:
    """The first of the held-out rows of a run's own task, to judge it by; None where it has none or none are wanted.

    Raises ValueError or OSError, as where the rows are gone.
    """
    return question(found.config, found.tokenizer, found.path, limit=rows) if rows and _has_rows(found) else None


def tokens_of(found: Found) -> dict[str, np.ndarray] | None:
    """The tokens of all rows one after the other, int32, by split: train and heldout; None where there are none."""
    if not _has_rows(found):
        return None
    task = open_task(found.config, found.tokenizer)
    sides = zip(("train", "heldout"), ("training", "held-out"), read_sides(found.config.task, task), strict=True)
    examples = {split: encoded(task, rows, name).examples for split, name, rows in sides}
    return {split: np.concatenate([e.arrays["tokens_T"] for e in made]) for split, made in examples.items()}


def with_task(cost: Cost, asked: Question, before: Opened, after: Opened) -> Cost:
    """With how both models do in the task, on the mesh in context."""
    sides = []
    for side, one in zip(cost.sides, (before, after), strict=True):
        found = measured(asked, one.config, one.description, one.params, one.dtype).metrics
        names = dict.fromkeys((*asked.task.metrics, *found))  # the one that picks the best checkpoint first
        sides.append(replace(side, task={name: found[name] for name in names if name in found}))
    return replace(cost, before=sides[0], after=sides[1], rows=len({one.row for one in asked.table.examples}))


def _has_rows(found: Found) -> bool:
    return found.config.task is not None and not open_task(found.config, found.tokenizer).reads_text
