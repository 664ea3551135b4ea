"""metrics.jsonl, the record of a run: written line by line, read back, and cut where a run goes on."""

import errno
import json
import logging
import math
import os
from pathlib import Path

from runtime.files import naming
from tracking.sinks import Sink

log = logging.getLogger("isomesh.metrics")


class MetricsFile(Sink):
    """metrics.jsonl: one JSON object a line, `step` first.

    Floats have their full precision (repr); NaN and the infinities, which JSON lacks, are the strings "NaN",
    "Infinity", "-Infinity". Every line is handed to the system at once: a killed run loses at most the one being
    written. `read_metrics` reads it back.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._file = None
        self._failed = False

    def log(self, step: int, metrics: dict) -> None:
        """Appends one line; values are Python or NumPy numbers, strings, booleans.

        Where the disk refuses it, it is lost, and a warning tells of the first.
        """
        record = {"step": int(step), **{key: _plain(value) for key, value in metrics.items()}}
        line = json.dumps(record, allow_nan=False) + "\n"
        try:
            if self._file is None:
                # Unbuffered: a line that a full disk refused must not come back with the next.
                self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115
            # What an earlier failure tore off must not swallow this line.
            data = ("\n" + line if self._failed else line).encode()
            if self._file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._failed = False
        except OSError as error:
            if not self._failed:
                log.warning("cannot write %s (%s); training goes on", self.path, error.strerror)
            self._failed = True

    def resume(self, step: int) -> None:
        """Drops, atomically, every line after `step` and a torn one, so that no step is there twice.

        Raises OSError if the file cannot be rewritten: two histories in one file would be worse.
        """
        self.close()
        if not self.path.exists():
            return
        lines = self.path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if (record := parse_line(line)) is not None and record["step"] <= step]
        if kept == lines:
            return
        temporary = self.path.with_name(self.path.name + ".tmp")
        with naming(self.path), open(temporary, "wb") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def read_metrics(path: str | os.PathLike) -> list[dict]:
    """The lines of a metrics.jsonl as dicts, with NaN and infinities as floats again; a torn line is left out."""
    records = (parse_line(line) for line in Path(path).read_bytes().splitlines(keepends=True))
    return [record for record in records if record is not None]


def last_value(path: str | os.PathLike, key: str):
    """The value under `key` in the last line of a metrics.jsonl that has it; None where there is none, or no file."""
    try:
        lines = Path(path).read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return None
    records = (parse_line(line) for line in reversed(lines))
    return next((record[key] for record in records if record is not None and key in record), None)


NONFINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _plain(value):
    """A NumPy or Python scalar as what JSON can hold without loss."""
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def parse_line(line: bytes) -> dict | None:
    """One line, its end included, as a dict; None for a line cut short by a kill or a full disk."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not line.endswith(b"\n") or not isinstance(record, dict) or type(record.get("step")) is not int:
        return None
    return {key: NONFINITE.get(value, value) if isinstance(value, str) else value for key, value in record.items()}
