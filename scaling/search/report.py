"""What a search has found: rows for results.jsonl, a table, the importance of each parameter, a picture."""

import os
import shlex
import warnings
from pathlib import Path

from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.table import Table
from rich.text import Text

from scaling.search.study import Search, outcome, reason
from scaling.strict_json import dumps

SHOWN = 10  # trials in the table
LEAST = 6  # complete trials below which importances are noise and are not told


def rows(search: Search) -> list[dict]:
    """One plain dict a trial that has ended, in order."""
    keys = [key for key, _ in search.config.objectives]
    found = []
    for trial in search.trials():
        if (kind := outcome(trial)) in ("", "lost"):
            continue
        values = dict(zip(keys, trial.values or (), strict=True)) if kind == "complete" else {}
        row = {"trial": trial.number, "outcome": kind, "params": trial.params, "values": values}
        row |= {"seconds": trial.user_attrs.get("seconds"), "memory": trial.user_attrs.get("memory")}
        row |= {"reason": reason(trial), "run": search.directory(search.overrides(trial)).name}
        found.append(row)
    return found


def write_rows(search: Search, path: Path) -> None:
    """Replaces results.jsonl at once."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(dumps(row) + "\n" for row in rows(search)))
    os.replace(temporary, path)


def front(search: Search) -> list[FrozenTrial]:
    """The trials that no other beats in every objective: with one objective, the best."""
    complete = [trial for trial in search.trials() if outcome(trial) == "complete"]
    signs = [1 if direction == "minimize" else -1 for _, direction in search.config.objectives]
    cost = {trial.number: [s * v for s, v in zip(signs, trial.values, strict=True)] for trial in complete}

    def beaten(ours: list[float]) -> bool:
        others = (theirs for theirs in cost.values() if theirs != ours)
        return any(all(a <= b for a, b in zip(theirs, ours, strict=True)) for theirs in others)

    return sorted((trial for trial in complete if not beaten(cost[trial.number])), key=lambda t: cost[t.number])


def importances(search: Search) -> dict[str, dict[str, float]]:
    """objective -> parameter -> share of 1 (PED-ANOVA, arXiv 2304.10255); empty where there are too few trials."""
    study, trials = search.study, search.trials()
    if sum(trial.state == TrialState.COMPLETE for trial in trials) < LEAST:
        return {}
    found = {}
    for place, (key, direction) in enumerate(search.config.objectives):
        sign = 1 if direction == "minimize" else -1
        target = lambda trial, place=place, sign=sign: sign * trial.values[place]
        evaluator = PedAnovaImportanceEvaluator(target_quantile=0.25)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it reminds of the sign that `target` has
            found[key] = get_param_importances(study, evaluator=evaluator, target=target)
    return found


def show(search: Search, console: Console) -> None:
    """The best trials, what mattered, what was rejected, and the command that runs the best again."""
    ended = [outcome(trial) for trial in search.trials() if outcome(trial) not in ("", "lost")]
    counts = ", ".join(f"{ended.count(kind)} {kind}" for kind in dict.fromkeys(ended))
    console.print(Text(f"{len(ended)} trials: {counts or 'none'}", style="bold"))
    best = front(search)
    if not best:
        for trial in search.trials()[-3:]:
            console.print(Text(f"trial {trial.number} {outcome(trial)}: {reason(trial)}"), soft_wrap=True)
        return
    keys = [key for key, _ in search.config.objectives]
    grid = Table("trial", *keys, *search.space.distributions)
    signs = [1 if direction == "minimize" else -1 for _, direction in search.config.objectives]
    complete = [trial for trial in search.trials() if outcome(trial) == "complete"]
    complete.sort(key=lambda trial: [s * v for s, v in zip(signs, trial.values, strict=True)])
    for trial in (complete if len(keys) == 1 else best)[:SHOWN]:
        values = [f"{value:.6g}" for value in trial.values]
        params = [trial.params.get(name) for name in search.space.distributions]
        grid.add_row(*map(Text, [str(trial.number), *values, *map(_short, params)]))
    console.print(grid)
    for key, shares in importances(search).items():
        told = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
        console.print(Text(f"importance for {key}: {told}"), soft_wrap=True)
    command = shlex.join(["python", "train.py", *search.overrides(best[0])])
    console.print(Text(f"best: {command}"), soft_wrap=True)


def draw(search: Search, path: Path) -> None:
    """A picture: trials in time, or two objectives against each other, beside the importances. Needs matplotlib."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), dpi=130)
    complete = [trial for trial in search.trials() if outcome(trial) == "complete"]
    objectives = search.config.objectives
    if len(objectives) == 1:
        _history(left, search, complete)
    else:
        left.scatter(*zip(*(t.values[:2] for t in complete), strict=True), s=16, color="#9db7d5", label="trials")
        left.plot(*zip(*(t.values[:2] for t in front(search)), strict=True), "o-", color="#1f4e8c", label="not beaten")
        left.set(xlabel=objectives[0][0], ylabel=objectives[1][0])
    left.legend(frameon=False)
    found = importances(search)
    names = list(search.space.distributions)[::-1]
    height = 0.8 / max(len(found), 1)
    for place, (key, shares) in enumerate(found.items()):
        at = [number + place * height for number in range(len(names))]
        right.barh(at, [shares.get(name, 0) for name in names], height=height, label=key)
    right.set_yticks(range(len(names)), names)
    right.set(xlabel="importance (PED-ANOVA, best quarter)", xlim=(0, 1))
    if len(found) > 1:
        right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def _history(axes, search: Search, complete: list[FrozenTrial]) -> None:
    key, direction = search.config.objectives[0]
    better, best, running = (min if direction == "minimize" else max), None, []
    for trial in complete:
        best = trial.value if best is None else better(best, trial.value)
        running.append(best)
    axes.scatter([t.number for t in complete], [t.value for t in complete], s=16, color="#9db7d5", label="trials")
    axes.step([t.number for t in complete], running, where="post", color="#1f4e8c", label="best so far")
    stopped = [t.number for t in search.trials() if outcome(t) in ("pruned", "diverged", "failed")]
    axes.plot(stopped, [max(t.value for t in complete)] * len(stopped), "x", color="#b5483a", label="stopped early")
    axes.set(xlabel="trial", ylabel=key)


def _short(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
