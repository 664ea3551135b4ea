"""What the first model says of each example, computed once and kept: what preference tuning compares with."""

import hashlib
import json
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


def make_reference(
    task: Task, job: Job, first: Callable[[], dict], tables: dict[str, Table], folder: Path, run: dict
) -> None:
    """Puts reference_BX beside the examples of all tables: from the run's folder, or of the parameters `first`.

    run: what decides the run's numbers. A folder may hold the reference of a run that never took a step, and another
    run in its place makes its own. All processes call it.
    """
    if not agreed(lambda: is_kept(tables, folder, run)):
        found = {}
        with job.for_inference(first()) as (description, params):
            for name, table in tables.items():
                table.beside.clear()
                found[name] = Answers(task, description, job.train, table).of(params)[1]["said_BX"]
        agreed(lambda: _write(folder / FILE, found, tables, run))
    read_reference(tables, folder)


def is_kept(tables: dict[str, Table], folder: Path, run: dict | None = None) -> bool:
    """Whether the folder holds the reference of exactly these examples, and of this run where one is given."""
    if not (folder / FILE).is_file():
        return False
    with np.load(folder / FILE) as kept:
        if run is not None and str(kept.get("run digest", "")) != _digest(run):
            return False
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


def _write(path: Path, found: dict[str, np.ndarray], tables: dict[str, Table], run: dict) -> None:
    digests = {f"{name} digest": np.array(digest_of(table.examples)) for name, table in tables.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.partial.npz")
    np.savez(beside, **found, **digests, **{"run digest": np.array(_digest(run))})
    beside.replace(path)


def _digest(run: dict) -> str:
    return hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()[:32]
