"""A batch of runs for one of Hydra's launchers: its file, and what each of its jobs does wherever it is started.

Jobs may run elsewhere, later, and outlive the command that asked for them: all that they share with it is files.
A job is one fresh process of train.py, so it is what a user could have typed, and JAX is never forked.
"""

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from hydra.core.hydra_config import HydraConfig

from runtime.exit_codes import DONE, MISTAKE
from runtime.locks import Locked, acquire
from scaling.strict_json import dumps
from scaling.sweep.provenance import code_digest, cores, machine
from scaling.sweep.run_directories import FINAL, IN_USE, STOPPED, append, last_line

BATCH, JOB_LOCK, OUTPUT = "batch.json", ".job", "output.txt"
REQUEUE = getattr(signal, "SIG" + os.environ.get("SUBMITIT_PREEMPT_SIGNAL", "USR2"))  # submitit's: the time is up
POLL_S = 0.2
LOCK_S = 3.0  # how long to try: whoever asks whether a lock is free holds it for a moment
KILL_S = 60.0  # SLURM kills what it told to stop after this time at the latest (its KillWait is 30 s unless set)


@dataclass(frozen=True)
class Job:
    """One run. `directory` takes its attempts and its output; that of a sweep's run is the run's own."""

    command: tuple[str, ...]  # python train.py ..., from the root of the checkout
    directory: str
    facts: dict  # for the record of each attempt
    code: str | None = None  # digest of the code that the run is filed under; None: any


@dataclass(frozen=True)
class Batch:
    """What a launcher is asked for. The name is that of the folder, and of the jobs on SLURM: no two are the same."""

    folder: Path
    launcher: str
    settings: tuple[str, ...]  # hydra.launcher.KEY=VALUE
    jobs: tuple[Job, ...]

    @property
    def name(self) -> str:
        """The folder's name, which the jobs have on SLURM, too."""
        return self.folder.name

    def write(self) -> None:
        """Writes the batch, then notes in each run's directory that it is about to be submitted."""
        self.folder.mkdir(parents=True)
        values = {"launcher": self.launcher, "settings": self.settings, "jobs": [asdict(job) for job in self.jobs]}
        (self.folder / BATCH).write_text(dumps(values, indent=1))
        for index, job in enumerate(self.jobs):
            append(Path(job.directory), queued=time.time(), batch=str(self.folder), index=index)


@functools.lru_cache(maxsize=64)
def read_batch(folder: Path) -> Batch:
    """The batch of a folder: it never changes. Raises OSError or ValueError where it is gone or damaged."""
    values = json.loads((folder / BATCH).read_text())
    jobs = tuple(Job(tuple(j["command"]), j["directory"], j["facts"], j["code"]) for j in values["jobs"])
    return Batch(folder, values["launcher"], tuple(values["settings"]), jobs)


# ------------------------------------------------------------------------------------------------- in the job's process


@dataclass(frozen=True)
class Task:
    """What Hydra's launcher calls in each job's process, which has the checkout as its working directory."""

    folder: str

    def __call__(self, _config) -> int:
        asked = HydraConfig.get()
        grace = 0.75 * float(asked.launcher.get("signal_delay_s", 30))  # the rest is for the requeue
        return work(read_batch(Path(self.folder)).jobs[asked.job.num], Path.cwd(), grace)


def work(job: Job, checkout: Path, grace_s: float = 30.0) -> int:
    """Runs a job to its end and returns its exit code; its attempts note how it went.

    Where the scheduler says that the time is up, the run saves within `grace_s` and submitit requeues the job, which
    raises SystemExit. If something else is at the job already, it is left to that, and counts as done here.
    """
    directory = Path(job.directory)
    directory.mkdir(parents=True, exist_ok=True)
    if os.environ.get("SUBMITIT_EXECUTOR") == "slurm" and int(os.environ.get("SLURM_PROCID", 0)):
        return _run(job, checkout, None, grace_s)[0]  # of several processes of one run the first keeps its record
    with job_lock(directory) as lock:
        if lock is None:
            return DONE
        if job.code not in (None, code_digest(checkout)):
            append(directory, ended=time.time(), code=MISTAKE, said="the code has changed since this was submitted")
            return MISTAKE
        append(directory, began=time.time(), machine=machine(), cores=len(cores()), **job.facts)
        code, requeue = _run(job, checkout, lock, grace_s)
        said = last_line(directory / OUTPUT)
        elsewhere = code == MISTAKE and IN_USE in said  # somebody trains there without a launcher
        append(directory, ended=time.time(), **({} if elsewhere else {"code": code}), said=said)
        if requeue and code not in FINAL:
            requeue()
        return code


def _run(job: Job, checkout: Path, lock: IO | None, grace_s: float) -> tuple[int, functools.partial | None]:
    """The exit code of train.py, and what requeues the job where the scheduler asked for that."""
    asked, submitit = [], signal.getsignal(REQUEUE)
    managed = callable(submitit)  # under submitit there is a handler, elsewhere none
    if managed:
        signal.signal(REQUEUE, lambda *what: asked.append(what))
    with (Path(job.directory) / OUTPUT).open("ab") as output:
        child = subprocess.Popen(
            [sys.executable, *job.command[1:]],
            cwd=checkout,
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
            pass_fds=[lock.fileno()] if lock else [],  # the job's lock tells that it lives, if this process is killed
            # SLURM sends its signals to every process of a job, and this one is not for train.py
            preexec_fn=(lambda: signal.signal(REQUEUE, signal.SIG_IGN)) if managed else None,
        )
    try:
        while child.poll() is None and not asked:
            time.sleep(POLL_S)
        if managed and child.poll() in STOPPED and os.environ["SUBMITIT_EXECUTOR"] == "slurm":
            # It was told to stop, as we were: preempted, or cancelled. To end now would be to end well, and SLURM
            # would not requeue the job; the signal to requeue may follow.
            deadline = time.monotonic() + KILL_S
            while not asked and time.monotonic() < deadline:
                time.sleep(POLL_S)
        if asked:
            child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(grace_s)
    finally:
        if child.poll() is None:
            child.kill() if asked else child.terminate()
    return child.wait(), functools.partial(submitit, *asked[0]) if asked else None


@contextlib.contextmanager
def job_lock(directory: Path) -> Iterator[IO | None]:
    """The lock of a job, None if another process has it. It is inherited: it is free when nothing of the job lives."""
    deadline = time.monotonic() + LOCK_S
    with (directory / JOB_LOCK).open("w") as file:
        while True:
            try:
                acquire(file)
                break
            except Locked:
                if time.monotonic() > deadline:
                    yield None
                    return
                time.sleep(POLL_S)
        yield file
