"""python -m scaling plan | run | status | collect: a sweep from its file to its results."""

import argparse
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

from config.build import build
from config.compose import load
from config.schema import Config, finish, identity
from runtime.exit_codes import DONE, FAULT, INTERRUPTED
from scaling.console import wide_console
from scaling.sweep.collect import collect, find, write
from scaling.sweep.design import Run, SweepConfig, design, expected_seconds, load_sweep
from scaling.sweep.launchers import PACKAGES, PREFIX
from scaling.sweep.provenance import code_digest
from scaling.sweep.run import Planned, measured, multirun, place, probes, run_missing, share
from scaling.sweep.submitted import Queue, run_on_launcher
from scaling.sweep.view import Progress, bill, plan_table, progress, remaining

CHECKOUT = Path(__file__).parents[2]
RUNS = Path("runs")  # of all sweeps, below the checkout


def add_plan(options: argparse.ArgumentParser) -> None:
    """Adds the options of `python -m scaling plan` to its parser, and `command`, which runs with them."""
    options.set_defaults(command=show_plan)
    options.add_argument("sweep", type=Path, help="a sweep.yaml")
    options.add_argument("--jobs", type=jobs, default=1, help="how many runs at once (default: 1)")
    options.add_argument("--measure", action="store_true", help="first learn the speed from three short runs")
    options.add_argument("--commands", action="store_true", help="print each run's command instead")
    options.add_argument("--hydra", action="store_true", help="print Hydra multiruns instead")


def add_run(options: argparse.ArgumentParser) -> None:
    """Adds the options of `python -m scaling run` to its parser, and `command`, which runs with them."""
    options.set_defaults(command=run_sweep)
    options.add_argument("sweep", type=Path, help="a sweep.yaml")
    options.add_argument("--jobs", type=jobs, default=1, help="how many at once; cores are shared out (default: 1)")
    options.add_argument(
        "--below", type=float, metavar="FLOPS", help="only runs of fewer: predict the rest before it runs"
    )
    options.add_argument("--retry", action="store_true", help="also failed ones, and the diverged from their start")
    options.add_argument("--launcher", help=f"one of Hydra's in place of this process: {', '.join(PACKAGES)}")
    options.add_argument("settings", nargs="*", metavar=f"{PREFIX}KEY=VALUE", help="for the launcher")
    options.add_argument("--resubmit", action="store_true", help="also what SLURM may have, if it cannot be asked")


def add_status(options: argparse.ArgumentParser) -> None:
    """Adds the options of `python -m scaling status` to its parser, and `command`, which runs with them."""
    options.set_defaults(command=show_status)
    options.add_argument("sweep", type=Path, help="a sweep.yaml")
    options.add_argument("--jobs", type=jobs, default=1, help="how many run at once: for the time left (default: 1)")


def add_collect(options: argparse.ArgumentParser) -> None:
    """Adds the options of `python -m scaling collect` to its parser, and `command`, which runs with them."""
    options.set_defaults(command=run_collect)
    options.add_argument("sources", type=Path, nargs="+", help="a sweep.yaml, or directories of runs or of offline W&B")
    options.add_argument("--out", type=Path, metavar="FILE", help="default: results.jsonl beside the sweep.yaml")
    options.add_argument("--points", action="store_true", help="evaluations at the peak learning rate, not only ends")


def jobs(text: str) -> int:
    """A count of 1 or more as it was typed; raises argparse.ArgumentTypeError for anything else."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} must be 1 or more")
    return int(text)


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
    """Runs what is missing. Returns FAULT if some runs are not there in the end, INTERRUPTED after Ctrl-C.

    Raises ValueError for the user's mistakes.
    """
    if options.launcher is None and (options.settings or options.resubmit):
        raise ValueError(f"{' '.join(options.settings) or '--resubmit'} is for --launcher {'|'.join(PACKAGES)}")
    sweep, planned = planned_runs(options.sweep)
    if options.below is not None:
        planned = [one for one in planned if one.run.flops < options.below]
        if not planned:
            raise ValueError(f"--below {options.below:g}: no run of {sweep.name} has fewer FLOPs")
    queue, root = Queue(planned), RUNS / sweep.name
    if options.launcher is None and (theirs := sum(state.name == "queued" for state in queue.states())):
        raise ValueError(f"a launcher has {theirs} of the runs already; wait for them with --launcher, or end its jobs")
    times = lambda: expected(sweep, planned, options.jobs)
    with Progress(sweep, planned, times, options.jobs, wide_console(), queue.states) as view:
        if options.launcher is None:
            whole = run_missing(planned, root, CHECKOUT, view.show, jobs=options.jobs, retry=options.retry)
        else:
            settings, again = launcher_settings(options), {"retry": options.retry, "resubmit": options.resubmit}
            whole = run_on_launcher(planned, root, CHECKOUT, queue, view.show, options.launcher, settings, **again)
        if not whole:
            theirs = sum(state.name == "queued" or "SLURM" in state.reason for state in queue.ask())
            told = f"{theirs} runs are SLURM's and go on" if theirs else "all runs have saved"
            print(f"interrupted: {told}; the same command goes on", file=sys.stderr)
            return INTERRUPTED
    left = [one.directory.name for one in planned if one.state().name not in ("done", "diverged")]
    if left:
        print(
            f"{len(left)} runs are not there: {', '.join(left[:4])}; --retry tries failed ones again", file=sys.stderr
        )
    return FAULT if left else DONE


def launcher_settings(options: argparse.Namespace) -> list[str]:
    """The settings as given; --jobs is what joblib calls n_jobs."""
    jobs = f"{PREFIX}n_jobs"
    given = any(setting.startswith(f"{jobs}=") for setting in options.settings)
    return [*options.settings, *([f"{jobs}={options.jobs}"] if options.launcher == "joblib" and not given else [])]


def show_status(options: argparse.Namespace) -> None:
    """Prints how far each run is and how long the rest will take, from the files of the runs; starts nothing.

    Where a launcher cannot be asked what is queued, standard error says so, and only the files count.
    """
    sweep, planned = planned_runs(options.sweep)
    queue = Queue(planned)
    states = queue.states()
    if queue.unknown:
        print(f"which runs are queued is not known: {queue.unknown}", file=sys.stderr)
    left = remaining(expected(sweep, planned, options.jobs), states)
    left = None if left is None else left / options.jobs
    wide_console().print(progress(sweep, planned, states, left, limit=len(planned)))


def run_collect(options: argparse.Namespace) -> None:
    """Writes the rows, and tells what is wrong with each that has no loss.

    Raises ValueError for the user's mistakes.
    """
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
