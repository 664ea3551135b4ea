"""A sweep on the terminal: its plan with the bill, and its progress."""

import time
from collections.abc import Callable

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table as Grid
from rich.text import Text

from scaling.sweep.design import Run, SweepConfig
from scaling.sweep.run import Planned, summary
from scaling.sweep.run_directories import State

COLOURS = {"diverged": "red", "failed": "red", "running": "green", "queued": "cyan", "done": "dim"}
SHOWN = 24  # rows of a live table; a terminal has no more


def plan_table(runs: list[Run], seconds: list[float | None]) -> Grid:
    """One row for each size of each group; seeds share it. `seconds`: expected of each run."""
    columns = ("group", "width", "layers", "heads", "N", "not embedding", "D", "D / N", "C = 6 N D", "steps", "batch")
    grid = Grid(*columns, "lr", "seeds", "a run takes")
    families: dict[str, list[int]] = {}
    for index, run in enumerate(runs):
        families.setdefault(run.label, []).append(index)
    for members in families.values():
        run, n = runs[members[0]], runs[members[0]].parameters
        table_rows = run.model.vocab_size * run.model.width * (1 if run.model.tied_embeddings else 2)
        sizes = (run.model.width, run.model.layers, run.model.heads, human(n), human(n - table_rows))
        data = (human(run.tokens), f"{run.tokens / n:.3g}", f"{run.flops:.3g}", run.steps)
        rest = (f"{run.batch_size} x {run.seq_len}", f"{run.lr:g}", len(members), duration(seconds[members[0]]))
        grid.add_row(run.group, *map(str, (*sizes, *data, *rest)))
    return grid


def bill(runs: list[Run], seconds: list[float | None], jobs: int) -> str:
    """What a whole sweep costs, on one line: runs, tokens, FLOPs, and the time, where this machine was measured."""
    flops, worked = sum(run.flops for run in runs), sum(run.flops_per_token * run.tokens for run in runs)
    tokens = human(sum(run.tokens for run in runs))
    told = f"{len(runs)} runs, {tokens} tokens, {flops:.3g} FLOPs by 6 N D, {worked:.3g} with attention"
    if None in seconds:
        return f"{told}; time unknown: no run was measured here with {jobs} at once; --measure runs three short ones"
    return f"{told}; about {duration(sum(seconds) / jobs)}, {jobs} at once"


def progress(
    sweep: SweepConfig, planned: list[Planned], states: list[State], left: float | None, limit: int = SHOWN
) -> Group:
    """The states in one line, the bill so far, and a row for each run: those under way and in trouble first."""
    spent, whole = sum(state.seconds for state in states), sum(one.run.flops for one in planned)
    done = sum(one.run.flops * min(1.0, s.step / one.run.steps) for one, s in zip(planned, states, strict=True))
    words = (
        f"{summary(sweep, states)}; so far {duration(spent)} of machine time, {done / whole:.0%} of {whole:.3g} FLOPs"
    )
    words += "" if left is None else f"; about {duration(left)} left"
    grid = Grid("run", "state", "step", "of", "loss", "took", "why")
    order = ("running", "failed", "diverged", "queued", "partial", "missing", "done")
    ranked = sorted(zip(planned, states, strict=True), key=lambda pair: order.index(pair[1].name))
    for one, state in ranked[:limit]:
        loss = "" if state.loss is None else f"{state.loss:.4f}"
        steps = (str(state.step), str(one.run.steps))
        cells = (one.directory.name, state.name, *steps, loss, duration(state.seconds), state.reason)
        grid.add_row(*map(Text, cells), style=COLOURS.get(state.name, ""))
    more = Text(f"and {len(ranked) - limit} more: python -m scaling status" if len(ranked) > limit else "", style="dim")
    return Group(Text(words, style="bold"), grid, more)


def remaining(times: list[float | None], states: list[State]) -> float | None:
    """Seconds that the unfinished runs are expected to take; None where nothing was measured."""
    unfinished = ("running", "queued", "partial", "missing")
    left = [(t, s.seconds) for t, s in zip(times, states, strict=True) if s.name in unfinished]
    return None if any(t is None for t, _ in left) else sum(max(0.0, t - spent) for t, spent in left)


class Progress:
    """A live table on a terminal; on a pipe, one line for each change of a run's state."""

    def __init__(
        self,
        sweep: SweepConfig,
        planned: list[Planned],
        expected: Callable,
        jobs: int,
        console: Console,
        states: Callable[[], list[State]] | None = None,  # None: as the files say
    ):
        self.sweep, self.planned, self.expected, self.jobs, self.console = sweep, planned, expected, jobs, console
        self.states = states or (lambda: [one.state() for one in planned])
        self.live = Live(console=console, auto_refresh=False)
        self.due, self.known = 0.0, {}

    def __enter__(self) -> "Progress":
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *exception) -> None:
        self.due = 0.0
        self.show()
        if self.console.is_terminal:
            self.live.stop()

    def show(self) -> None:
        """Reads all states anew, at most once in a few seconds: a sweep has many files."""
        if time.monotonic() < self.due:
            return
        began, states = time.monotonic(), self.states()
        if self.console.is_terminal:
            left = remaining(self.expected(), states)
            left = None if left is None else left / self.jobs
            self.live.update(progress(self.sweep, self.planned, states, left), refresh=True)
        for one, state in zip(self.planned, states, strict=True):
            if not self.console.is_terminal and self.known.get(one.directory, "missing") != state.name:
                at = f"{state.name} at step {state.step} of {one.run.steps}"
                self.console.print(f"{one.directory.name}: {at} {state.reason}", soft_wrap=True, highlight=False)
            self.known[one.directory] = state.name
        now = time.monotonic()
        self.due = now + max(1.0, 20 * (now - began))  # a twentieth of a core, at most


def human(count: float) -> str:
    """A count with three digits: 4.67M."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return f"{count:.3g}"


def duration(seconds: float | None) -> str:
    """A time in words that are short."""
    if seconds is None:
        return "?"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
