"""What a compression cost, as a table: bytes, held-out loss, speed, each as it was measured."""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

import jax
import numpy as np


@dataclass(frozen=True)
class Side:
    """A model before or after."""

    memory: int  # bytes of all parameters on the devices, each counted once
    disk: int  # bytes of the files that hold them
    loss: float | None = None  # nats a token of held-out text
    reads: float | None = None  # tokens a second of held-out text
    writes: float | None = None  # tokens a second, one sequence
    task: dict[str, float] = field(default_factory=dict)  # metrics on held-out rows of the run's own task


@dataclass(frozen=True)
class Cost:
    """Both, and how sure the difference of the losses is."""

    before: Side
    after: Side
    stderr: float | None = None  # of the difference of the losses, over rows of text
    tokens: int = 0  # that the losses are of
    rows: int = 0  # that the task's metrics are of

    @property
    def change(self) -> float | None:
        """Of the loss, as a share of what it was."""
        return None if self.before.loss is None else self.after.loss / self.before.loss - 1

    def as_json(self) -> dict:
        """All numbers."""
        return {**asdict(self), "change": self.change}

    def table(self) -> str:
        """Lines of Markdown."""
        rows = [("on disk, MB", *(f"{side.disk / 1e6:,.2f}" for side in self.sides), self._ratio("disk"))]
        rows += [("in memory, MB", *(f"{side.memory / 1e6:,.2f}" for side in self.sides), self._ratio("memory"))]
        if self.change is not None:
            change = f"{self.change:+.3%}" + (f" (± {self.stderr / self.before.loss:.3%})" if self.stderr else "")
            rows += [("held-out loss, nats a token", *(f"{side.loss:.5f}" for side in self.sides), change)]
        for name, value in self.before.task.items():
            other, what = self.after.task[name], f"{name} of {self.rows} rows of its task"
            rows += [(what, f"{value:.4f}", f"{other:.4f}", f"{other - value:+.4f}")]
        for name, words in (("reads", "tokens/s read"), ("writes", "tokens/s written, one sequence")):
            if getattr(self.before, name) is not None:
                rows += [(words, *(f"{getattr(side, name):,.1f}" for side in self.sides), self._ratio(name))]
        lines = [("", "before", "after", "change"), ("---", "---:", "---:", "---:"), *rows]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)

    @property
    def sides(self) -> tuple[Side, Side]:
        """Before and after."""
        return self.before, self.after

    def _ratio(self, name: str) -> str:
        return f"{getattr(self.after, name) / getattr(self.before, name):.3f}x"


def paired(before_N: np.ndarray, after_N: np.ndarray) -> float | None:
    """The standard error of the mean difference of rows' losses."""
    rows = len(before_N)
    return float(np.std(after_N - before_N, ddof=1) / math.sqrt(rows)) if rows > 1 else None


def bytes_of(params: dict) -> int:
    """Of all arrays, each counted once however it is spread over devices."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def bytes_on_disk(path: Path) -> int:
    """Of a file, or of all files of a folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)
