"""Scaling laws: python -m scaling plan | run | status | collect SWEEP, fit TABLE. Options: --help.

Exit codes: 0 done; 2 the user's mistake, told in one line; 3 runs that failed; 130 interrupted.
"""

import argparse
import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from config import Config, build, finish, identity, load
from scaling.analysis import FitRequest, analyse
from scaling.collect import collect, find, write
from scaling.console import show
from scaling.design import Run, SweepConfig, design, expected_seconds, load_sweep
from scaling.laws import LAWS
from scaling.solver import KINDS, Objective
from scaling.sweep import Planned, code_digest, measured, multirun, place, probes, run_missing, share
from scaling.sweep_view import Progress, bill, plan_table, progress, remaining
from scaling.table import read_table

MISTAKE, FAILED, INTERRUPTED = 2, 3, 130
CHECKOUT = Path(__file__).parents[1]
RUNS = Path("runs")  # of all sweeps, below the checkout
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


class Parser(argparse.ArgumentParser):
    """Tells a mistake in one line."""

    def error(self, message: str):
        print(f"error: {message}; see python -m scaling --help", file=sys.stderr)
        sys.exit(MISTAKE)


def parser() -> Parser:
    """All subcommands; each sets `command` to a function of the parsed options."""
    top = Parser(prog="python -m scaling", description="Scaling laws from tables of runs.", allow_abbrev=False)
    commands = top.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)
    add_plan(commands.add_parser("plan", help="show the runs of a sweep.yaml and the bill", allow_abbrev=False))
    add_run(commands.add_parser("run", help="run what is missing of a sweep", allow_abbrev=False))
    add_status(commands.add_parser("status", help="show how far a sweep is", allow_abbrev=False))
    add_collect(commands.add_parser("collect", help="write results.jsonl from runs", allow_abbrev=False))
    add_fit(commands.add_parser("fit", help="fit a law to a CSV, JSON lines or JSON table", allow_abbrev=False))
    return top


def add_plan(options: Parser) -> None:
    options.set_defaults(command=show_plan)
    options.add_argument("sweep", type=Path, help="a sweep.yaml")
    options.add_argument("--jobs", type=jobs, default=1, help="how many runs at once (default: 1)")
    options.add_argument("--measure", action="store_true", help="first learn the speed from three short runs")
    options.add_argument("--commands", action="store_true", help="print each run's command instead")
    options.add_argument("--hydra", action="store_true", help="print Hydra multiruns instead")


def add_run(options: Parser) -> None:
    options.set_defaults(command=run_sweep)
    options.add_argument("sweep", type=Path, help="a sweep.yaml")
    options.add_argument("--jobs", type=jobs, default=1, help="how many at once; cores are shared out (default: 1)")
    options.add_argument("--retry", action="store_true", help="also failed ones, and the diverged from their start")


def add_status(options: Parser) -> None:
    options.set_defaults(command=show_status)
    options.add_argument("sweep", type=Path, help="a sweep.yaml")
    options.add_argument("--jobs", type=jobs, default=1, help="how many run at once: for the time left (default: 1)")


def add_collect(options: Parser) -> None:
    options.set_defaults(command=run_collect)
    options.add_argument("sources", type=Path, nargs="+", help="a sweep.yaml, or directories of runs or of offline W&B")
    options.add_argument("--out", type=Path, metavar="FILE", help="default: results.jsonl beside the sweep.yaml")
    options.add_argument("--points", action="store_true", help="evaluations at the peak learning rate, not only ends")


def jobs(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} must be 1 or more")
    return int(text)


# --------------------------------------------------------------------------------------------------------------- sweep


def planned_runs(path: Path) -> tuple[SweepConfig, list[Planned]]:
    """The sweep of a file, and its runs with their directories; each run's overrides are checked."""
    sweep = load_sweep(path)
    base = load(list(sweep.overrides))
    runs = design(sweep, base.model, base.train.seq_len)

    def identify(run: Run) -> tuple[dict, int]:
        values = asdict(base)
        for key, value in run.settings.items():  # as Hydra would, in a hundredth of its time
            group, _, name = key.rpartition(".")
            (values[group] if group else values)[name] = value
        config = finish(build(Config, values))
        return identity(config), config.train.eval_batches

    return sweep, place(runs, identify, RUNS / sweep.name, code_digest(CHECKOUT))


