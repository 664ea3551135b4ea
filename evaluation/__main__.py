"""Measures a trained model: python -m evaluation MODEL TASK [TASK ...] [key=value ...]; --help says more.

Tables go to stdout, everything else to stderr. Exit codes: 0 done; 2 the user's mistake, told in one line.
"""

import sys

from evaluation.options import CODE, PERPLEXITY, SETTINGS, TASK, own_tasks, parse
from runtime import leave
from runtime.exit_codes import DONE, MISTAKE

if __name__ == "__main__":
    leave.answer_signals()
    OPTIONS = parse(sys.argv[1:])  # before the slow imports: a typo is told in a fraction of a second

import argparse
import math
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from config.schema import identity
from evaluation.compare import compare
from evaluation.console import Progressing, print_result
from evaluation.needs import harness
from evaluation.perplexity import Window, perplexity
from evaluation.results import Metric, Outcome, Result, digest_of, keep_result, ratio, require_room
from evaluation.scoring import Scorer
from evaluation.sources import Source, open_sources
from evaluation.tell import tell_run
from evaluation.versions import versions
from finetune.measure import Question, question
from finetune.measure import measured as on_rows
from finetune.report import page
from inference.opening import Found, Opened, find_model
from model.counts import parameter_count
from runtime.files import replace_text
from tracking.run_directory import RunDirectory


def main(options: argparse.Namespace) -> int:
    """Does what was asked for; returns the exit code."""
    try:
        compare(options.results, options.png) if options.command == "compare" else run(options)
    except (ValueError, OSError) as error:
        print(leave.one_line(error), file=sys.stderr)
        return MISTAKE
    return DONE


