"""Draws and compares pipeline schedules.

python -m parallel.pipeline show 1f1b --stages 4 --microbatches 8 --out 1f1b.png
python -m parallel.pipeline compare --stages 4 --microbatches 8
"""

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from parallel.pipeline.schedules import DEFAULT_CHUNKS, make, read_csv, write_csv
from parallel.pipeline.view import WRITERS, facts, terminal
from runtime.arguments import Parser
from runtime.exit_codes import DONE, MISTAKE

MOST_CELLS = 20_000  # stages * chunks * microbatches; more are no drawing anybody can read


def main(arguments: Sequence[str]) -> int:
    """Does what the command line asks; returns the exit code. Help and misspelled options end the process at once."""
    options = _parser().parse_args(arguments)
    try:
        options.command(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    return DONE


def show(options: Namespace) -> None:
    """Draws one schedule in the terminal and writes the files that were asked for.

    Raises ValueError for the user's mistakes.
    """
    if options.out and Path(options.out).suffix not in WRITERS:
        raise ValueError(f"--out {options.out}: a picture is {' or '.join(WRITERS)}")
    name = options.schedule
    sizes = {"--stages": options.stages, "--microbatches": options.microbatches}
    missing = [option for option, size in sizes.items() if size is None]
    if name.endswith(".csv") and len(missing) == len(sizes):
        schedule = read_csv(name)
    elif missing:
        raise ValueError(f"{' and '.join(missing)} missing; only a .csv table knows its own sizes")
    else:
        _refuse_too_large(options.stages, options.microbatches, options.chunks or DEFAULT_CHUNKS.get(name, 1))
        schedule = make(name, options.stages, options.microbatches, options.chunks)
    console = Console(highlight=False)
    for line in (*terminal(schedule, console.width), *facts(schedule)):
        console.print(line, soft_wrap=True)
    if options.csv:
        write_csv(schedule, options.csv)
    if options.out:
        WRITERS[Path(options.out).suffix](schedule, Path(options.out))


def compare(options: Namespace) -> None:
    """Prints one line for each schedule."""
    _refuse_too_large(options.stages, options.microbatches, max(DEFAULT_CHUNKS.values()))
    head = f"{'schedule':14} {'chunks':>6} {'ticks':>6} {'peak in flight':>15} {'of a stage':>11}"
    print(f"{head} {'bubble':>7} {'lockstep':>9}")
    for name in DEFAULT_CHUNKS:
        schedule = make(name, options.stages, options.microbatches)
        peak, chunks = max(schedule.peak_in_flight()), schedule.chunks
        row = f"{name:14} {chunks:6} {schedule.ticks:6} {peak:15} {peak / chunks:11g}"
        row += f" {schedule.bubble():7.1%} {schedule.lockstep_bubble():9.1%}"
        print(row)
    print("peak in flight: most (chunk, microbatch) pairs held by a stage; of a stage: divided by its chunks")
    print("bubble: idle share predicted with F = B = W = 1 (a B that is not split from its W: 2)")
    print("lockstep: the same if stages wait for each other in every tick")


def _refuse_too_large(stages: int, microbatches: int, chunks: int) -> None:
    cells = stages * chunks * microbatches
    if min(stages, microbatches) > 0 and cells > MOST_CELLS:
        product = f"{stages} stages * {chunks} chunks * {microbatches} microbatches = {cells}"
        raise ValueError(f"{product} is too large to draw; take sizes with a product of at most {MOST_CELLS}")


def _parser() -> Parser:
    parser = Parser("python -m parallel.pipeline", description="Pipeline schedules as tables.")
    commands = parser.add_subparsers(required=True, metavar="show|compare")
    one = commands.add_parser("show", help="draw a schedule; its peak in flight and its bubble")
    one.add_argument("schedule", help=f"{', '.join(DEFAULT_CHUNKS)}, or a path to a .csv table")
    one.add_argument(
        "--chunks", type=int, default=0, metavar="C", help="virtual stages a stage (0: the schedule's own)"
    )
    one.add_argument("--out", metavar="FILE", help="picture to write, .png or .svg")
    one.add_argument("--csv", metavar="FILE", help="table to write, to change and to use as a schedule")
    every = commands.add_parser("compare", help="ticks, peak in flight and bubble of every schedule")
    for command, function in ((one, show), (every, compare)):
        command.add_argument("--stages", type=int, metavar="P", required=command is every)
        command.add_argument("--microbatches", type=int, metavar="M", required=command is every)
        command.set_defaults(command=function)
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
