"""Runs what is missing of a sweep on one of Hydra's launchers: one batch, on SLURM one array of jobs.

What is submitted is noted beside the runs before it is, under a name that SLURM shows too, and states are read from the
files: so kills lose nothing, and a second call submits nothing twice, whichever of them comes when.
"""

import contextlib
import secrets
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from scaling.sweep.batch import Batch, Job
from scaling.sweep.launchers import (
    LAUNCHER_OUTPUT,
    LOCK,
    Unknown,
    check,
    last_batch,
    only_queued,
    start,
    still_to_do,
    stop,
    submission,
)
from scaling.sweep.provenance import commit
from scaling.sweep.run import Planned, alone, set_aside
from scaling.sweep.run_directories import State, held, last_line

ASK_S = 10.0  # between questions to SLURM
WAIT_S = 0.5
OPEN = ("missing", "partial", "running", "failed")  # states that a launcher may have more to say about


class Queue:
    """The states of runs, with what launchers still have to do; they are asked every ASK_S seconds."""

    def __init__(self, planned: list[Planned]):
        self.planned, self.where, self.unknown, self.due = planned, {}, "", 0.0

    def states(self) -> list[State]:
        """As the files say, but `queued` (or running) where a launcher has the run."""
        states = [one.state() for one in self.planned]
        if time.monotonic() >= self.due:
            self._ask([one.directory for one, state in zip(self.planned, states, strict=True) if state.name in OPEN])
            self.due = time.monotonic() + ASK_S
        return [self._overlaid(one.directory, state) for one, state in zip(self.planned, states, strict=True)]

    def ask(self) -> list[State]:
        """The states, asking at once."""
        self.due = 0.0
        return self.states()

    def _ask(self, directories: list[Path]) -> None:
        try:
            self.where, self.unknown = still_to_do(directories), ""
        except Unknown as error:  # what was known before stays
            self.unknown = str(error)

    def _overlaid(self, directory: Path, state: State) -> State:
        where = self.where.get(directory)
        if where is None or state.name not in ("missing", "partial", "failed"):
            return state
        return replace(state, name="running" if where.endswith("RUNNING") else "queued", reason=where)


def submit(todo: list[Planned], root: Path, checkout: Path, launcher: str, settings: list[str]) -> subprocess.Popen:
    """Starts the launcher of a batch of these runs."""
    facts = {"commit": commit(checkout)}
    jobs = tuple(Job(tuple(one.command()), str(one.directory), facts | one.facts(), one.code) for one in todo)
    folder = root / "batches" / f"{root.name}-{secrets.token_hex(4)}"
    return start(Batch(folder, launcher, tuple(settings), jobs), checkout)


def run_on_launcher(
    planned: list[Planned],
    root: Path,
    checkout: Path,
    queue: Queue,
    show: Callable[[], None],
    launcher: str,
    settings: list[str],
    *,
    retry: bool = False,
    resubmit: bool = False,
) -> bool:
    """Submits what is neither done, failed, diverged nor queued, and waits; `retry`: the failed and diverged too.

    `resubmit`: also runs of which SLURM cannot tell whether it has them. Returns whether it came to the end: False
    after Ctrl-C or SIGTERM, when runs on this machine have saved and ended, and those on SLURM go on. Raises ValueError
    for what is wrong about the launcher, and if another call is at it.
    """

    def interrupt(*_):
        raise KeyboardInterrupt

    check(launcher, settings)
    with alone(root):
        states = queue.ask()
        if queue.unknown and not resubmit:
            raise ValueError(f"which runs are queued is not known: {queue.unknown}; --resubmit submits them again")
        again = ("missing", "partial", *(("failed", "diverged") if retry else ()))
        todo = [one for one, state in zip(planned, states, strict=True) if state.name in again]
        for one, state in zip(planned, states, strict=True):
            if one in todo and state.name == "diverged":
                set_aside(one.directory)
        before, process = signal.signal(signal.SIGTERM, interrupt), None
        try:
            process = submit(todo, root, checkout, launcher, settings) if todo else None
            _wait(queue, process, show)
        except KeyboardInterrupt:
            with contextlib.suppress(KeyboardInterrupt):  # a second one: runs were told, and save without us
                stop(batches(planned))
            return False
        finally:
            signal.signal(signal.SIGTERM, before)
            queue.ask()
            show()
        if process is not None and process.poll() and all(only_queued(one.directory) for one in todo):
            batch = batches(todo)[0]
            if not submission(batch):
                raise ValueError(
                    f"{launcher} took nothing: {last_line(batch.folder / LAUNCHER_OUTPUT).removeprefix('error: ')}"
                )
    return True


def _wait(queue: Queue, process: subprocess.Popen | None, show: Callable[[], None]) -> None:
    """Returns when no run is queued or running; asks every ASK_S seconds, and at once when a launcher ends."""
    asked, mine, before = 0.0, batches(queue.planned), None
    while True:
        show()
        if process is not None:
            process.poll()
        launching = [batch.name for batch in mine if held(batch.folder, LOCK)]
        if launching != before or time.monotonic() > asked + ASK_S:
            busy = any(state.name in ("queued", "running") for state in queue.ask())
            if not busy and not (queue.unknown and launching):
                stop(mine)  # nothing lives, but one may still wait for word of jobs that were cancelled
                return
            asked, before = time.monotonic(), launching
        time.sleep(WAIT_S)


def batches(planned: list[Planned]) -> list[Batch]:
    """The batches that these runs were submitted with last."""
    found = [submitted[0] for one in planned if (submitted := last_batch(one.directory))]
    return list({batch.folder: batch for batch in found}.values())
