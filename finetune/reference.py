"""What the first model says of each example, computed once and kept: what preference tuning compares with."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from finetune.examples import Table, digest_of
from finetune.judge import Answers
from finetune.task import Task
from runtime.agreement import agreed
from training.job import Job

FILE = "reference.npz"


def make_reference(task: Task, job: Job, first: Callable[[], dict], tables: dict[str, Table], folder: Path) -> None:
    """Puts reference_BX beside the examples of all tables: from the run's folder, or of the parameters `first`.

    All processes call it.
    """
    if not agreed(lambda: is_kept(tables, folder)):
        found = {}
        with job.for_inference(first()) as (description, params):
            for name, table in tables.items():
                table.beside.clear()
                found[name] = Answers(task, description, job.train, table).of(params)[1]["said_BX"]
        agreed(lambda: _write(folder / FILE, found, tables))
    read_reference(tables, folder)


def is_kept(tables: dict[str, Table], folder: Path) -> bool:
    """Whether the folder holds the reference of exactly these examples."""
    if not (folder / FILE).is_file():
        return False
    with np.load(folder / FILE) as kept:
        return all(str(kept.get(f"{name} digest", "")) == digest_of(table.examples) for name, table in tables.items())


def keep_reference(source: Path, folder: Path) -> None:
    """Copies the reference of a run, if it has one, to the folder of a model that is made of it."""
    if (source / FILE).is_file():
        shutil.copyfile(source / FILE, folder / FILE)


def read_reference(tables: dict[str, Table], folder: Path) -> None:
    """Puts what is kept beside the examples. Raises ValueError where it is of others."""
    if not is_kept(tables, folder):
        raise ValueError(f"{folder / FILE} holds no reference for these rows: it is kept of the run's own only")
    with np.load(folder / FILE) as kept:
        for name, table in tables.items():
            table.beside["reference_BX"] = kept[name]


def _write(path: Path, found: dict[str, np.ndarray], tables: dict[str, Table]) -> None:
    digests = {f"{name} digest": np.array(digest_of(table.examples)) for name, table in tables.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.partial.npz")
    np.savez(beside, **found, **digests)
    beside.replace(path)
