"""Which rows of a table take part: a filter, a column that marks outliers, the best of each size; budgets in bins."""

from dataclasses import dataclass

import numpy as np

from scaling.fit.expressions import Expression, cell, parse

NO = ("", "0", "0.0", "false", "no", "n", "none", "nan")  # of a column that marks outliers: these rows are none
MOST_BINS = 2.0  # a bin wider than a factor of 3 would mix budgets


@dataclass(frozen=True)
class Selection:
    """What a user says about a table's rows. Raises ValueError for a width out of range."""

    where: str | None = None  # an expression over columns: only rows where it holds
    marked: str | None = None  # a column, or an expression, that is true for outliers
    best: bool = False  # of rows of one size (and group) only that of the least loss: a grid of settings was tried
    bins: float | None = None  # relative width in C (or in a column of numbers, group) of what counts as one budget

    def __post_init__(self):
        if self.bins is not None and not 0 < self.bins <= MOST_BINS:
            raise ValueError(f"--group-width {self.bins:g} must be above 0 and at most {MOST_BINS:g}: 0.05 is 5%")


EVERYTHING = Selection()


def checked(text: str, there: list[str], what: str, path: str) -> Expression:
    """An expression over a table's columns. Raises ValueError for a name that is none of them."""
    if text in there:
        return parse(f"`{text}`")
    expression = parse(text)
    if missing := [name for name in expression.names if name not in there]:
        raise ValueError(f"{path} has no column {missing[0]} (for {what}); there are: {', '.join(there)[:500]}")
    return expression


def holds(expression: Expression, row: dict) -> bool:
    """Whether it is true for a row; where it has no value, as for a comparison of a text with a number, it is not."""
    try:
        value = expression({name: cell(row.get(name)) for name in expression.names})
    except ValueError:
        return False
    return str(value).strip().lower() not in NO


def best_of_each(columns: dict[str, np.ndarray], lines: np.ndarray) -> dict[int, str]:
    """Row -> why it is left out: another row of the same sizes, and of the same group, has a lower loss."""
    sizes = [columns[name] for name in sorted(columns) if name not in ("loss", "run")]
    best: dict[tuple, int] = {}
    keys = list(zip(*sizes, strict=True))
    for row, key in enumerate(keys):
        if key not in best or columns["loss"][row] < columns["loss"][best[key]]:
            best[key] = row
    return {
        row: f"line {lines[best[key]]} has a lower loss at the same sizes (--best)"
        for row, key in enumerate(keys)
        if best[key] != row
    }


def binned(values: np.ndarray, width: float) -> np.ndarray:
    """Labels of bins: values in order, each bin from its least value to `width` above it; named by its middle value."""
    order, labels, first = np.argsort(values, kind="stable"), np.empty(len(values), int), None
    bin_ = -1
    for row in order:
        if first is None or values[row] > first * (1 + width):
            bin_, first = bin_ + 1, values[row]
        labels[row] = bin_
    names = [f"{np.median(values[labels == one]):.6g}" for one in range(bin_ + 1)]
    return np.array([names[one] for one in labels])
