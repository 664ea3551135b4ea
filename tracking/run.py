"""Reads a run's directory for a picture of it: metrics as far as they are written, settings, samples."""

import ast
import json
import os
import re
from pathlib import Path

import yaml

from tracking.metrics_file import parse_line
from tracking.run_directory import RunDirectory
from tracking.series import Series

TEXT_BYTES = 1 << 18  # of samples.txt, its end
BY_LAYER = re.compile(r"/\d+$")  # moe/load/003: the key without the layer's number tells of the worst
HEADING = re.compile(r"^--- step (\d+), prompt (.*)$", re.MULTILINE)  # of a sample, as `write_samples` makes it


class Run:
    """A run's metrics, settings and samples. `refresh` reads what was written since.

    Raises ValueError where `path` holds no run.
    """

    def __init__(self, path: Path):
        self.path, self.directory = path, RunDirectory(path)
        files = (self.directory.metrics, self.directory.config, self.directory.log)
        if not any(file.is_file() for file in files):
            raise ValueError(_no_run(path))
        self.settings: dict[str, str] = {}
        self.samples: list[dict] = []
        self.generation = 0  # grows when what was read before no longer holds
        self._file, self._read = None, {}
        self._forget()

    def _forget(self) -> None:
        self.series: dict[str, Series] = {}
        self.facts: dict[str, str] = {}  # metrics that are texts: their last value
        self.last, self.lines, self.damaged, self._rest = -1, 0, [], b""
        self.generation += 1

    def refresh(self) -> None:
        """Reads what was written since the last call; from the start where the file was replaced. Raises OSError."""
        self._open_metrics()
        widths = {key: one.width for key, one in self.series.items()}
        while self._file is not None and (chunk := self._file.read(1 << 22)):
            *lines, self._rest = (self._rest + chunk).split(b"\n")
            for line in lines:
                self._take(line)
        for one in self.series.values():
            one.fold()
        if any(self.series[key].width != width for key, width in widths.items()):
            self.generation += 1
        if (text := self._changed(self.directory.config)) is not None:
            self.settings = flat_settings(text)
        if (text := self._changed(self.directory.samples)) is not None:
            self.samples = parse_samples(text)

    def series_points(self, since: int = 0) -> dict[str, dict[str, list]]:
        """The points of every metric from the step `since` on; see `Series.points`."""
        return {key: one.points(since) for key, one in sorted(self.series.items())}

    def since(self, step: int) -> int:
        """From which step on a reader that has all up to `step` has to read again."""
        return min((one.bucket_start(step) for one in self.series.values()), default=0) if step > 0 else 0

    def notes(self) -> list[str]:
        """What of the metrics could not be read."""
        found, file = [], self.directory.metrics
        if self.damaged:
            several = f"{len(self.damaged)} lines are" if len(self.damaged) > 1 else "a line is"
            found.append(f"{file}: {several} damaged and left out (line {self.damaged[0]})")
        if self._rest:
            found.append(f"{file}: the last line (line {self.lines + 1}) is cut short and left out")
        if not self.series:
            found.append(f"{file} holds no metrics yet" if file.exists() else f"{self.path} has no metrics.jsonl yet")
        return found

    def _open_metrics(self) -> None:
        """Opens metrics.jsonl, again if it is another file than before or shorter: a resumed run replaces it."""
        try:
            now = os.stat(self.directory.metrics)
        except FileNotFoundError:
            now = None
        if self._file is not None:
            ours = os.fstat(self._file.fileno())
            if now is not None and os.path.samestat(ours, now) and now.st_size >= self._file.tell():
                return
            self._file.close()
            self._file = None
            self._forget()
        if now is not None:
            self._file = open(self.directory.metrics, "rb")  # noqa: SIM115

    def _take(self, line: bytes) -> None:
        self.lines += 1
        if not line.strip():
            return
        record = parse_line(line + b"\n")
        if record is None or not 0 <= record["step"] < 2**53:
            self.damaged.append(self.lines)
            return
        step = record.pop("step")
        if step < self.last:  # written out of order: points before `last` are new
            self.generation += 1
        self.last = max(self.last, step)
        for key, value in record.items():
            if isinstance(value, str):
                self.facts[key] = value
            elif type(value) in (int, float) and not BY_LAYER.search(key):
                if key not in self.series:
                    self.series[key] = Series()
                self.series[key].add(step, _as_float(value))

    def _changed(self, file: Path) -> str | None:
        """The file's text, or its end if it is long, where it changed since the last call; else None."""
        try:
            now = os.stat(file)
            stamp = (now.st_mtime_ns, now.st_size)
            if self._read.get(file) == stamp:
                return None
            with open(file, "rb") as opened:
                opened.seek(max(0, now.st_size - TEXT_BYTES))
                text = opened.read().decode("utf-8", errors="replace")
        except OSError:
            return None
        self._read[file] = stamp
        return text


