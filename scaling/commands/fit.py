"""python -m scaling fit: a law fitted to anybody's table."""

import argparse
import json
import sys
from pathlib import Path

from scaling.analysis import FitRequest, analyse
from scaling.console import show, wide_console
from scaling.laws import LAWS
from scaling.solver import KINDS, Objective
from scaling.table import read_table

# Columns: letter -> (option, what it holds)
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


def add_fit(options: argparse.ArgumentParser) -> None:
    options.set_defaults(command=run_fit)
    options.add_argument("table", help="CSV, JSON lines or JSON list, one run a row")
    options.add_argument("--law", choices=LAWS, default="hoffmann")
    options.add_argument("--loss", required=True, metavar="COLUMN", help="loss in nats a token; seconds for step_time")
    for letter, (flag, words) in COLUMNS.items():
        options.add_argument(flag, dest=letter, metavar="COLUMN", help=words)
    options.add_argument("--objective", choices=KINDS, default="huber", help="loss of log residuals (default: huber)")
    options.add_argument("--huber", type=float, default=1e-3, metavar="DELTA", help="Huber's delta (default: 1e-3)")
    options.add_argument("--bootstrap", type=int, default=1000, metavar="DRAWS", help="0: no intervals (default: 1000)")
    options.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: 0)")
    options.add_argument("--budget", type=float, metavar="FLOPS", help="give the best N, D and loss for this C")
    options.add_argument("--holdout-above", type=float, metavar="FLOPS", help="predict runs above from those below")
    options.add_argument("--json", type=Path, metavar="FILE", help="write everything there")


def run_fit(options: argparse.Namespace) -> None:
    """Reads, fits, prints, writes. Raises ValueError for the user's mistakes."""
    law = LAWS[options.law]
    names = {letter: getattr(options, letter) for letter in COLUMNS if getattr(options, letter) is not None}
    given = {*names, "D"} if {"N", "C"} <= names.keys() else {*names}
    if missing := [letter for letter in law.inputs if letter not in given]:
        flags = ", ".join(COLUMNS[letter][0] for letter in missing)
        raise ValueError(f"the law {law.name} ({law.formula}) needs {flags}: the name of a column each")
    for name in ("budget", "holdout_above"):
        if (value := getattr(options, name)) is not None and not 0 < value < float("inf"):
            raise ValueError(f"--{name.replace('_', '-')} {value:g} must be above 0, in FLOPs")
    if options.budget and law.optimum is None:
        raise ValueError(f"--budget: {law.name} has no best N and D for a budget; hoffmann, kaplan and gadre have")
    objective = Objective(options.objective, options.huber)
    request = FitRequest(law, objective, options.bootstrap, options.seed, options.budget, options.holdout_above)
    result = analyse(read_table(options.table, {**names, "loss": options.loss}), request)
    show(result, wide_console())
    if options.json:
        result["command"] = ["python", "-m", "scaling", *sys.argv[1:]]
        options.json.write_text(json.dumps(result, indent=1) + "\n")