def expected(sweep: SweepConfig, planned: list[Planned], count: int) -> list[float | None]:
    """Seconds of each run, from runs that ended on this machine."""
    speeds = measured([*planned, *probes(planned, RUNS / sweep.name)], count)
    return [expected_seconds(one.run, speeds) for one in planned]


def show_plan(options: argparse.Namespace) -> int:
    """Prints the runs and the bill. Returns INTERRUPTED after Ctrl-C while measuring."""
    sweep, planned = planned_runs(options.sweep)
    runs, console = [one.run for one in planned], wide_console()
    if options.commands or options.hydra:
        print("\n".join(multirun(planned) if options.hydra else [shlex.join(one.command()) for one in planned]))
        return 0
    if options.measure:
        root, short = RUNS / sweep.name, probes(planned, RUNS / sweep.name)
        if not run_missing(short, root, CHECKOUT, lambda: None, cores_each=share(options.jobs)):
            return INTERRUPTED
        for one in short:
            if (state := one.state()).name != "done":
                print(f"{one.directory}: {state.name}: {state.reason}", file=sys.stderr)
    seconds = expected(sweep, planned, options.jobs)
    console.print(plan_table(runs, seconds))
    console.print(bill(runs, seconds, options.jobs), soft_wrap=True, highlight=False)
    return 0


def run_sweep(options: argparse.Namespace) -> int:
    """Runs what is missing. Returns FAILED if some runs are not there in the end, INTERRUPTED after Ctrl-C."""
    sweep, planned = planned_runs(options.sweep)
    with Progress(sweep, planned, lambda: expected(sweep, planned, options.jobs), options.jobs, wide_console()) as view:
        root = RUNS / sweep.name
        if not run_missing(planned, root, CHECKOUT, view.show, jobs=options.jobs, retry=options.retry):
            print("interrupted: all runs have saved; the same command goes on", file=sys.stderr)
            return INTERRUPTED
    left = [one.directory.name for one in planned if one.state().name not in ("done", "diverged")]
    if left:
        print(
            f"{len(left)} runs are not there: {', '.join(left[:4])}; --retry tries failed ones again", file=sys.stderr
        )
    return FAILED if left else 0


def show_status(options: argparse.Namespace) -> None:
    sweep, planned = planned_runs(options.sweep)
    states = [one.state() for one in planned]
    left = remaining(expected(sweep, planned, options.jobs), states)
    left = None if left is None else left / options.jobs
    wide_console().print(progress(sweep, planned, states, left, limit=len(planned)))


def run_collect(options: argparse.Namespace) -> None:
    """Writes the rows, and tells what is wrong with each that has no loss."""
    files = [path for path in options.sources if path.suffix in (".yaml", ".yml")]
    if len(files) > 1:
        raise ValueError(f"{len(files)} sweeps: {', '.join(map(str, files))}; collect them one by one")
    out = options.out or (files[0].with_name("results.jsonl") if files else None)
    if out is None:
        raise ValueError("--out FILE says where to write what directories hold; a sweep.yaml has it beside itself")
    sweep, planned = planned_runs(files[0]) if files else (None, None)
    directories = [path for path in options.sources if path not in files] or [RUNS / sweep.name]
    rows = collect(find(directories), identity, planned, points=options.points)
    write(rows, out)
    for row in rows:
        if row.get("fault") or row.get("note"):
            print(f"{row.get('source', row['run'])}: {row.get('fault') or row['note']}")
    faults = sum(row["loss"] is None for row in rows)
    print(f"{out}: {len(rows) - faults} rows to fit, {faults} with a fault")
    print(f"fit: python -m scaling fit {out} --n parameters --d tokens --c flops --loss loss --group group")


# ----------------------------------------------------------------------------------------------------------------- fit


def add_fit(options: Parser) -> None:
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


def wide_console() -> Console:
    """Of the terminal's width; a pipe has none to respect."""
    console = Console()
    return console if console.is_terminal else Console(width=160)


def main(arguments: list[str]) -> int:
    """Runs one subcommand; returns the exit code."""
    options = parser().parse_args(arguments)
    try:
        return options.command(options) or 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