def run(options: argparse.Namespace) -> None:
    """Measures a model and writes down what it found. Raises ValueError or OSError for what the user can mend."""
    began = time.perf_counter()
    found = find_model(options.model, options.overrides, SETTINGS)
    if not options.tasks and found.config.task is None:
        names = ", ".join(["offline", *own_tasks()])
        raise ValueError(f"the following arguments are required: TASK; choose {names}, perplexity:heldout, FILE.yaml")
    options.tasks = options.tasks or [TASK]
    length = options.window or found.reach
    window = Window(length, options.stride or max(1, length // 2))
    # all that can be wrong about the tasks is told before a parameter is read
    texts = [task for task in options.tasks if task.startswith(PERPLEXITY)]
    asked = {"split": options.split, "limit": options.limit}
    sources = {task: open_sources(task, found, **asked) for task in texts}
    rows = lambda task: question(found.config, found.tokenizer, found.path, task.partition(":")[2], options.limit)
    questions = {task: rows(task) for task in options.tasks if task.partition(":")[0] == TASK}
    named = [task for task in options.tasks if task not in sources and task not in questions and task != CODE]
    tasks = {name: harness().load_tasks([name]) for name in named}
    programs = problems(options) if CODE in options.tasks else []
    named_by = {task: [one.name for one in these] for task, these in sources.items()} | {CODE: [CODE]} | tasks
    named_by |= {task: [task] for task in questions}
    names = [name for argument in options.tasks for name in named_by[argument]]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"two of the tasks are called {twice}: measure them one after the other")
    if options.json:
        require_room(options.json, names)

    model = found.open(options.step)
    told = model.path if model.step is None else f"{model.path}: step {model.step}"
    print(told, file=sys.stderr)
    outcomes: dict[str, dict[str, Outcome]] = {}
    with jax.set_mesh(model.mesh), Progressing() as progressing:
        for task, asked in questions.items():
            outcomes[task] = {task: answered(asked, task, model, options)}
        if named or programs or sources:
            scorer = Scorer(model.description, model.params, model.mesh, model.dtype)
        if named or programs:
            lm = harness().MeshModel(scorer, found.tokenizer, length, found.begin, progressing.named)
        if named:
            every = {name: task for these in tasks.values() for name, task in these.items()}
            scored = harness().run_tasks(lm, every, options.limit)
            outcomes |= {argument: {name: scored[name] for name in these} for argument, these in tasks.items()}
        if programs:
            from evaluation.humaneval import solve

            outcomes[CODE] = {CODE: solve(lm, programs, progressing.named("programs"))}
        for task, these in sources.items():
            measure = lambda one: measured(scorer, one, window, found, options, progressing.named(one.name))
            outcomes[task] = {one.name: measure(one) for one in these}
    tell(options, model, window, outcomes, time.perf_counter() - began)


def problems(options: argparse.Namespace) -> list[dict]:
    """The problems of HumanEval. Raises ValueError where they are not installed."""
    harness()
    from evaluation.humaneval import read_problems

    return read_problems()[: options.limit]


def answered(asked: Question, name: str, model: Opened, options: argparse.Namespace) -> Outcome:
    """How the model does in its own task; writes the page about it into the run's directory, if it is one."""
    judgement = on_rows(asked, model.config, model.description, model.params, model.dtype)
    directory = RunDirectory(model.path)
    if directory.config.is_file():
        facts = {
            "model": str(model.path),
            "step": str(model.step),
            "rows": f"{len({one.row for one in asked.table.examples}):,}, {asked.source}",
        }
        facts |= {"left out or cut": asked.table.left_out.told() or "none"}
        part = f"-first{options.limit}" if options.limit else ""
        path = directory.path / "evaluation" / f"{file_name(name)}{part}-{model.step}.html"
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(
            path, page(f"{model.config.task.kind}: {directory.path.name}", facts, judgement, asked.task.labels)
        )
        print(f"page: {path}", file=sys.stderr)
    judged, better = judgement.judged, asked.task.metrics
    items = {
        "loss": np.array([one.loss for one in judged]),
        "right": np.array([one.truth == one.answer for one in judged]),
    }
    metrics = with_errors(judgement.metrics, better, items)
    return Outcome(metrics, items if judged else {}, [one.name for one in judged], asked.digest)


def with_errors(found: dict[str, float], better: Mapping[str, int], items: dict[str, np.ndarray]) -> dict[str, Metric]:
    """The metrics of a task, `better` as in Task.metrics; its accuracy has a standard error where it is the share of
    judged items that are right, and not one of tags or tokens.
    """
    metrics = {key: Metric(value, None, better.get(key, 1) > 0) for key, value in found.items()}
    if "accuracy" in found and len(items["right"]):
        of_items = ratio(items, "right", higher_is_better=True)
        metrics |= {"accuracy": of_items} if math.isclose(of_items.value, found["accuracy"], rel_tol=1e-5) else {}
    return metrics


def measured(scorer: Scorer, source: Source, window: Window, found: Found, options, progress) -> Outcome:
    """The perplexity of one source, with a digest of what decides it, so that only like results are compared."""
    outcome = perplexity(
        *(scorer, source.stream, window),
        eos_id=found.tokenizer.eos_id,
        begin=found.begin,
        token_bytes_V=found.tokenizer.token_bytes,
        joined=options.joined,
        limit=options.limit,
        progress=progress,
    )
    asked = {"source": source.digest, "stride": window.stride, "joined": options.joined}
    return replace(outcome, digest=digest_of(asked))


def tell(options, model: Opened, window: Window, outcomes: dict[str, dict[str, Outcome]], seconds: float) -> None:
    """Prints the results, and writes them where they belong."""
    what = {
        "path": str(model.path),
        "step": model.step,
        "config": digest_of(identity(model.config)),
        "weights": model.digest,
        "parameters": parameter_count(model.config.model).total,
    }
    settings = {"window": window.length, "limit": options.limit, "dtype": model.dtype.name}
    made = versions() | {"mesh": " ".join(f"{a}={n}" for a, n in model.mesh.shape.items() if n > 1) or "one device"}
    result = lambda tasks: Result(what, settings, tasks, made, round(seconds, 1))
    whole = result({name: task for argument in options.tasks for name, task in outcomes[argument].items()})
    print_result(whole)
    if options.json:
        print(f"results: {keep_result(options.json, whole)[0]}", file=sys.stderr)
    directory = RunDirectory(model.path)
    if not directory.config.is_file():
        if not options.json:
            print("note: the results are kept with --json FILE only", file=sys.stderr)
        return
    fresh: dict[str, Outcome] = {}
    for argument in options.tasks:
        part = f"-first{options.limit}" if options.limit else ""
        name = f"{file_name(argument)}{part}" + ("" if model.step is None else f"-{model.step}")
        path, new = keep_result(directory.path / "evaluation" / f"{name}.json", result(outcomes[argument]))
        print(f"results: {path}", file=sys.stderr)
        fresh |= outcomes[argument] if new else {}
    if fresh and options.limit is None:  # part of a task says too little to stand among a run's metrics
        tell_run(model.config, directory, model.step, fresh)


def file_name(task: str) -> str:
    """What a task's results are called: of a path its last part."""
    prefix, colon, rest = task.rpartition(":")
    name = Path(rest).name.removesuffix(".yaml") or "text"
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in f"{prefix}-{name}" if colon) or name


if __name__ == "__main__":
    sys.exit(main(OPTIONS))
