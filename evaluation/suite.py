"""Tasks of the lm-evaluation-harness from local files, and what they say of a model."""

import hashlib
import json
import numbers
from collections.abc import Callable
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict
from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from evaluation.harness import MeshModel
from evaluation.options import SUITE, own_tasks
from evaluation.results import Metric, Outcome, digest_of, ratio

FEWSHOT_SEED = 1234  # the harness's own
BOOTSTRAPS = 200  # draws for metrics whose standard error has no formula
NUMBERS = (numbers.Real, np.bool_)


def load_tasks(names: list[str]) -> dict[str, Task]:
    """The tasks of these names: `offline` or one of its tasks, a YAML file, a folder of them, or one of the harness's.

    Data files of a YAML are looked for beside it. Those of the harness's own tasks need a network. Raises ValueError.
    """
    found: dict[str, Task] = {}
    for name in names:
        for one in _load(name):
            if one.task_name in found:
                raise ValueError(f"two tasks are called {one.task_name}; the second comes with {name}")
            if getattr(one, "UNSAFE_CODE", False):
                raise ValueError(f"{one.task_name} runs code that the model wrote: not here; see humaneval")
            found[one.task_name] = one
    return found


def _load(name: str) -> list[Task]:
    path, manager = Path(name).expanduser(), TaskManager(include_defaults=False)
    own = own_tasks()
    if name == SUITE:
        return [_from_yaml(manager, file) for file in own.values()]
    if name in own:
        return [_from_yaml(manager, own[name])]
    if path.is_dir():
        files = sorted(path.glob("*.yaml"))
        if not files:
            raise ValueError(f"{path} has no task: it holds no .yaml file")
        return [_from_yaml(manager, file) for file in files]
    if path.suffix in (".yaml", ".yml"):
        return [_from_yaml(manager, path)]
    return _from_harness(name)


def _from_yaml(manager: TaskManager, path: Path) -> Task:
    try:
        settings = load_yaml(path)
        if not isinstance(settings.get("task"), str):
            raise ValueError("it has no task: NAME; a group is given as a folder of tasks")
        (task,) = manager.load([_with_data(settings, path.parent)])["tasks"].values()
        return task
    except OSError as error:
        raise ValueError(f"{error.filename or path}: {error.strerror or error}") from error
    except Exception as error:  # what the harness raises for a wrong key or template is anything
        raise ValueError(f"{path}: {type(error).__name__}: {' '.join(str(error).split())[:300]}") from error


def _with_data(settings: dict, folder: Path) -> dict:
    """The task's settings with its data files found beside the YAML; JSON lines are read here, without a cache."""
    arguments = dict(settings.get("dataset_kwargs") or {})
    files = arguments.get("data_files")
    if settings.get("dataset_path") not in ("json", "csv", "parquet", "text") or not files:
        return settings
    files = files if isinstance(files, dict) else {"train": files}
    beside = {split: [str(folder / file) for file in _listed(names)] for split, names in files.items()}
    if settings["dataset_path"] == "json" and all(
        file.endswith(".jsonl") for these in beside.values() for file in these
    ):
        rows = {split: [row for file in names for row in _json_lines(Path(file))] for split, names in beside.items()}
        read = lambda **_: DatasetDict({split: Dataset.from_list(these) for split, these in rows.items()})
        return settings | {"custom_dataset": read, "dataset_kwargs": None}
    return settings | {"dataset_kwargs": arguments | {"data_files": beside}}


def _listed(names: str | list[str]) -> list[str]:
    return [names] if isinstance(names, str) else names


def _json_lines(path: Path) -> list[dict]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path.name}, line {number}: not JSON: {error}") from None
        if not isinstance(rows[-1], dict):
            raise ValueError(f"{path.name}, line {number}: not an object")
    return rows


def _from_harness(name: str) -> list[Task]:
    manager = TaskManager()
    if name not in manager.all_tasks:
        own = ", ".join([SUITE, *own_tasks()])
        raise ValueError(f"unknown task {name}; choose {own}, a YAML file, or a task of the harness (lm_eval ls tasks)")
    try:
        return list(manager.load([name])["tasks"].values())
    except Exception as error:  # its data come from a network
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"task {name}: its data cannot be had: {type(error).__name__}: {reason}") from error


def run_tasks(model: MeshModel, tasks: dict[str, Task], limit: int | None = None) -> dict[str, Outcome]:
    """What the harness finds, with standard errors over items and the values of each item. limit: items of a task."""
    for task in tasks.values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
        task._instances = None  # of an evaluation before this one
    found = evaluate(model, {"tasks": tasks, "groups": {}, "group_map": {}}, limit=limit, bootstrap_iters=0)
    return {name: _outcome(task, found) for name, task in tasks.items()}


def _outcome(task: Task, found: dict) -> Outcome:
    name, metrics, items = task.task_name, {}, {}
    samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    filters = list(dict.fromkeys(sample["filter"] for sample in samples))
    ids = [sample["doc_hash"] for sample in samples if sample["filter"] == filters[0]]
    better = found["higher_is_better"][name]
    for key, value in found["results"][name].items():
        metric, comma, filter_ = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, numbers.Real):
            continue
        label = metric if filter_ == "none" else f"{metric}/{filter_}"
        values = [sample[metric] for sample in samples if sample["filter"] == filter_ and metric in sample]
        metrics[label] = Metric(float(value), None, better.get(metric) is not False)
        if len(values) == len(ids) and all(isinstance(one, NUMBERS) for one in values):
            items[label] = np.array(values, float)
            mean = ratio(items, label, higher_is_better=better.get(metric) is not False)
            if np.isclose(mean.value, value, rtol=1e-9, atol=1e-12):
                metrics[label] = mean
                continue
        error = _bootstrap(task.aggregation().get(metric), values)
        metrics[label] = Metric(float(value), error, better.get(metric) is not False)
    return Outcome(metrics, items, ids, digest_of_task(task, ids))


def _bootstrap(aggregate: Callable | None, values: list) -> float | None:
    """The standard error of an aggregate over items, by drawing them anew (Efron 1979)."""
    if aggregate is None or len(values) < 2:
        return None
    draw = np.random.default_rng(0)
    drawn = [[values[i] for i in draw.integers(0, len(values), len(values))] for _ in range(BOOTSTRAPS)]
    return float(np.std([aggregate(one) for one in drawn], ddof=1))


def digest_of_task(task: Task, ids: list[str]) -> str:
    """Of the definition of a task, the items that were asked, and what its examples are drawn from."""
    settings = task.config.to_dict(keep_callable=False)
    settings = {key: value for key, value in settings.items() if key not in ("custom_dataset", "dataset_kwargs")}
    examples = ""
    if task.get_config("num_fewshot"):
        examples = digest_of([dict(row) for row in task.fewshot_docs()])
    text = json.dumps([settings, list(ids), examples], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
