"""python -m scaling fit: a law fitted to anybody's table."""

import argparse
import json
import sys
from pathlib import Path

from scaling.console import show, wide_console
from scaling.fit.analysis import FitRequest, analyse
from scaling.fit.columns import add_columns, check_flops, chosen_columns
from scaling.fit.laws import LAWS
from scaling.fit.runs_table import read_table
from scaling.fit.solver import KINDS, Objective


def add_fit(options: argparse.ArgumentParser) -> None:
    options.set_defaults(command=run_fit)
    options.add_argument("table", help="CSV, JSON lines or JSON list, one run a row")
    options.add_argument("--law", choices=LAWS, default="hoffmann")
    add_columns(options)
    options.add_argument("--objective", choices=KINDS, default="huber", help="loss of log residuals (default: huber)")
    options.add_argument("--huber", type=float, default=1e-3, metavar="DELTA", help="Huber's delta (default: 1e-3)")
    options.add_argument("--bootstrap", type=int, default=1000, metavar="DRAWS", help="0: no intervals (default: 1000)")
    options.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: 0)")
    options.add_argument("--budget", type=float, metavar="FLOPS", help="give the best N, D and loss for this C")
    options.add_argument("--holdout-above", type=float, metavar="FLOPS", help="predict runs above from those below")
    options.add_argument("--keep-all", action="store_true", help="fit rows too that look diverged or in another unit")
    options.add_argument("--json", type=Path, metavar="FILE", help="write everything there")


def run_fit(options: argparse.Namespace) -> None:
    """Reads, fits, prints, writes. Raises ValueError for the user's mistakes."""
    law = LAWS[options.law]
    names = chosen_columns(options, law)
    check_flops(options, law)
    objective = Objective(options.objective, options.huber)
    request = FitRequest(
        law,
        objective,
        draws=options.bootstrap,
        seed=options.seed,
        budget=options.budget,
        holdout_above=options.holdout_above,
        min_ratio=options.min_ratio,
        keep_all=options.keep_all,
    )
    result = analyse(read_table(options.table, names), request)
    show(result, wide_console())
    if options.json:
        result["command"] = ["python", "-m", "scaling", *sys.argv[1:]]
        options.json.write_text(json.dumps(result, indent=1) + "\n")
