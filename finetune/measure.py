"""A trained model on rows of its task: what `python -m evaluation` tells of it."""

from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp

from config.schema import Config
from data.tokenizer import Tokenizer
from finetune.examples import Table, digest_of
from finetune.judge import Answers
from finetune.opening import encoded, open_task, read_sides
from finetune.reference import read_reference
from finetune.table import LeftOut, read_rows
from finetune.task import Judgement, Task
from model.transformer import Description


@dataclass(frozen=True, eq=False)
class Question:
    """Rows to judge a model by."""

    task: Task
    table: Table
    digest: str  # of the examples
    source: str  # where the rows come from


def question(config: Config, tokenizer: Tokenizer, folder: Path, path: str = "", limit: int | None = None) -> Question:
    """The held-out rows of the run in `folder`, or all rows of the files at `path`.

    Raises ValueError for what the user can mend.
    """
    if config.task is None:
        raise ValueError("the run has no task of its own: it was pretrained on text")
    task, c, left_out = open_task(config, tokenizer), config.task, LeftOut()
    if task.reads_text:
        raise ValueError(f"{c.kind} reads text and has no rows to be judged by: see eval/loss of the run")
    if path:
        rows = read_rows(path, {**task.columns, **c.columns}, task.optional, "task", left_out)
    else:
        rows = read_sides(c, task, left_out)[1]
    table = encoded(task, rows, "held-out", left_out)
    if task.wants_reference:
        read_reference({"heldout": table}, folder)
    table = table if limit is None else table.first(limit)
    return Question(task, table, digest_of(table.examples), path or f"held-out rows of {c.heldout_path or c.path}")


def measured(asked: Question, config: Config, description: Description, params: dict, dtype: jnp.dtype) -> Judgement:
    """How the parameters answer, on the mesh in context; the mean loss is among the metrics."""
    train = replace(config.train, compute_dtype=dtype.name)
    with jax.set_mesh(jax.sharding.get_mesh()):
        loss, judgement = Answers(asked.task, description, train, asked.table).judgement(params)
    return replace(judgement, metrics={**judgement.metrics, "loss": loss})
