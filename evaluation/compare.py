"""Results of several models side by side: a table and a picture, differences paired by item."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from evaluation.console import error_text, number_text
from evaluation.results import Metric, Outcome, Result, read_result, residuals, spread
from tracking.run import names


@dataclass(frozen=True)
class Side:
    """All that is known of one model: the newest result of each task."""

    name: str
    results: dict[str, Result]

    def outcome(self, task: str) -> Outcome | None:
        """Its newest outcome of a task; None where it has none."""
        result = self.results.get(task)
        return None if result is None else result.tasks[task]


@dataclass(frozen=True)
class Difference:
    """Of a metric between two models."""

    value: float
    stderr: float | None
    pairs: int  # items that both answered; 0: the error takes the two as independent


def read_side(path: Path, name: str) -> Side:
    """A result's file, or all in a run's directory. Raises ValueError where there is none."""
    files = sorted((path / "evaluation").glob("*.json"), key=lambda file: file.stat().st_mtime)
    if not path.is_dir():
        files = [path]
    if not files:
        raise ValueError(f"{path} has no results: run python -m evaluation {path} TASK")
    found: dict[str, Result] = {}
    for file in files:
        result = read_result(file)
        for task in result.tasks:
            if task not in found or (result.model["step"] or 0) >= (found[task].model["step"] or 0):
                found[task] = result
    return Side(name, found)


def difference(ours: Outcome, theirs: Outcome, metric: str) -> Difference:
    """ours - theirs: over the items that both have, paired; where there are none, of the values, as if independent."""
    a, b = ours.metrics[metric], theirs.metrics[metric]
    mine, other = _numbered(ours.ids), _numbered(theirs.ids)
    common = [one for one in mine if one in other]
    if len(common) < 2 or a.numerator is None or b.numerator is None:
        errors = (a.stderr, b.stderr)
        error = None if None in errors else math.hypot(*errors)
        return Difference(a.value - b.value, error, 0)
    ratios = []
    for outcome, metric_, places in ((ours, a, mine), (theirs, b, other)):
        at = [places[one] for one in common]
        above = outcome.items[metric_.numerator][at].astype(float)
        below = None if metric_.denominator is None else outcome.items[metric_.denominator][at].astype(float)
        total = len(at) if below is None else below.sum()
        ratios.append((metric_.scale * above.sum() / total, residuals(above, below, metric_.scale)))
    (x, dx), (y, dy) = ratios
    return Difference(float(x - y), spread(dx - dy), len(common))


def _numbered(ids: Sequence[str]) -> dict[tuple[str, int], int]:
    """Where each item stands; one that is there twice is two items."""
    seen, places = Counter(), {}
    for place, one in enumerate(ids):
        places[one, seen[one]] = place
        seen[one] += 1
    return places


def compare(paths: Sequence[Path], png: Path | None = None) -> None:
    """Prints the table, and draws the picture. Raises ValueError where there is nothing to compare."""
    labels = names([path if path.is_dir() else path.with_suffix("") for path in paths])
    sides = [read_side(path, name) for path, name in zip(paths, labels, strict=True)]
    rows = shared_rows(sides)
    Console().print(table(sides, rows))
    for note in notes(sides, rows):
        print(note)
    if png:
        draw(sides, rows, png)
        print(png)


def shared_rows(sides: Sequence[Side]) -> list[tuple[str, str]]:
    """(task, metric) that all have. Raises ValueError where there are none."""
    first = sides[0]
    rows = [
        (task, metric)
        for task in first.results
        for metric in first.outcome(task).metrics
        if all((other := side.outcome(task)) is not None and metric in other.metrics for side in sides)
    ]
    if not rows:
        have = "; ".join(f"{side.name}: {', '.join(side.results)}" for side in sides)
        raise ValueError(f"no task has been measured in all of them ({have})")
    return rows


def table(sides: Sequence[Side], rows: Sequence[tuple[str, str]]) -> Table:
    """Values with standard errors; of every further model its difference to the first, in standard errors too."""
    made = Table(title=None)
    for column in ("task", "metric", *(side.name for side in sides)):
        made.add_column(column, justify="left" if column in ("task", "metric") else "right")
    for side in sides[1:]:
        made.add_column(f"{side.name} − {sides[0].name}", justify="right")
    before = None
    for task, metric in rows:
        outcomes = [side.outcome(task) for side in sides]
        cells = [_cell(outcome.metrics[metric]) for outcome in outcomes]
        cells += [_difference_cell(difference(outcome, outcomes[0], metric)) for outcome in outcomes[1:]]
        made.add_row(task if task != before else "", metric, *cells)
        before = task
    return made


def _cell(metric: Metric) -> str:
    return f"{number_text(metric.value)} {error_text(metric)}".strip()


def _difference_cell(found: Difference) -> str:
    text = f"{found.value:+.4f}"
    if found.stderr:
        text += f" ± {number_text(found.stderr)} ({found.value / found.stderr:+.1f} se)"
    return text if found.pairs else f"{text} unpaired"


def notes(sides: Sequence[Side], rows: Sequence[tuple[str, str]]) -> list[str]:
    """What makes a comparison less than one of the models alone."""
    found = []
    for task in dict.fromkeys(task for task, _ in rows):
        first = sides[0].results[task]
        for side in sides[1:]:
            other = side.results[task]
            apart = [f"{key} {first.settings.get(key)} and {other.settings.get(key)}" for key in first.settings]
            apart = [one for key, one in zip(first.settings, apart, strict=True) if _differ(first, other, key)]
            if first.tasks[task].digest != other.tasks[task].digest:
                apart.append("the task or its items")
            if apart:
                found.append(f"note: {task} of {sides[0].name} and {side.name} differs in {'; '.join(apart)}")
    return found


def _differ(one: Result, other: Result, key: str) -> bool:
    return one.settings.get(key) != other.settings.get(key)


def draw(sides: Sequence[Side], rows: Sequence[tuple[str, str]], png: Path) -> None:
    """A picture with a panel for each metric: values of all models with bars of one standard error.

    Raises ValueError without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("--png needs matplotlib: install the extra `evaluation`") from None
    metrics = list(dict.fromkeys(metric for _, metric in rows))
    of_metric = {metric: [task for task, other in rows if other == metric] for metric in metrics}
    heights = [0.6 + 0.22 * len(sides) * len(of_metric[metric]) for metric in metrics]
    figure = Figure(figsize=(8, sum(heights) + 0.6 * len(metrics) + 0.4), layout="constrained")
    panels = figure.subplots(len(metrics), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, metric in zip(panels, metrics, strict=True):
        tasks = of_metric[metric]
        for number, side in enumerate(sides):
            values = [side.outcome(task).metrics[metric] for task in tasks]
            y = np.arange(len(tasks)) + (number - (len(sides) - 1) / 2) * 0.7 / len(sides)
            errors = [value.stderr or 0 for value in values]
            panel.errorbar([v.value for v in values], y, xerr=errors, fmt="o", markersize=4, capsize=3, label=side.name)
        panel.set_yticks(np.arange(len(tasks)), tasks)
        panel.invert_yaxis()
        panel.set_ylim(len(tasks) - 0.5, -0.5)
        panel.set_xlabel(f"{metric} (± one standard error)")
        panel.grid(axis="x", alpha=0.3)
    panels[0].legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=min(4, len(sides)), frameon=False)
    temporary = png.with_name(f"{png.name}.tmp")
    figure.savefig(temporary, format=png.suffix.lstrip(".") or "png", dpi=100)
    temporary.replace(png)
