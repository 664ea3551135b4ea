"""Reads runs from anybody's table, CSV, JSON lines or a JSON list: numbers by column, and each row refused with its
reason.

Nothing is dropped silently: a row is either in `columns` or in `refused`, with its line in the file.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from scaling.fit.expressions import Expression, cell, number
from scaling.fit.laws import FLOPS_PER_TOKEN_AND_PARAMETER
from scaling.fit.selection import EVERYTHING, Selection, best_of_each, binned, checked, holds
from scaling.fit.table_files import Refused, Rows, read_files

LABELS = ("run", "group")  # columns that need not be numbers
MAY_BE_ZERO = ("S2",)
UNITS = 3.0  # C over 6 N D beyond this factor is no other way to count FLOPs, but another unit


@dataclass(frozen=True)
class Table:
    """Runs of a file. `columns` maps letters (N, D, C, loss, ...) and labels (run, group) to arrays of equal length."""

    path: str
    digest: str  # SHA-256 of the file
    columns: dict[str, np.ndarray]
    lines: np.ndarray  # where each row stands in the file
    refused: tuple[Refused, ...]
    notes: tuple[str, ...] = ()
    others: dict[str, np.ndarray] = field(default_factory=dict)  # columns nobody asked for, as texts

    def __len__(self) -> int:
        return len(self.lines)

    def without(self, reasons: dict[int, str]) -> "Table":
        """The table less the rows of these indices, which are then among `refused`."""
        keep = np.array([row not in reasons for row in range(len(self))], bool)
        refused = [Refused(int(self.lines[row]), reason) for row, reason in reasons.items()]
        columns, others = ({name: x[keep] for name, x in part.items()} for part in (self.columns, self.others))
        ordered = tuple(sorted((*self.refused, *refused), key=lambda row: row.line))
        return replace(self, columns=columns, others=others, lines=self.lines[keep], refused=ordered)

    def ordered(self) -> "Table":
        """The same rows in an order that does not depend on the file's, so that its order changes no digit."""
        order = np.lexsort([self.columns[name] for name in sorted(self.columns)])
        columns, others = ({name: x[order] for name, x in part.items()} for part in (self.columns, self.others))
        return replace(self, columns=columns, others=others, lines=self.lines[order])


def read_table(
    path: str | Path | Sequence[str | Path], names: dict[str, str], selection: Selection = EVERYTHING
) -> Table:
    """Reads what `names` maps letters to: columns, expressions over columns, or constants; from a file or several.

    Refuses rows cut short, values that are missing, not numbers, not finite or not above 0, and exact repetitions;
    then rows whose C, or whose N D among runs of one group, shows another unit. D follows from C and N where only
    those are given. Raises ValueError for a file or column that is not there.
    """
    read = read_files(path, set(names.values()))
    sources = {letter: _source(name, letter, read) for letter, name in names.items()}
    rows, notes = _filtered(read, selection)
    marked = None if selection.marked is None else checked(selection.marked, read.names, "--outliers", read.path)
    kept, seen, refused = [], {}, list(read.refused)
    for line, row in rows:
        values, reason = _values(row, names, sources)
        reason = row.get("fault") or reason  # what `collect` found wrong with the run
        if reason is None and marked and holds(marked, row):
            reason = f"marked as an outlier by {selection.marked}"
        key = tuple(values.items())
        if reason is None and key in seen:
            reason = f"repeats line {seen[key]}: the same run twice?"
        if reason is None:
            kept.append((line, row, values))
            seen[key] = line
        else:
            refused.append(Refused(line, reason))
    if not kept:
        raise ValueError(f"{read.path}: every row is refused; {refused[0]}")
    columns = {letter: np.array([values[letter] for *_, values in kept]) for letter in names}
    used = {name for source in sources.values() if isinstance(source, Expression) for name in source.names}
    others = {
        name: np.array(["" if row.get(name) is None else str(row[name]) for _, row, _ in kept])
        for name in read.names
        if name not in used
    }
    ordered = tuple(sorted(refused, key=lambda row: row.line))
    lines = np.array([line for line, *_ in kept])
    table = Table(read.path, read.digest, columns, lines, ordered, (*read.notes, *notes), others)
    return _chosen(table, selection)


def _source(name: str, letter: str, read: Rows) -> Expression | float:
    """What a column option says: a column, a constant or an expression."""
    if name not in read.names:
        try:
            return number(name)
        except ValueError:
            pass
    try:
        return checked(name, read.names, letter, read.path)
    except ValueError as error:
        if "is not an expression" not in str(error):
            raise
        there = ", ".join(read.names)[:500]
        raise ValueError(f"{read.path} has no column {name} (for {letter}); there are: {there}") from None


def _filtered(read: Rows, selection: Selection) -> tuple[list[tuple[int, dict]], list[str]]:
    """The rows that the filter lets through, and how many it does not. Raises ValueError where none is left."""
    if selection.where is None:
        return read.rows, []
    condition = checked(selection.where, read.names, "--where", read.path)
    rows = [(line, row) for line, row in read.rows if holds(condition, row)]
    if not rows:
        raise ValueError(f"--where {selection.where!r} holds for none of the {len(read.rows)} rows of {read.path}")
    return rows, [f"--where {selection.where} leaves {len(rows)} of {len(read.rows)} rows"]


def _values(row: dict, names: dict[str, str], sources: dict[str, Expression | float]) -> tuple[dict, str | None]:
    """The row's values by letter, and why it is refused."""
    values = {}
    for letter, name in names.items():
        try:
            raw = _raw(row, sources[letter])
        except ValueError as error:
            return values, str(error)
        if letter in LABELS:
            values[letter] = "" if raw is None else str(raw)
            continue
        try:
            value = number(raw)
        except (TypeError, ValueError, OverflowError):
            return values, f"{name} is missing" if raw in (None, "") else f"{name} is {raw!r:.40}, not a number"
        if not math.isfinite(value):
            return values, f"{name} is {value}: a diverged run?" if letter == "loss" else f"{name} is {value}"
        if value < 0 or (value == 0 and letter not in MAY_BE_ZERO):
            return values, f"{name} is {value:g}, not above 0"
        values[letter] = value
    return values, None


def _raw(row: dict, source: Expression | float) -> object:
    """A row's value as it stands there, or worked out from others. Raises ValueError where an expression has none."""
    if not isinstance(source, Expression):
        return source
    if source.alone:
        return row.get(source.names[0])
    for name in source.names:
        if row.get(name) in (None, ""):
            raise ValueError(f"{name} is missing")
    return source({name: cell(row[name]) for name in source.names})


def _chosen(table: Table, selection: Selection) -> Table:
    """Budgets in bins, units checked, the best of each size."""
    if selection.bins is not None:
        table = _with_bins(table, selection.bins)
    table = _with_compute(_in_one_unit(table))
    return table.without(best_of_each(table.columns, table.lines)) if selection.best else table


def _with_bins(table: Table, width: float) -> Table:
    if "group" in table.columns:
        try:
            values = np.array([number(label) for label in table.columns["group"]])
        except ValueError:
            raise ValueError("--group-width needs numbers in --group, or C, or N and D") from None
    elif "C" in (derived := _with_compute(table).columns):  # units are looked at later, and need the C of the file
        values = derived["C"]
    else:
        raise ValueError("--group-width bins budgets: it needs --group, --c, or --n and --d")
    return replace(table, columns={**table.columns, "group": binned(values, width)})


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
