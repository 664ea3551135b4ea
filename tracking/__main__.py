"""A picture of runs, without an account: python -m tracking RUN [RUN ...] [--out FILE], python -m tracking live RUN.

The first writes one self-contained HTML page, by default RUN/page.html; `live` serves it on this machine while runs go
on. Exit codes: 0 done; 2 the user's mistake, told in one line.
"""

import argparse
import sys
from pathlib import Path

from runtime.arguments import Parser
from runtime.exit_codes import DONE, INTERRUPTED, MISTAKE
from tracking.live import PORT, serve
from tracking.page import page, write_page
from tracking.run import open_runs


def options(arguments: list[str]) -> argparse.Namespace:
    """What was asked for: `command` is `write` or `live`. Ends the process where that is a mistake."""
    if arguments[:1] == ["live"]:
        parser = Parser(prog="python -m tracking live", description="Serves the page of runs while they go on.")
        parser.add_argument("--port", type=port, default=PORT, help="of 127.0.0.1 (default: %(default)s; 0 for any)")
        parser.set_defaults(command=live)
    else:
        parser = Parser(prog="python -m tracking", description="Writes one HTML page with the curves of runs.")
        parser.epilog = "python -m tracking live RUN serves the page while the run goes on"
        default = "RUN/page.html; of several runs, page.html in this directory"
        parser.add_argument("--out", type=Path, metavar="FILE", help=f"where the page goes (default: {default})")
        parser.set_defaults(command=write)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="directory of a run")
    return parser.parse_intermixed_args(arguments[1:] if arguments[:1] == ["live"] else arguments)


def write(given: argparse.Namespace) -> None:
    """python -m tracking RUN [RUN ...]: writes the page and prints its path.

    Raises ValueError where no run has anything to draw.
    """
    runs = open_runs(given.runs)
    drawn = [run for run in runs if run.series]
    notes = [note for run in runs for note in run.notes()]
    if not drawn:
        raise ValueError(f"nothing to draw: {'; '.join(notes)}")
    tell(notes)
    file = given.out or (drawn[0].path if len(given.runs) == 1 else Path()) / "page.html"
    write_page(file, page(drawn))
    print(file)


def live(given: argparse.Namespace) -> None:
    """python -m tracking live RUN [RUN ...]"""
    runs = open_runs(given.runs)
    tell([note for run in runs for note in run.notes()])
    serve(runs, given.port)


def port(text: str) -> int:
    """A port as it was typed, 0 to 65535; raises argparse.ArgumentTypeError for anything else."""
    if not text.isascii() or not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text} is no port; choose 0 to 65535")
    return int(text)


def tell(notes: list[str]) -> None:
    """Prints each on standard error, so that standard output holds nothing but what was asked for."""
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def main(arguments: list[str]) -> int:
    """Runs one command; returns the exit code."""
    given = options(arguments)
    try:
        given.command(given)
    except KeyboardInterrupt:
        return INTERRUPTED
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    return DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
