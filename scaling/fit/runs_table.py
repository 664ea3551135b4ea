"""Reads runs from anybody's table, CSV, JSON lines or a JSON list: numbers by column, and each row refused with its
reason.

Nothing is dropped silently: a row is either in `columns` or in `refused`, with its line in the file.
"""

import csv
import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from scaling.fit.laws import FLOPS_PER_TOKEN_AND_PARAMETER

LABELS = ("run", "group")  # columns that need not be numbers
MAY_BE_ZERO = ("S2",)
UTF16 = (b"\xff\xfe", b"\xfe\xff")  # how a file in it begins
UNITS = 3.0  # C over 6 N D beyond this factor is no other way to count FLOPs, but another unit


@dataclass(frozen=True)
class Refused:
    """A row that takes no part in the fit."""

    line: int  # in the file, from 1
    reason: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.reason}"


@dataclass(frozen=True)
class Table:
    """Runs of a file. `columns` maps letters (N, D, C, loss, ...) and labels (run, group) to arrays of equal length."""

    path: str
    digest: str  # SHA-256 of the file
    columns: dict[str, np.ndarray]
    lines: np.ndarray  # where each row stands in the file
    refused: tuple[Refused, ...]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.lines)

    def without(self, reasons: dict[int, str]) -> "Table":
        """The table less the rows of these indices, which are then among `refused`."""
        keep = np.array([row not in reasons for row in range(len(self))], bool)
        refused = [Refused(int(self.lines[row]), reason) for row, reason in reasons.items()]
        columns = {name: values[keep] for name, values in self.columns.items()}
        ordered = tuple(sorted((*self.refused, *refused), key=lambda row: row.line))
        return replace(self, columns=columns, lines=self.lines[keep], refused=ordered)

    def ordered(self) -> "Table":
        """The same rows in an order that does not depend on the file's, so that its order changes no digit."""
        order = np.lexsort([self.columns[name] for name in sorted(self.columns)])
        columns = {name: values[order] for name, values in self.columns.items()}
        return replace(self, columns=columns, lines=self.lines[order])


def read_table(path: str | Path, names: dict[str, str]) -> Table:
    """Reads the columns `names` maps letters to. Raises ValueError for a file or column that is not there.

    Refuses rows cut short, values that are missing, not numbers, not finite or not above 0, and exact repetitions;
    then rows whose C, or whose N D among runs of one group, shows another unit. D follows from C and N where only
    those are given.
    """
    text, rows, refused = read_rows(path, set(names.values()))
    there = list(dict.fromkeys(name for _, row in rows for name in row))
    for letter, name in names.items():
        if name not in there:
            raise ValueError(f"{path} has no column {name} (for {letter}); there are: {', '.join(there)[:500]}")
    kept, seen = [], {}
    for line, row in rows:
        values, reason = _values(row, names)
        reason = row.get("fault") or reason  # what `collect` found wrong with the run
        key = tuple(values.items())
        if reason is None and key in seen:
            reason = f"repeats line {seen[key]}: the same run twice?"
        if reason is None:
            kept.append((line, values))
            seen[key] = line
        else:
            refused.append(Refused(line, reason))
    if not kept:
        raise ValueError(f"{path}: every row is refused; {refused[0]}")
    columns = {letter: np.array([values[letter] for _, values in kept]) for letter in names}
    ordered = tuple(sorted(refused, key=lambda row: row.line))
    lines = np.array([line for line, _ in kept])
    table = Table(str(path), hashlib.sha256(Path(path).read_bytes()).hexdigest(), columns, lines, ordered, _notes(text))
    return _with_compute(_in_one_unit(table))


