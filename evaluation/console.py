"""What a person sees while a model is measured, and then: bars on stderr, tables on stdout."""

import contextlib
import math

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from evaluation.results import Metric, Result
from evaluation.scoring import Progress as Report


class Progressing(contextlib.AbstractContextManager):
    """Bars, one for each piece of work, where stderr is a terminal."""

    def __init__(self):
        console = Console(stderr=True)
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)

    def __enter__(self) -> "Progressing":
        self._progress.start()
        return self

    def __exit__(self, *exception) -> None:
        self._progress.stop()

    def named(self, what: str) -> Report:
        """What tells of the progress of one piece of work."""
        task = self._progress.add_task(what, total=None)
        return lambda done, total: self._progress.update(task, completed=done, total=total)


def print_result(result: Result) -> None:
    """Prints a table with a row for each metric of each task, with its standard error."""
    table = Table("task", "items", "metric", "value", "standard error")
    for column in (1, 3, 4):
        table.columns[column].justify = "right"
    for name, task in result.tasks.items():
        for number, (metric, value) in enumerate(task.metrics.items()):
            first = ("", "") if number else (name, f"{task.count:,}")
            table.add_row(*first, metric, number_text(value.value), error_text(value))
    console = Console()
    console.print(table)


def number_text(value: float) -> str:
    """Four digits behind the point, or four in all of a large number."""
    return f"{value:.4f}" if abs(value) < 1000 or not math.isfinite(value) else f"{value:.4g}"


def error_text(metric: Metric) -> str:
    """The standard error, where it is known."""
    return "" if metric.stderr is None else f"± {number_text(metric.stderr)}"