def open_runs(paths: list[Path]) -> list[Run]:
    """The runs of these directories, read as far as they are written. Raises ValueError where one is no run."""
    runs, seen = [], set()
    for path in paths:
        if (real := path.resolve()) in seen:
            raise ValueError(f"{path} is given twice")
        seen.add(real)
        runs.append(Run(path))
    for run in runs:
        run.refresh()
    return runs


def names(paths: list[Path]) -> list[str]:
    """A short name for each of several directories: as many of its last parts as tell it from the others."""
    parts = [path.resolve().parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        short = ["/".join(part[-count:]) for part in parts]
        if len(set(short)) == len(short):
            return short
    return [str(path) for path in paths]


def differences(runs: list[dict[str, str]]) -> dict[str, list[str | None]]:
    """Settings that are not the same in all runs, with each run's value; None where a run has no such key.

    A run's own name and place differ always and are left out.
    """
    keys = sorted({key for settings in runs for key in settings if not key.startswith("run.")})
    rows = {key: [settings.get(key) for settings in runs] for key in keys}
    return {key: row for key, row in rows.items() if len(set(row)) > 1}


def flat_settings(text: str) -> dict[str, str]:
    """A config.yaml as `model.layers` -> `4`; empty if it cannot be read."""
    try:
        tree = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    found: dict[str, str] = {}

    def walk(node, path: tuple[str, ...]) -> None:
        if isinstance(node, dict) and (node or not path):
            for key, value in node.items():
                walk(value, (*path, str(key)))
        else:
            found[".".join(path)] = node if isinstance(node, str) else json.dumps(node, default=str)

    if isinstance(tree, dict):
        walk(tree, ())
    return found


def parse_samples(text: str) -> list[dict]:
    """The samples of a samples.txt, oldest first: `step`, `prompt`, and `text`, which is what follows the prompt."""
    pieces = HEADING.split(text)[1:]  # step, prompt, text, step, ...; before the first heading may be half a sample
    found = []
    for step, quoted, body in zip(pieces[::3], pieces[1::3], pieces[2::3], strict=True):
        try:
            prompt = ast.literal_eval(quoted)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            prompt = ""
        body = body.removeprefix("\n").removesuffix("\n")
        prompt = prompt if isinstance(prompt, str) and body.startswith(prompt) else ""
        found.append({"step": int(step), "prompt": prompt, "text": body[len(prompt) :]})
    return found


def _as_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # an integer beyond the range of floats
        return float("inf") if value > 0 else float("-inf")


def _no_run(path: Path) -> str:
    if not path.is_dir():
        return f"{path} is no directory" if path.exists() else f"{path} does not exist"
    inside = sorted(file.parent for file in path.glob("*/metrics.jsonl"))
    if not inside:
        return f"{path} is no run: it holds no metrics.jsonl and no config.yaml"
    some = " ".join(map(str, inside[:3])) + (" ..." if len(inside) > 3 else "")
    return f"{path} is no run but holds {len(inside)}: give them ({some})"
