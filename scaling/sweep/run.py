"""Runs what is missing of a sweep through train.py, several at once if asked; kills of it or of its runs lose nothing.

A run counts once: its directory is named by a digest of its config and of the code, and train.py goes on in it from
the newest checkpoint. Nothing about progress is kept in memory only.
"""

import contextlib
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from runtime.exit_codes import MISTAKE
from runtime.locks import Locked, locked
from runtime.overrides import override
from scaling.sweep.design import Measured, Run, SweepConfig
from scaling.sweep.provenance import commit, cores, machine
from scaling.sweep.run_directories import (
    ATTEMPTS,
    IN_USE,
    STOPPED,
    State,
    append,
    held,
    last_line,
    read_lines,
    state_of,
)

LOST_ATTEMPTS = 5  # in a row without a new step, after which a run is left to the next call
PROBES = "measured"  # group of runs that only measure the machine's speed
GRACE_S = 120.0  # for runs to save, once they were told to stop
POLL_S = 0.2


@dataclass(frozen=True)
class Planned:
    """A run with its place: what `run`, `status` and `collect` work on."""

    run: Run
    directory: Path
    config_digest: str  # of what decides its numbers, length and seed included
    code: str  # digest of the code

    def command(self) -> list[str]:
        """The command line; it works from the root of the checkout, and goes on where it stopped."""
        return ["python", "train.py", *self.run.overrides, override("run.dir", str(self.directory))]

    def state(self) -> State:
        """How far it is, read anew from the files in its directory at each call."""
        return state_of(self.directory, self.run.steps, self.run.model.vocab_size)

    def facts(self) -> dict:
        """What each of its attempts records."""
        keys = {"config": self.config_digest, "code_digest": self.code, "group": self.run.group}
        return keys | {"steps": self.run.steps, "label": self.run.label, "command": self.command()}


