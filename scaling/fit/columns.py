"""Options about a table: which column holds what, the same for every command that reads one, and which rows count."""

import argparse
from collections.abc import Mapping

from scaling.fit.laws import Law
from scaling.fit.selection import Selection

# Letter -> (option, what it holds)
COLUMNS = {
    "N": ("--n", "parameters"),
    "D": ("--d", "training tokens"),
    "C": ("--c", "training FLOPs; with --n alone, D = C / (6 N)"),
    "U": ("--unique", "unique tokens"),
    "S1": ("--s1", "sum of learning rates"),
    "S2": ("--s2", "annealing area"),
    "F": ("--flops", "FLOPs of a step"),
    "P": ("--devices", "devices"),
    "V": ("--bytes", "bytes that a device exchanges in a step"),
    "group": ("--group", "budget that a run belongs to: isoFLOP parabolas"),
    "run": ("--run", "run that a row is a point of: envelope of training curves"),
}
LOSS = "loss in nats a token; seconds for step_time"
OR_EXPRESSION = "each COLUMN may be an expression (tokens*1e9, 10**logN, `a name`/2) or a constant"


def add_columns(options: argparse.ArgumentParser, defaults: Mapping[str, str] = {}) -> None:
    """Adds an option for each column; `defaults` are told in the help only, as not every table has them."""
    told = lambda letter: f" (default: {defaults[letter]})" if letter in defaults else ""
    required = "loss" not in defaults
    options.add_argument("--loss", required=required, metavar="COLUMN", help=f"{LOSS}; {OR_EXPRESSION}" + told("loss"))
    for letter, (flag, words) in COLUMNS.items():
        options.add_argument(flag, dest=letter, metavar="COLUMN", help=words + told(letter))
    words = "leave out runs of fewer tokens a parameter (default: 0)"
    options.add_argument("--min-ratio", type=float, default=0.0, metavar="D/N", help=words)


def chosen_columns(options: argparse.Namespace, law: Law, defaults: Mapping[str, str] = {}) -> dict[str, str]:
    """Letter, or loss -> column: those given, then defaults. Raises ValueError where the law needs another."""
    given = {letter: getattr(options, letter) for letter in (*COLUMNS, "loss")}
    names = {**defaults, **{letter: name for letter, name in given.items() if name is not None}}
    there = {*names, *"NDC"} if len(names.keys() & {*"NDC"}) > 1 and "N" in names else {*names}
    if missing := [letter for letter in law.inputs if letter not in there]:
        flags = ", ".join(COLUMNS[letter][0] for letter in missing)
        raise ValueError(f"the law {law.name} ({law.formula}) needs {flags}: the name of a column each")
    return names


def add_selection(options: argparse.ArgumentParser) -> None:
    """Adds the options that say which rows of a table are used; see `selection`."""
    options.add_argument("--where", metavar="EXPR", help="only rows where it holds: \"data == 'c4' and lr < 1e-2\"")
    options.add_argument("--outliers", metavar="COLUMN", help="leave out rows where this is true, 1 or yes")
    options.add_argument("--best", action="store_true", help="of rows of one size only that of the least loss")
    words = "runs whose C (or number in --group) lies within this share of one another are one budget: 0.05"
    options.add_argument("--group-width", type=float, metavar="SHARE", help=words)


def selection(options: argparse.Namespace) -> Selection:
    """Which rows the options of `add_selection` ask for. Raises ValueError for a --group-width out of range."""
    return Selection(options.where, options.outliers, options.best, options.group_width)


def check_flops(options: argparse.Namespace, law: Law) -> None:
    """Raises ValueError for a --budget, --holdout-above or --min-ratio out of range, or of no use to the law."""
    for name in ("budget", "holdout_above"):
        if (value := getattr(options, name)) is not None and not 0 < value < float("inf"):
            raise ValueError(f"--{name.replace('_', '-')} {value:g} must be above 0, in FLOPs")
    if not 0 <= options.min_ratio < float("inf"):
        raise ValueError(f"--min-ratio {options.min_ratio:g} must be 0 or more tokens a parameter")
    if options.budget and law.optimum is None:
        raise ValueError(f"--budget: {law.name} has no best N and D for a budget; hoffmann, kaplan and gadre have")
