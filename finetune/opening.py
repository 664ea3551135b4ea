"""What a run learns, by its config: pretraining on text, or a task with its rows."""

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from config.build import build
from config.schema import Config, identity
from data.prepared import Progress
from data.tokenizer import Tokenizer, load_tokenizer
from finetune.config import TaskConfig
from finetune.examples import Sequences, Shuffled, Table, digest_of
from finetune.judge import TaskJudge
from finetune.reference import make_reference
from finetune.table import LeftOut, Row, is_heldout, read_rows
from finetune.task import Setup, Task
from finetune.teacher import taught
from inference.opening import labels_at
from runtime.agreement import require_same
from training.feed import Feed
from training.subject import Subject, pretraining


def open_subject(config: Config, mesh: Mesh, progress: Progress | None = None) -> Subject:
    """What a run learns; `progress` is told what is done before. Raises ValueError for what the user can mend."""
    return pretraining(config, mesh, progress) if config.task is None else finetuning(config, mesh, progress)


def finetuning(config: Config, mesh: Mesh, progress: Progress | None = None) -> Subject:
    """A task with its rows. Raises ValueError for rows that cannot be used and for settings that do not go together."""
    if task_class(config.task.kind).reads_text:
        if config.task.path:
            raise ValueError(
                f"task.path={config.task.path}: {config.task.kind} reads the text of data=..., and no rows"
            )
        return reading_text(config, mesh, progress)
    t, progress = config.train, progress or (lambda what, done, total: None)
    task = open_task(config)
    if task.whole_batch and (t.grad_accumulation > 1 or mesh.shape["pipe"] > 1):
        raise ValueError(
            f"task.kind={config.task.kind} compares the sequences of a whole batch: "
            "set train.grad_accumulation=1 and mesh.pipe=1"
        )
    progress("reading rows", 0, 3)
    rows, kept = read_sides(config.task, task, files := LeftOut())
    task.labels = config.task.labels or as_weights_have_them(config.weights.path, task.find_labels(rows))
    progress("tokenizing rows", 1, 3)
    training, heldout = encoded(task, rows, "training"), encoded(task, kept, "held-out")
    progress("tokenizing rows", 3, 3)
    digest = digest_of([*training.examples, *heldout.examples])
    require_same({"task.path": digest})
    sequences = Sequences(training, t.seq_len, packs=task.packs)
    feed = Feed(t, Shuffled(sequences, t.batch_size, config.seed), {}, mesh)
    feed.told |= told(task, training, heldout) | ({"files": files.told()} if files.counts else {})
    model = replace(config.model, labels=len(task.labels) or None)
    config = replace(config, model=model, task=replace(config.task, labels=task.labels))
    judge = lambda job, batch: TaskJudge(task, job, heldout.first(t.eval_batches * t.batch_size))
    tables = {"training": training, "heldout": heldout}
    run = identity(config)
    begin = lambda job, first, folder: task.wants_reference and make_reference(task, job, first, tables, folder, run)
    shared = Path(config.task.path).name, len(training.rows), "rows", task.loss, judge, begin
    return Subject(config, task.setup.tokenizer, feed, digest, *shared)


def reading_text(config: Config, mesh: Mesh, progress: Progress | None) -> Subject:
    """A task that reads the text of data=..., perhaps beside a teacher. Raises ValueError."""
    if not task_class(config.task.kind).wants_teacher:
        return pretraining(config, mesh, progress, lambda tokenizer: open_task(config, tokenizer).change)
    subject = pretraining(config, mesh, progress)
    task = open_task(subject.config, subject.tokenizer)
    return taught(subject, task.options, mesh, task.loss)


