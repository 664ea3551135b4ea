"""What the directory of a run tells: metrics, attempts, whether a process is at it, and how far it is.

A state is read from the files alone, so that it is right after any kill, of a run or of what started it.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from runtime.exit_codes import DONE, FAULT, INTERRUPTED, MISTAKE, PREEMPTED
from runtime.locks import is_locked
from scaling.strict_json import dumps
from tracking.metrics_file import NONFINITE

ATTEMPTS = "attempts.jsonl"
STATES = ("done", "running", "queued", "partial", "missing", "diverged", "failed")
FINAL = (DONE, MISTAKE, FAULT)  # that another attempt would meet again
STOPPED = (PREEMPTED, INTERRUPTED)  # when it was told to stop
IN_USE = "in use by another process"  # what train.py says of a directory that is locked


@dataclass(frozen=True)
class State:
    """How far a run is, by the files of its directory: see `state_of`."""

    name: str  # one of STATES
    step: int = 0
    loss: float | None = None  # eval/loss of the end, else the newest train/loss
    seconds: float = 0.0  # of all its attempts
    reason: str = ""  # why it diverged or failed, or was given up until the next call


def read_lines(path: Path) -> tuple[list[dict], bool]:
    """The whole JSON lines of a file, and whether there is something else: a line torn by a kill, or damage."""
    if not path.exists():
        return [], False
    rows, torn = [], False
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            row = json.loads(line)
            whole = isinstance(row, dict) and line.endswith(b"\n")
        except ValueError:
            whole = False
        if whole:
            rows.append({k: NONFINITE.get(v, v) if isinstance(v, str) else v for k, v in row.items()})
        torn = torn or not whole
    return rows, torn


def append(directory: Path, **event) -> None:
    """Adds one line to the attempts of a run."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ATTEMPTS).open("a") as file:
        file.write(dumps(event) + "\n")


def held(directory: Path, lock: str = ".lock") -> bool:
    """Whether a living process holds a lock in this directory: that of train.py, if it is not said which."""
    return is_locked(directory / lock)


def last_line(path: Path) -> str:
    """The last line of a program's output, cut to 300 characters; empty without output or file."""
    lines = path.read_text(errors="replace").strip().splitlines() if path.exists() else []
    return lines[-1][:300] if lines else ""


def fault_of(metrics: list[dict], vocab_size: int) -> str:
    """Why the losses of a run are not to be used; empty if nothing speaks against them."""
    for row in metrics:
        for key in ("train/loss", "train/grad_norm", "eval/loss"):
            if key in row and not math.isfinite(row[key]) and not row.get("train/skipped"):  # skipped steps did no harm
                return f"diverged: {key} is {row[key]} at step {row['step']}"
    ends = [row["eval/loss"] for row in metrics if "eval/loss" in row]
    if ends and ends[-1] > math.log(vocab_size):
        return f"diverged: eval/loss ended at {ends[-1]:.4g}, above log {vocab_size} = {math.log(vocab_size):.4g}"
    return ""


def state_of(directory: Path, steps: int, vocab_size: int) -> State:
    """How far the run of `steps` steps in this directory is."""
    metrics, _ = read_lines(directory / "metrics.jsonl")
    attempts, _ = read_lines(directory / ATTEMPTS)
    step = max((row["step"] for row in metrics), default=0)
    seconds = max((row["perf/wall_s"] for row in metrics if "perf/wall_s" in row), default=0.0)
    end = next((row["eval/loss"] for row in metrics if row["step"] == steps and "eval/loss" in row), None)
    loss = end if end is not None else next((r["train/loss"] for r in metrics[::-1] if "train/loss" in r), None)
    far = {"step": step, "loss": loss, "seconds": seconds}
    if held(directory):
        return State("running", **far)
    if reason := fault_of(metrics, vocab_size):
        return State("diverged", **far, reason=reason)
    if end is not None:
        return State("done", **far)
    last = attempts[-1] if attempts else {}
    if (code := last.get("code")) in FINAL:
        at = f"ended at step {step} of {steps}"
        return State("failed", **far, reason=f"{at} with code {code}: {last.get('said') or 'see output.txt'}")
    reason = last.get("gave_up", "")
    begun = metrics or any("queued" not in event for event in attempts)  # to be submitted is not to begin
    return State("partial" if begun else "missing", **far, reason=reason)
