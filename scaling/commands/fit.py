"""python -m scaling fit and predict: a law fitted to anybody's table, and what it says of other runs."""

import argparse
import sys
from pathlib import Path

from scaling.console import show, show_predictions, wide_console
from scaling.fit.analysis import FitRequest, analyse
from scaling.fit.columns import add_columns, add_selection, check_flops, chosen_columns, selection
from scaling.fit.constraints import constrained, numbers, pairs
from scaling.fit.laws import LAWS, Law
from scaling.fit.own_law import own_law
from scaling.fit.resampling import KINDS as RESAMPLED
from scaling.fit.runs_table import read_table
from scaling.fit.solver import KINDS, Objective
from scaling.strict_json import write


def add_fit(options: argparse.ArgumentParser) -> None:
    """Adds the options of `python -m scaling fit` to its parser, and `command`, which runs with them."""
    options.set_defaults(command=run_fit, at=[])
    _add_common(options)
    options.add_argument("--budget", type=float, metavar="FLOPS", help="give the best N, D and loss for this C")
    options.add_argument("--holdout-above", type=float, metavar="FLOPS", help="predict runs above from those below")


def add_predict(options: argparse.ArgumentParser) -> None:
    """Adds the options of `python -m scaling predict` to its parser, and `command`, which runs with them."""
    options.set_defaults(command=run_predict, budget=None, holdout_above=None)
    _add_common(options)
    words = "where to predict the loss, N=7B,D=1.4T or N=7B,C=6e22; as often as wanted"
    options.add_argument("--at", action="append", required=True, metavar="SIZES", help=words)


def _add_common(options: argparse.ArgumentParser) -> None:
    options.add_argument(
        "table", nargs="+", help="CSV, JSON lines or JSON list, one run a row, or .gz; several are one"
    )
    words = f"{', '.join(LAWS)}, or one of your own: 'E + A/N^a + B/D^b' (default: hoffmann)"
    options.add_argument("--law", default="hoffmann", metavar="LAW", help=words)
    options.add_argument("--fix", action="append", default=[], metavar="NAME=VALUE", help="hold a parameter at a value")
    options.add_argument("--tie", action="append", default=[], metavar="NAME=OTHER", help="one value for both")
    add_columns(options)
    add_selection(options)
    options.add_argument("--objective", choices=KINDS, default="huber", help="loss of residuals (default: huber)")
    options.add_argument("--huber", type=float, default=1e-3, metavar="DELTA", help="Huber's delta (default: 1e-3)")
    words = "of the log of the loss, or of the loss (default: log)"
    options.add_argument("--residuals", choices=("log", "linear"), default="log", help=words)
    options.add_argument("--bootstrap", type=int, default=1000, metavar="DRAWS", help="0: no intervals (default: 1000)")
    words = "what the bootstrap draws (default: runs if rows share them in --run, cases for many rows, else residuals)"
    options.add_argument("--resample", choices=RESAMPLED, help=words)
    options.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: 0)")
    options.add_argument("--keep-all", action="store_true", help="fit rows too that look diverged or in another unit")
    options.add_argument("--json", type=Path, metavar="FILE", help="write everything there")


def chosen_law(options: argparse.Namespace) -> Law:
    """A named law or an expression, with what is fixed and tied. Raises ValueError for anything else."""
    if options.law in LAWS:
        law = LAWS[options.law]
    elif options.law.isidentifier():
        raise ValueError(f"--law: invalid choice: '{options.law}' (choose from {', '.join(LAWS)}, or an expression)")
    else:
        law = own_law(options.law)
    return constrained(law, numbers(options.fix, "--fix"), pairs(options.tie, "--tie"))


def analysed(options: argparse.Namespace) -> dict:
    """Reads and fits. Raises ValueError for the user's mistakes."""
    law = chosen_law(options)
    names = chosen_columns(options, law)
    check_flops(options, law)
    request = FitRequest(
        law,
        Objective(options.objective, options.huber, options.residuals == "linear"),
        draws=options.bootstrap,
        seed=options.seed,
        budget=options.budget,
        holdout_above=options.holdout_above,
        min_ratio=options.min_ratio,
        keep_all=options.keep_all,
        resample=options.resample,
        points=tuple(points(options.at)),
    )
    result = analyse(read_table(options.table, names, selection(options)), request)
    return result | {"command": ["python", "-m", "scaling", *sys.argv[1:]]}


def points(texts: list[str]) -> list[dict[str, float]]:
    """Sizes by letter. Raises ValueError for sizes that are not above 0."""
    found = [numbers([text], "--at") for text in texts]
    for point in found:
        for letter, value in point.items():
            if not 0 < value < float("inf"):
                raise ValueError(f"--at {letter}={value:g} must be above 0")
    return found


def run_fit(options: argparse.Namespace) -> None:
    """Reads, fits, prints, writes. Raises ValueError for the user's mistakes."""
    result = analysed(options)
    show(result, wide_console())
    if options.json:
        write(options.json, result)


def run_predict(options: argparse.Namespace) -> None:
    """Prints predictions and what speaks against them, and writes. Raises ValueError for the user's mistakes."""
    result = analysed(options)
    show_predictions(result, wide_console())
    if options.json:
        write(options.json, result)
