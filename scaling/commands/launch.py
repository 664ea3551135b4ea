"""python -m scaling launch: the jobs of a Hydra sweep on one of Hydra's launchers, each a fresh train.py."""

import argparse
import secrets
import signal
import sys
import time
from pathlib import Path

from config.command_line import combinations, multirun
from runtime.exit_codes import DONE, FAULT, INTERRUPTED, MISTAKE, PREEMPTED
from scaling.sweep.batch import OUTPUT, Batch, Job
from scaling.sweep.launchers import LAUNCHER_OUTPUT, PACKAGES, Unknown, check, start, still_to_do, stop, submission
from scaling.sweep.provenance import commit
from scaling.sweep.run_directories import ATTEMPTS, last_line, read_lines

CHECKOUT = Path(__file__).parents[2]
FOLDER = Path("runs") / "batches"
CHOICE = "hydra/launcher="
WORST_LAST = (DONE, PREEMPTED, INTERRUPTED, MISTAKE, FAULT)
WAIT_S = 0.5
ASK_S = 10.0  # between questions to SLURM


def add_launch(options: argparse.ArgumentParser) -> None:
    """Adds the options of `python -m scaling launch` to its parser, and `command`, which runs with them."""
    options.set_defaults(command=run_launch)
    options.add_argument("words", nargs="*", metavar="KEY=VALUE", help="as for python train.py -m")


def run_launch(options: argparse.Namespace) -> int:
    """Launches the jobs, waits, and returns the worst of their exit codes. Raises ValueError for a user's mistake."""
    launcher = next((word.removeprefix(CHOICE) for word in options.words[::-1] if word.startswith(CHOICE)), None)
    if launcher is None:
        raise ValueError(f"which launcher? {CHOICE}{'|'.join(PACKAGES)}")
    settings = [word for word in options.words if word.startswith("hydra.")]
    overrides = [word for word in options.words if not word.startswith((CHOICE, "hydra."))]
    check(launcher, settings)
    multirun(overrides)  # a mistake is told before anything is submitted
    folder = FOLDER / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    facts, lists = {"commit": commit(CHECKOUT)}, combinations(overrides)
    jobs = tuple(Job(("python", "train.py", *words), str(folder / str(n)), facts) for n, words in enumerate(lists))
    batch = Batch(folder, launcher, tuple(settings), jobs)
    print(f"{len(jobs)} jobs on {launcher}: {folder}/NUMBER/{OUTPUT}", flush=True)
    return wait(batch)


def wait(batch: Batch) -> int:
    """Starts a batch and tells how each of its jobs ended; returns the worst exit code."""

    def interrupt(*_):
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    process = start(batch, CHECKOUT)
    left, codes, due = dict(enumerate(batch.jobs)), [], 0.0
    try:
        while left:
            running = process.poll() is None
            if not running or time.monotonic() > due:  # a job that was killed leaves no code
                alive, due = _alive(batch, running), time.monotonic() + ASK_S
            for number, job in list(left.items()):
                code = exit_code(job)
                if code is None and (running or Path(job.directory) in alive):
                    continue
                if code in (None, PREEMPTED) and Path(job.directory) in alive:
                    continue
                codes.append(told(number, left.pop(number), code, batch))
            time.sleep(WAIT_S if left else 0)
    except KeyboardInterrupt:
        slurm = batch.launcher == "submitit_slurm" and submission(batch)
        stop([batch])
        print(f"interrupted: job {slurm} goes on; scancel {slurm} ends it" if slurm else "interrupted", file=sys.stderr)
        return INTERRUPTED
    return max(codes, key=lambda code: WORST_LAST.index(code) if code in WORST_LAST else WORST_LAST.index(INTERRUPTED))


def _alive(batch: Batch, running: bool) -> set[Path]:
    directories = [Path(job.directory) for job in batch.jobs]
    try:
        return set(still_to_do(directories))
    except Unknown:  # the launcher's own process asks in its own way
        return set(directories) if running else set()


def exit_code(job: Job) -> int | None:
    """The code of a job's last attempt, None while it has none."""
    attempts, _ = read_lines(Path(job.directory) / ATTEMPTS)
    return attempts[-1].get("code") if attempts else None


def told(number: int, job: Job, code: int | None, batch: Batch) -> int:
    """Prints how a job ended; a code above 128 is a signal's, as in a shell."""
    said = last_line(Path(job.directory) / OUTPUT)
    if code is None:
        code, said = FAULT, said or last_line(batch.folder / LAUNCHER_OUTPUT)
        how = "did not end by itself"
    else:
        code = code if code >= 0 else 128 - code
        how = f"exit code {code}"
    print(f"job {number} {' '.join(job.command[2:])}: {how}{f': {said}' if code else ''}", flush=True)
    return code
