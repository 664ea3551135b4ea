"""Which mesh, schedule and remat for a model on a machine, before it is paid for: python -m planner [key=value ...]

    python -m planner model=llama3_8b train.batch_size=512 train.seq_len=8192 --hardware h200 --devices 64

Every legal layout is weighed by arithmetic; no device is needed and no JAX is imported. Keys of train.py that are given
are kept, all others of the layout are searched. Exit codes: 0 done; 2 the user's mistake, or nothing fits, in one line.
"""

import sys
from argparse import Namespace
from pathlib import Path

from config.compose import load
from planner import explain, report
from planner.cost import Planner
from planner.machine import known, open_machine
from planner.search import Found, Pins, pins_of, search
from planner.software import PROGRAMS, program
from runtime import leave
from runtime.arguments import Parser
from runtime.exit_codes import DONE, MISTAKE

COMMANDS = ("calibrate", "inference")


def arguments(words: list[str]) -> tuple[Namespace, list[str]]:
    """The program's own options, and the settings."""
    parser = Parser(
        "python -m planner",
        description="Ranks the layouts of a run on a machine that need not be there.",
        usage="%(prog)s [--hardware NAME|FILE.yaml] [--devices N] [--top N] [--json FILE] [--picture FILE] "
        "[key=value ...]\n"
        "       %(prog)s inference [--hardware NAME] ... [key=value ...]\n       %(prog)s calibrate RUN [RUN ...]",
    )
    parser.add_argument("--hardware", default="h200", help=f"{', '.join(known())}, or a .yaml file like those")
    parser.add_argument("--devices", type=int, default=8, help="as JAX counts them")
    parser.add_argument("--top", type=int, default=10, help="how many meshes are told of")
    parser.add_argument("--tokens", type=float, help="of the whole run, for its cost; default: train.steps")
    parser.add_argument("--program", default="isomesh", help=f"whose behaviour is priced: {', '.join(PROGRAMS)}")
    parser.add_argument("--json", type=Path, help="all layouts, for programs")
    parser.add_argument("--picture", type=Path, help="parts of a step and of memory, .png or .svg")
    return parser.parse_known_args(words)


def plan(words: list[str]) -> None:
    """Prints a plan. Raises ValueError where there is none, OSError where a file cannot be written."""
    options, settings = arguments(words)
    for name in ("devices", "top"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} {getattr(options, name)} must be 1 or more")
    machine = open_machine(options.hardware)
    config = load(settings)
    planner = Planner(config, machine, options.devices, program(options.program, machine.platform))
    pins = pins_of(config, settings)
    found = best(planner, pins)
    train = config.train
    tokens = options.tokens or float(train.steps * train.batch_size * train.seq_len)
    print(report.text(planner, found, settings, options.top, tokens))
    if options.json:
        report.write_json(options.json, report.as_json(planner, found, settings, options.top))
    if options.picture:
        report.picture(planner, found.meshes()[: options.top], options.picture)


def best(planner: Planner, pins: Pins) -> Found:
    """What a search finds. Raises ValueError where no layout is legal, or none fits."""
    found = search(planner, pins)
    if not found.considered:
        raise ValueError(explain.nothing_legal(planner, pins))
    if not found.fitting:
        raise ValueError(explain.nothing_fits(planner, found, pins))
    return found


def main(words: list[str]) -> int:
    """Runs one command; returns the exit code."""
    try:
        plan(words)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return MISTAKE
    return DONE


if __name__ == "__main__":
    leave.answer_signals()
    sys.exit(main(sys.argv[1:]))
