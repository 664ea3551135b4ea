"""What a run may set of the task that a model is tuned for. No JAX here: it is nested in every run's config."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

OWN = Path(__file__).parent / "tasks"


@dataclass(frozen=True)
class TaskConfig:
    """A labelled task: which, from which rows, in which columns."""

    kind: str = ""  # a module of finetune/tasks/, or a file.py of your own with a class Task
    head: str = ""  # model.head that the task needs; "": that of the model as it is
    path: str | None = (
        None  # CSV, TSV, JSON lines or Parquet files, by commas; or a folder with a folder for each class
    )
    columns: dict = dataclasses.field(default_factory=dict, hash=False)  # what the task asks for -> how it is called
    heldout: float = 0.1  # share of the rows that is kept for evaluation, by a hash of what they say
    heldout_path: str | None = None  # files of their own for evaluation, instead of a share
    labels: tuple[str, ...] = ()  # their names in order; empty: those of the training rows, sorted
    metric: str = ""  # which of the task's metrics picks the best checkpoint; "": its first
    options: dict = dataclasses.field(default_factory=dict, hash=False)  # of this kind alone: see its class Options

    def __post_init__(self):
        kinds = [path.stem for path in sorted(OWN.glob("[a-z]*.py"))]
        if self.kind.endswith(".py"):
            if not Path(self.kind).expanduser().is_file():
                raise ValueError(f"task.kind={self.kind}: there is no such file")
        elif self.kind not in kinds:
            asked = f"task.kind={self.kind} is" if self.kind else "task.* without a kind of task: task.kind is"
            raise ValueError(f"{asked} not one of {', '.join(kinds)}, nor a file.py of your own; task=PRESET sets it")
        if not 0 < self.heldout < 1:
            raise ValueError(f"task.heldout={self.heldout}: a share of the rows between 0 and 1, as in 0.1")
        if len(set(self.labels)) < len(self.labels):
            raise ValueError(f"task.labels={','.join(self.labels)}: a label is there twice")
        for role, column in self.columns.items():
            if not isinstance(column, str):
                raise ValueError(f"task.columns.{role}={column!r} should be the name of a column")
