"""python -m scaling transfer: does the best learning rate stay where it is when the model grows?"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from scaling.console import wide_console
from scaling.strict_json import write
from scaling.transfer.optimum import Transfer, picture, transfers

MOVED = 1


def add_transfer(options: argparse.ArgumentParser) -> None:
    """Adds the options of `python -m scaling transfer` to its parser, and `command`, which runs with them."""
    options.set_defaults(command=run_transfer)
    options.add_argument("results", type=Path, help="results.jsonl of a sweep over the key and the size")
    options.add_argument("--key", default="lr", metavar="COLUMN", help="what is to stay (default: lr)")
    options.add_argument("--size", default="width", metavar="COLUMN", help="what grows (default: width)")
    options.add_argument("--split", default="parametrization", metavar="COLUMN", help="(default: parametrization)")
    options.add_argument("--within", type=float, metavar="FACTOR", help="exit with 1 if a family's best moves by more")
    options.add_argument("--png", type=Path, metavar="FILE", help="draw loss against the key")
    options.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")


def run_transfer(options: argparse.Namespace) -> int:
    """Prints the optimum of every size and by how much it moves; MOVED if that is more than --within.

    Raises ValueError for the user's mistakes.
    """
    if options.within is not None and not options.within >= 1:
        raise ValueError(f"--within {options.within:g} must be 1 or more: it is the largest optimum over the smallest")
    rows = [json.loads(line) for line in options.results.read_text().splitlines() if line.strip()]
    found = transfers(rows, options.key, options.size, options.split)
    grid = Table(options.split, options.size, f"best {options.key}", "by each seed", "loss there", "why not")
    for family in found:
        for one in family.optima:
            best, loss = ("", "") if one.value is None else (f"{one.value:.3g}", f"{one.loss:.4f}")
            alone = " ".join(f"{value:.3g}" for value in one.by_seed)
            grid.add_row(family.name, f"{one.size:g}", best, alone, loss, one.refused)
    console = wide_console()
    console.print(grid)
    for family in found:
        console.print(told(family, options.key), highlight=False, soft_wrap=True)
    left_out = sum(row.get("loss") is None for row in rows)
    console.print(f"{len(rows)} rows, {left_out} without a loss left out", highlight=False)
    if options.png:
        picture(found, options.key, options.size, options.png)
    if options.json:
        numbers = [{"name": family.name, "factor": family.factor, **asdict(family)} for family in found]
        write(options.json, numbers)
    beyond = [f for f in found if options.within and (f.factor is None or f.factor > options.within)]
    return MOVED if beyond else 0


def told(family: Transfer, key: str) -> str:
    """What became of a family, in a line."""
    if family.factor is None:
        return f"{family.name}: not every size has an optimum on this grid; add values of {key}"
    first, last = family.optima[0], family.optima[-1]
    return (
        f"{family.name}: the best {key} moves by a factor of {family.factor:.2f} from {first.size:g} to {last.size:g}"
    )