def config_digest(identity: dict, steps: int, eval_batches: int) -> str:
    """SHA-256, cut to 12 digits, of all that decides a run's end: `identity` is config.identity's."""
    text = json.dumps([identity, steps, eval_batches], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def place(runs: list[Run], identify: Callable[[Run], tuple[dict, int]], root: Path, code: str) -> list[Planned]:
    """Gives each run its directory under `root`. `identify`: the run's config.identity and its train.eval_batches."""
    planned = []
    for run in runs:
        identity, eval_batches = identify(run)
        family = config_digest(identity | {"seed": None}, run.steps, eval_batches)  # seeds differ in the name only
        key = hashlib.sha256(f"{family} {code}".encode()).hexdigest()[:8]
        directory = root / f"{run.label}-{key}-s{run.seed}"
        planned.append(Planned(run, directory, config_digest(identity, run.steps, eval_batches), code))
    return planned


def multirun(planned: list[Planned]) -> list[str]:
    """The same runs as Hydra multiruns, one line for all seeds of a size."""
    families: dict[str, list[Planned]] = {}
    for one in planned:
        families.setdefault(str(one.directory).removesuffix(f"-s{one.run.seed}"), []).append(one)
    lines = []
    for stem, members in families.items():
        first = members[0].run
        swept = {"seed", "wandb.name"}
        overrides = [*first.base, *(f"{key}={value}" for key, value in first.settings.items() if key not in swept)]
        seeds = "seed=" + ",".join(str(one.run.seed) for one in members)
        names = (f"wandb.name={first.label}-s${{seed}}", f"run.dir={stem}-s${{seed}}")
        lines.append(shlex.join(["python", "train.py", "-m", *overrides, seeds, *names]))
    return lines


# ------------------------------------------------------------------------------------------------------------- measure


def probes(planned: list[Planned], root: Path, steps: int = 30) -> list[Planned]:
    """Short runs of the narrowest, the middle and the widest model, to learn the machine's speed from."""
    by_width = {one.run.model.width: one for one in planned[::-1]}
    widths = sorted(by_width)
    chosen = [by_width[width] for width in dict.fromkeys((widths[0], widths[len(widths) // 2], widths[-1]))]
    short = {"train.steps": steps, "train.eval_every": steps, "optimizer.warmup_steps": 0, "wandb.mode": "disabled"}
    made = []
    for one in chosen:
        run = replace(one.run, group=PROBES, steps=steps, settings=one.run.settings | short)
        key = hashlib.sha256(f"{run.overrides} {one.code}".encode()).hexdigest()[:8]
        made.append(replace(one, run=run, directory=root / PROBES / f"w{run.model.width}-{key}"))
    return made


def measured(planned: list[Planned], jobs: int) -> list[Measured]:
    """Speeds of those runs that ended on this machine in one attempt, with as many cores as a run now gets."""
    here, found = machine(), []
    for one in planned:
        attempts, _ = read_lines(one.directory / ATTEMPTS)
        begun = [event for event in attempts if "began" in event]
        ended = [event for event in attempts if event.get("code") == 0]
        if len(begun) != 1 or not ended or begun[0]["machine"] != here or begun[0]["cores"] != share(jobs):
            continue
        metrics, _ = read_lines(one.directory / "metrics.jsonl")
        speeds = [row["perf/tokens_per_s"] for row in metrics if "perf/tokens_per_s" in row]
        if speeds[1:]:
            speed = sorted(speeds[1:])[len(speeds[1:]) // 2]  # the first step is the slowest
            rest = ended[0]["ended"] - begun[0]["began"] - one.run.tokens / speed
            found.append(Measured(one.run.flops_per_token, speed, max(0.0, rest)))
    return found


def share(jobs: int) -> int:
    """Cores that each of several runs gets."""
    return max(1, len(cores()) // jobs)


# ----------------------------------------------------------------------------------------------------------------- run


@dataclass
class Process:
    """A run under way. `popen` is None where an earlier call started it, which was killed."""

    planned: Planned
    popen: subprocess.Popen | None
    slot: int
    step: int  # when it began


class Pool:
    """Keeps up to `jobs` runs under way until none is left to do."""

    def __init__(self, planned: list[Planned], jobs: int, cores_each: int, checkout: Path, retry: bool):
        self.jobs, self.cores_each, self.checkout = jobs, cores_each, checkout
        self.facts = {"machine": machine(), "commit": commit(checkout), "cores": cores_each}
        self.waiting: list[Planned] = []
        self.running: list[Process] = []
        self.lost: dict[Path, int] = {}  # attempts in a row without a new step
        for one in planned:
            state = one.state()
            if state.name == "running":
                self.running.append(Process(one, None, -1, state.step))
            elif state.name in ("missing", "partial") or (retry and state.name == "failed"):
                self.waiting.append(one)
            elif retry and state.name == "diverged":
                set_aside(one.directory)
                self.waiting.append(one)

    def tick(self) -> bool:
        """Takes note of runs that ended and starts others; whether there is anything left."""
        for process in list(self.running):
            if process.popen is None and not held(process.planned.directory):
                self.running.remove(process)
                if process.planned.state().name == "partial":
                    self.waiting.append(process.planned)
            elif process.popen is not None and process.popen.poll() is not None:
                self.running.remove(process)
                self._ended(process)
        while self.waiting and len(self.running) < self.jobs:
            self._start(self.waiting.pop(0))
        return bool(self.running)

    def stop(self) -> None:
        """Tells all runs to save and end, and waits for it; what an earlier call started goes on."""
        ours = [process for process in self.running if process.popen is not None]
        for process in ours:
            process.popen.terminate()
        deadline = time.monotonic() + GRACE_S
        for process in ours:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.popen.wait(max(0.0, deadline - time.monotonic()))
                self._note(process)

    def _start(self, one: Planned) -> None:
        one.directory.mkdir(parents=True, exist_ok=True)
        slot = next(n for n in range(self.jobs) if n not in [process.slot for process in self.running])
        mine = cores()[slot * self.cores_each :][: self.cores_each]
        pin = hasattr(os, "sched_setaffinity") and len(mine) == self.cores_each < len(cores())
        append(one.directory, began=time.time(), **self.facts, **one.facts())
        with (one.directory / "output.txt").open("ab") as output:
            popen = subprocess.Popen(
                [sys.executable, *one.command()[1:]],
                cwd=self.checkout,
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # a terminal's Ctrl-C is ours to hand on
                preexec_fn=(lambda: os.sched_setaffinity(0, mine)) if pin else None,
            )
        self.running.append(Process(one, popen, slot, one.state().step))

    def _note(self, process: Process, **more) -> None:
        one, code = process.planned, process.popen.returncode
        append(one.directory, ended=time.time(), code=code, said=last_line(one.directory / "output.txt"), **more)

    def _ended(self, process: Process) -> None:
        one, code = process.planned, process.popen.returncode
        if code == MISTAKE and IN_USE in last_line(one.directory / "output.txt"):
            if held(one.directory):  # an earlier call's process was faster
                self.running.append(Process(one, None, -1, process.step))
            else:  # another process was asking just then whether the lock is free
                self.waiting.insert(0, one)
            return
        state = one.state()
        again = state.name in ("partial", "missing") and (code < 0 or code in STOPPED)
        self.lost[one.directory] = self.lost.get(one.directory, 0) + 1 if state.step <= process.step else 0
        if again and self.lost[one.directory] >= LOST_ATTEMPTS:
            self._note(process, gave_up=f"ended {LOST_ATTEMPTS} times in a row (code {code}) without a new step")
        else:
            self._note(process)
            if again:
                self.waiting.insert(0, one)


def set_aside(directory: Path) -> None:
    """Renames the directory of a run, which is then kept, and not counted."""
    number = next(n for n in range(1, 10**6) if not directory.with_name(f"{directory.name}.{n}").exists())
    directory.rename(directory.with_name(f"{directory.name}.{number}"))


@contextlib.contextmanager
def alone(root: Path) -> Iterator[None]:
    """Keeps a second call away from the same runs. Raises ValueError when there is one."""
    root.mkdir(parents=True, exist_ok=True)
    try:
        with locked(root / ".lock"):
            yield
    except Locked:
        raise ValueError(f"another call runs the sweep in {root}; wait for it, or stop it") from None


def run_missing(
    planned: list[Planned],
    root: Path,
    checkout: Path,
    show: Callable[[], None],
    *,
    jobs: int = 1,
    cores_each: int | None = None,
    retry: bool = False,
) -> bool:
    """Runs what is neither done nor failed nor diverged; `retry`: these too, the diverged from their beginning.

    `show` is called now and then. Returns whether it came to the end: False after Ctrl-C or SIGTERM, when all runs have
    saved and ended. Raises ValueError if another call is at it.
    """

    def interrupt(*_):
        raise KeyboardInterrupt

    with alone(root):
        before = signal.signal(signal.SIGTERM, interrupt)
        pool = Pool(planned, jobs, cores_each or share(jobs), checkout, retry)
        try:
            while pool.tick():
                show()
                time.sleep(POLL_S)
            return True
        except KeyboardInterrupt:
            with contextlib.suppress(KeyboardInterrupt):  # a second one: runs were told, and save without us
                pool.stop()
            return False
        finally:
            signal.signal(signal.SIGTERM, before)
            show()


def summary(sweep: SweepConfig, states: list[State]) -> str:
    """How many runs of a sweep are in which state, on one line."""
    counts = {name: sum(state.name == name for state in states) for name in dict.fromkeys(s.name for s in states)}
    return f"{sweep.name}: " + ", ".join(f"{count} {name}" for name, count in counts.items())