def read_rows(path: str | Path, wanted: Iterable[str] = ()) -> tuple[str, list[tuple[int, dict]], list[Refused]]:
    """A table's text, its rows as they stand there, with their lines, and lines that are no rows.

    Raises ValueError where there is no file or no row, and for a `wanted` column that stands there twice.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    content = path.read_bytes()
    text = content.decode("utf-16" if content[:2] in UTF16 else "utf-8-sig", errors="replace")
    if "\0" in text[:1000] or text.count("\ufffd") > len(text) // 10:
        raise ValueError(f"{path} is not text: a table is CSV, JSON lines or a JSON list")
    json_like = text.lstrip()[:1] in ("{", "[")
    rows, refused = _json_rows(text) if json_like else _csv_rows(text, set(wanted))
    if not rows:
        raise ValueError(f"{path} holds no rows" + (f": every line is refused; {refused[0]}" if refused else ""))
    return text, rows, refused


def _csv_rows(text: str, wanted: set[str]) -> tuple[list[tuple[int, dict]], list[Refused]]:
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    first = next((line for line in lines if line.strip()), None)
    if first is None:
        return [], []
    records = _records(lines, delimiter=max(",\t;", key=first.count))
    header = [name.strip() for name in records[0][1]]
    twice = [name for name, count in Counter(header).items() if count > 1 and name in wanted]
    if twice:
        raise ValueError(f"column {twice[0]} stands {header.count(twice[0])} times in the first line")
    rows, refused = [], []
    for line, fields in records[1:]:
        if len(fields) != len(header):
            cut = "cut short? " if len(fields) < len(header) else ""
            refused.append(Refused(line, f"{cut}{len(fields)} fields of {len(header)}"))
        else:
            rows.append((line, dict(zip(header, (field.strip() for field in fields), strict=True))))
    if rows and not text.endswith(("\n", "\r")) and rows[-1][0] == len(lines) and _shortest(rows):
        refused.append(Refused(rows.pop()[0], "cut short? no line end, and its last value is shorter than any other"))
    return rows, refused


def _records(lines: list[str], delimiter: str) -> list[tuple[int, list[str]]]:
    """Fields that are not all empty, by the line they end on.

    Quoted text may hold line ends. A quote that nobody closed takes its own line only: read on, it would swallow the
    rows below.
    """
    reader = csv.reader((line + "\n" for line in lines), delimiter=delimiter)
    records, before, swallowed = [], 0, False
    try:
        for fields in reader:
            if any(field.strip() for field in fields):
                records.append((reader.line_num, fields))
                swallowed |= reader.line_num > before + 1 and len(fields) != len(records[0][1])
            before = reader.line_num
        if swallowed:
            apart = [next(csv.reader([one], delimiter=delimiter), []) for one in lines]
            return [(line, one) for line, one in enumerate(apart, start=1) if any(field.strip() for field in one)]
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num} does not parse as CSV: {error}") from None
    return records


def _shortest(rows: list[tuple[int, dict]]) -> bool:
    """Whether the last row's last value has fewer characters than that of every other row."""
    *others, last = [len(list(row.values())[-1]) for _, row in rows]
    return bool(others) and last < min(others)


def _json_rows(text: str) -> tuple[list[tuple[int, dict]], list[Refused]]:
    if text.lstrip().startswith("["):
        try:
            rows = list(enumerate(json.loads(text), start=1))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"a JSON list that does not parse, cut short? {error}") from None
        return [row for row in rows if isinstance(row[1], dict)], [
            Refused(line, "not an object") for line, row in rows if not isinstance(row, dict)
        ]
    rows, refused = [], []
    for line, one in enumerate(text.splitlines(), start=1):
        if not one.strip():
            continue
        try:
            row = json.loads(one)
            if not isinstance(row, dict):
                raise ValueError
            rows.append((line, row))
        except (ValueError, RecursionError):
            refused.append(Refused(line, "cut short? not a JSON object"))
    return rows, refused


def _values(row: dict, names: dict[str, str]) -> tuple[dict, str | None]:
    """The row's values by letter, and why it is refused."""
    values = {}
    for letter, name in names.items():
        raw = row.get(name)
        if letter in LABELS:
            values[letter] = "" if raw is None else str(raw)
            continue
        try:
            value = float("true" if isinstance(raw, bool) else raw)
        except (TypeError, ValueError, OverflowError):
            return values, f"{name} is missing" if raw in (None, "") else f"{name} is {raw!r:.40}, not a number"
        if not math.isfinite(value):
            return values, f"{name} is {value}: a diverged run?" if letter == "loss" else f"{name} is {value}"
        if value < 0 or (value == 0 and letter not in MAY_BE_ZERO):
            return values, f"{name} is {value:g}, not above 0"
        values[letter] = value
    return values, None


def _notes(text: str) -> tuple[str, ...]:
    whole = text.endswith(("\n", "\r")) or text.rstrip().endswith("]")  # a JSON list that parses is whole
    return () if whole else ("the file does not end with a line end: was it cut short?",)


def _in_one_unit(table: Table) -> Table:
    """Refuses rows whose sizes disagree with one another by more than any way of counting explains."""
    n, d, c = (table.columns.get(letter) for letter in "NDC")
    if n is None or d is None:
        return table
    implied = FLOPS_PER_TOKEN_AND_PARAMETER * n * d
    if c is not None:
        ratio, what = c / implied, "C is {:.3g} times 6 N D"
        if not 1 / UNITS < np.median(ratio) < UNITS:
            raise ValueError(
                f"C is {np.median(ratio):.3g} times 6 N D in the middle of the table: is D in tokens, not in examples,"
                f" and N in parameters? (line {table.lines[0]}: N={n[0]:g}, D={d[0]:g}, C={c[0]:g})"
            )
    elif "group" in table.columns:
        groups = table.columns["group"]
        ratio = implied / np.array([np.median(implied[groups == group]) for group in groups])
        what = "6 N D is {:.3g} times that of its group's other runs"
    else:
        return table
    ratio, what = np.asarray(ratio), f"units mixed up (tokens against examples?): {what}"
    odd = np.flatnonzero((ratio > UNITS) | (ratio < 1 / UNITS))
    return table.without({int(row): what.format(ratio[row]) for row in odd})


def _with_compute(table: Table) -> Table:
    columns = dict(table.columns)
    if "N" in columns and "C" in columns and "D" not in columns:
        columns["D"] = columns["C"] / (FLOPS_PER_TOKEN_AND_PARAMETER * columns["N"])
    if "N" in columns and "D" in columns and "C" not in columns:
        columns["C"] = FLOPS_PER_TOKEN_AND_PARAMETER * columns["N"] * columns["D"]
    return replace(table, columns=columns)
