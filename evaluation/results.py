"""What an evaluation found, and its file: values with standard errors, and digests of all that they depend on."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from runtime.files import replace_text

FORMAT = 1


@dataclass(frozen=True)
class Metric:
    """One number. `value` is scale * sum(numerator) / sum(denominator) over items where these are named."""

    value: float
    stderr: float | None  # None where it is not known, as of a single item
    higher_is_better: bool = True
    numerator: str | None = None  # a key of the outcome's items
    denominator: str | None = None  # None: the number of items
    scale: float = 1.0


@dataclass(frozen=True)
class Outcome:
    """What a model did in one task: its metrics, and the items that they were computed from."""

    metrics: dict[str, Metric]
    items: dict[str, np.ndarray] = field(default_factory=dict)  # (items,) each
    ids: Sequence[str] = ()  # what each item is, the same whichever model answers
    digest: str = ""  # of the task: its definition and its data

    @property
    def count(self) -> int:
        """How many items the task has."""
        return len(self.ids)


def residuals(numerator: np.ndarray, denominator: np.ndarray | None, scale: float = 1.0) -> np.ndarray:
    """What each item adds to the error of a ratio of sums, to first order: their sum of squares is its variance.

    (Linearisation of a ratio estimator; Cochran, Sampling Techniques, 1977, chapter 6.)
    """
    denominator = np.ones(len(numerator)) if denominator is None else np.asarray(denominator, float)
    total = denominator.sum()
    return scale * (numerator - numerator.sum() / total * denominator) / total


def spread(residuals: np.ndarray) -> float | None:
    """The standard error that items' residuals make; None of fewer than two."""
    n = len(residuals)
    return None if n < 2 else math.sqrt(n / (n - 1) * float(np.square(residuals).sum()))


def ratio(
    items: Mapping[str, np.ndarray],
    numerator: str,
    denominator: str | None = None,
    *,
    scale: float = 1.0,
    higher_is_better: bool = False,
) -> Metric:
    """scale * sum(numerator) / sum(denominator), or the mean of the numerator, with its standard error over items."""
    above = np.asarray(items[numerator], float)
    below = None if denominator is None else np.asarray(items[denominator], float)
    value = scale * above.sum() / (len(above) if below is None else below.sum())
    error = spread(residuals(above, below, scale))
    return Metric(float(value), error, higher_is_better, numerator, denominator, scale)


@dataclass(frozen=True)
class Result:
    """One evaluation of one model, as its file holds it."""

    model: dict  # path, step, digests of config and weights, parameters
    settings: dict  # what changes the numbers besides model and task
    tasks: dict[str, Outcome]
    versions: dict[str, str]
    seconds: float = 0.0

    def identity(self) -> dict:
        """What decides the numbers: two results that agree here are of one evaluation."""
        named = {name: self.model.get(name) for name in ("step", "config", "weights")}
        return {"model": named, "settings": self.settings, "tasks": {n: t.digest for n, t in self.tasks.items()}}

    def text(self) -> str:
        """The file: JSON, with a line for each part, and within a task for its metrics and its items."""
        tasks = {
            name: {
                "digest": task.digest,
                "items": task.count,
                "metrics": {metric: asdict(value) for metric, value in task.metrics.items()},
                "by_item": {"id": list(task.ids)} | {key: np.asarray(x).tolist() for key, x in task.items.items()},
            }
            for name, task in self.tasks.items()
        }
        lines = lambda parts: "{\n" + ",\n".join(f"{json.dumps(name)}: {text}" for name, text in parts.items()) + "\n}"
        whole = {"format": FORMAT, **asdict(self)}
        plain = {name: json.dumps(value) for name, value in whole.items() if name != "tasks"}
        parts = {name: lines({key: json.dumps(part) for key, part in task.items()}) for name, task in tasks.items()}
        return lines(plain | {"tasks": lines(parts)}) + "\n"


def read_result(path: Path) -> Result:
    """A result's file. Raises ValueError where it is none."""
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        if body.pop("format") != FORMAT:
            raise ValueError("another format")
        tasks = {}
        for name, task in body.pop("tasks").items():
            items = dict(task["by_item"])
            metrics = {metric: Metric(**value) for metric, value in task["metrics"].items()}
            ids = items.pop("id")
            tasks[name] = Outcome(metrics, {k: np.asarray(x) for k, x in items.items()}, ids, task["digest"])
        return Result(tasks=tasks, **body)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no result of an evaluation: {type(error).__name__} {error}") from error


def keep_result(path: Path, result: Result) -> tuple[Path, bool]:
    """Writes a result's file, whole or not at all, under a longer name where another evaluation has this one.

    Returns where it is, and whether it was not there before.
    """
    if path.exists() and not _is_of(path, result):
        path = path.with_name(f"{path.stem}-{digest_of(result.identity())[:8]}{path.suffix}")
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, result.text())
    return path, new


def _is_of(path: Path, result: Result) -> bool:
    try:
        return read_result(path).identity() == result.identity()
    except ValueError:  # somebody else's file
        return False


def require_room(path: Path, tasks: Sequence[str]) -> None:
    """Raises ValueError where another evaluation's file is at the path: told before anything is measured."""
    if path.exists() and list((theirs := read_result(path)).tasks) != list(tasks):
        raise ValueError(f"{path} holds another evaluation, of {', '.join(theirs.tasks)}; choose another --json")


def digest_of(value) -> str:
    """sha256 of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