def open_task(config: Config, tokenizer: Tokenizer | None = None) -> Task:
    """The task of a run, without its rows; `tokenizer` where it is open already. Raises ValueError."""
    c, kind = config.task, task_class(config.task.kind)
    try:
        options = build(kind.Options, c.options, "task.options.")
    except TypeError as error:
        raise ValueError(f"task.options: {error}") from None
    if strange := next((role for role in c.columns if role not in (*kind.columns, *kind.optional)), None):
        raise ValueError(f"task.columns.{strange}: {c.kind} has columns {', '.join((*kind.columns, *kind.optional))}")
    if config.tokenizer.is_trained and tokenizer is None:
        raise ValueError(
            f"tokenizer.kind={config.tokenizer.kind} is trained on text, and a task has none: begin from weights with "
            "model.from=PATH, or set tokenizer=file tokenizer.path=PATH"
        )
    known = tokenizer or load_tokenizer(config.tokenizer)
    path = config.tokenizer.path if config.tokenizer.kind == "file" else ""
    setup = Setup(c, config.model, known, config.train.seq_len, config.seed, path or "")
    task = kind(setup, options)
    if c.metric and c.metric not in task.metrics:
        raise ValueError(f"task.metric={c.metric} is not one of {', '.join(task.metrics)}")
    task.labels = c.labels
    return task


def task_class(kind: str) -> type[Task]:
    """The class of a kind of task: of finetune/tasks/, or of a file. Raises ValueError where the file has none."""
    if not kind.endswith(".py"):
        return importlib.import_module(f"finetune.tasks.{kind}").Task
    spec = importlib.util.spec_from_file_location(Path(kind).stem, Path(kind).expanduser())
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever it raises
        raise ValueError(f"task.kind={kind}: {type(error).__name__}: {' '.join(str(error).split())}") from error
    found: Any = getattr(module, "Task", None)
    if not (isinstance(found, type) and issubclass(found, Task)) or found is Task:
        raise ValueError(f"task.kind={kind} has no class Task of its own that inherits from finetune.task.Task")
    return found


def read_sides(config: TaskConfig, task: Task, left_out: LeftOut | None = None) -> tuple[list[Row], list[Row]]:
    """The rows that are trained on, and those that are kept; a note of files that hold none.

    Raises ValueError where there are none of either.
    """
    if not config.path:
        raise ValueError("task.path is not set: the rows to train on, as in task.path=rows.csv")
    columns = {**task.columns, **config.columns}
    rows = read_rows(config.path, columns, task.optional, "task.path", left_out)
    if config.heldout_path:
        return rows, read_rows(config.heldout_path, columns, task.optional, "task.heldout_path", left_out)
    kept = [is_heldout(row, config.heldout) for row in rows]
    if all(kept) or not any(kept):
        raise ValueError(
            f"task.heldout={config.heldout} of {len(rows)} rows keeps {sum(kept)} of them for evaluation, and both "
            "sides need some: set another share, or task.heldout_path"
        )
    side = lambda wanted: [row for row, held in zip(rows, kept, strict=True) if held == wanted]
    return side(False), side(True)


def as_weights_have_them(path: str | None, labels: tuple[str, ...]) -> tuple[str, ...]:
    """These labels in the order that a head of the same ones has at a path, else as they are."""
    there = labels_at(path) if path else ()
    return there if sorted(there) == sorted(labels) else labels


def encoded(task: Task, rows: Sequence[Row], side: str, left_out: LeftOut | None = None) -> Table:
    """The examples of rows; `left_out` as it is after reading them. Raises ValueError where there is none."""
    left_out = left_out or LeftOut()
    examples = [example for made in task.encode(rows, left_out) for example in made]
    if not examples:
        raise ValueError(f"none of the {len(rows)} {side} rows can be used: {left_out.told()}")
    return Table(list(rows), examples, left_out)


def told(task: Task, training: Table, heldout: Table) -> dict[str, str]:
    """What the header says of a task's rows."""
    names = ", ".join(task.labels[:8]) + (f" and {len(task.labels) - 8} more" if len(task.labels) > 8 else "")
    found = {"held out": f"{len(heldout.rows):,} rows"} | ({"labels": names} if names else {})
    for name, table in (("training rows", training), ("held-out rows", heldout)):
        if said := table.left_out.told():
            found[name] = said
    return found
