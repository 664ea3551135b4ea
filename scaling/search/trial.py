"""One trial as a process of its own: what it needs is measured, what it writes is watched, and it is stopped early.

Pruning needs nothing from the training loop: evaluations are read from metrics.jsonl as they are written, and
SIGTERM makes a run save and exit with 75.
"""

import contextlib
import json
import math
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import optuna

from runtime.exit_codes import DONE, FAULT, MISTAKE, PREEMPTED
from runtime.overrides import override
from scaling.search.study import Outcome, SearchConfig
from scaling.sweep.run_directories import held, last_line

POLL_S = 0.2
PATIENCE_S = 120.0  # for a checkpoint after SIGTERM
PRUNED_BY = "eval/loss"


@dataclass
class Metrics:
    """A metrics.jsonl that grows: values by key and step. A run that resumes may write a step again."""

    path: Path
    values: dict[str, dict[int, float]] = field(default_factory=dict)
    _offset: int = 0

    def read(self) -> None:
        """Takes in the whole lines that are new."""
        with contextlib.suppress(FileNotFoundError), open(self.path, "rb") as file:
            if file.seek(0, 2) < self._offset:  # cut back to a checkpoint
                self._offset, self.values = 0, {}
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._offset += len(line)
                self._take(line)

    def _take(self, line: bytes) -> None:
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a line that a crash cut short
            record = json.loads(line)
            step = int(record.pop("step"))
            for key, value in record.items():
                with contextlib.suppress(ValueError, TypeError):  # texts; "NaN" is a number here
                    self.values.setdefault(key, {})[step] = float(value)

    def final(self, key: str) -> float | None:
        """The value of the last step; of perf/, which varies, the median over the run. None if there is none."""
        values = self.values.get(key)
        if not values:
            return None
        return statistics.median(values.values()) if key.startswith("perf/") else values[max(values)]

    def diverged(self) -> bool:
        """Whether the last value of a loss is not finite."""
        last = [self.final(key) for key in ("train/loss", "train/grad_norm", PRUNED_BY)]
        return any(value is not None and not math.isfinite(value) for value in last)


class Runner:
    """Runs trials from the root of a checkout; `stop` ends them all, each after a checkpoint."""

    def __init__(self, config: SearchConfig, root: Path, check: Callable[[list[str]], object]):
        self.config, self.root, self.check = config, root, check
        self.stop = threading.Event()
        self._composing = threading.Lock()  # Hydra composes one config at a time

    def __call__(self, trial: optuna.Trial, overrides: Sequence[str], directory: Path) -> Outcome:
        """One trial, to its end. `check` raises ValueError for overrides that are no config."""
        began = time.monotonic()
        try:
            with self._composing:
                self.check(list(overrides))
        except ValueError as error:
            return Outcome("rejected", reason=str(error))
        directory.parent.mkdir(parents=True, exist_ok=True)
        if self.config.memory_limit and (misfit := self._misfit(trial, overrides, directory)):
            return misfit
        if not self._wait_for_orphan(directory):
            return Outcome("interrupted")
        command = [sys.executable, "train.py", *overrides, override("run.dir", str(directory))]
        metrics, pruned = Metrics(directory / "metrics.jsonl"), False
        with open(f"{directory}.out", "wb") as said:
            process = subprocess.Popen(command, cwd=self.root, stdout=said, stderr=said)
            try:
                pruned = self._watch(process, trial, metrics)
            finally:
                _end(process)
        seconds = round(time.monotonic() - began, 3)
        metrics.read()
        kind, values, why = self._judged(process.returncode, pruned, metrics, Path(f"{directory}.out"))
        return Outcome(kind, values, why, seconds)

    def _watch(self, process: subprocess.Popen, trial: optuna.Trial, metrics: Metrics) -> bool:
        """Reports evaluations until the process ends or has to; whether it was pruned."""
        reported = 0
        while process.poll() is None and not self.stop.wait(POLL_S):
            metrics.read()
            evaluations = sorted(metrics.values.get(PRUNED_BY, {}).items())
            if self.config.pruner == "none":
                continue
            for number, (_, loss) in enumerate(evaluations[reported:], reported + 1):
                trial.report(loss, number)  # evaluations are the pruners' measure of effort
                reported = number
                if trial.should_prune() and process.poll() is None:
                    return True
        return False

    def _judged(self, code: int, pruned: bool, metrics: Metrics, said: Path) -> tuple[str, tuple, str]:
        if code == DONE:
            values = tuple(metrics.final(key) for key, _ in self.config.objectives)
            for (key, _), value in zip(self.config.objectives, values, strict=True):
                if value is None:
                    return "failed", (), f"metrics.jsonl has no {key}"
                if not math.isfinite(value):
                    return "diverged", (), f"{key} is {value}"
            return "complete", values, ""
        if code in (PREEMPTED, -signal.SIGTERM, 128 + signal.SIGTERM):
            if pruned:
                return "pruned", (), f"after {len(metrics.values[PRUNED_BY])} evaluations"
            return "interrupted", (), ""
        if self.stop.is_set():
            return "interrupted", (), ""
        last = last_line(said).removeprefix("error: ")
        if code == MISTAKE:
            return "rejected", (), last
        if code == FAULT and metrics.diverged():
            return "diverged", (), "the loss is not finite"
        return "failed", (), f"exit code {code}: {last}"

    def _misfit(self, trial: optuna.Trial, overrides: Sequence[str], directory: Path) -> Outcome | None:
        """Compiles the step without allocating it, in a process that then gives the devices back."""
        command = [sys.executable, "-m", "performance.memory", *overrides, override("run.dir", str(directory))]
        process = subprocess.Popen(command, cwd=self.root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while True:
            try:
                out, err = process.communicate(timeout=POLL_S)
                break
            except subprocess.TimeoutExpired:
                if self.stop.is_set():
                    process.kill()
        if self.stop.is_set():
            return Outcome("interrupted")
        lines = err.strip().splitlines() or [""]
        if process.returncode == MISTAKE:
            return Outcome("rejected", reason=lines[-1].removeprefix("error: "))
        if process.returncode != DONE:  # compilers refuse what cannot fit in their own words
            return Outcome("rejected", reason=f"does not compile: {lines[-1]}")
        used = json.loads(out.strip().splitlines()[-1])["total"]
        trial.set_user_attr("memory", used)
        if used > self.config.memory_limit:
            return Outcome("rejected", reason=f"needs {used:.4g} bytes a device of {self.config.memory_limit:.4g}")
        return None

    def _wait_for_orphan(self, directory: Path) -> bool:
        """Waits for a run that a killed worker left behind there; False if asked to stop meanwhile."""
        while held(directory):
            if self.stop.wait(POLL_S):
                return False
        return True


def _end(process: subprocess.Popen) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
