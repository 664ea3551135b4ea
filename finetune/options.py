"""The command line of `python -m finetune`. No JAX here: a mistake is told before anything slow is imported."""

import argparse
import re
from pathlib import Path

from checkpoint.config import NEWEST, step
from runtime.arguments import Parser

GROUPS = ("mesh", "runtime")
SETTING = re.compile(rf"({'|'.join(GROUPS)})\.\w+=")
ANY_SETTING = re.compile(r"[+~]*[a-z_]+(\.\w+)*=")
TEACH = "key=value are those of the run, as for train.py: task=distillation task.options.teacher=PATH train.steps=100."
EPILOG = "key=value sets mesh.* or runtime.* as for train.py: mesh.tensor=2 runtime.cpu_devices=2."


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options; help ends the process with 0, a mistake with one line on stderr and 2."""
    parser = Parser(
        "python -m finetune",
        description="Adapters of a run: merged, out, and in; what a teacher says, kept.",
        epilog=EPILOG,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="merge|export|import|teach")
    one = commands.add_parser("merge", help="a run with adapters as a whole model without", epilog=EPILOG)
    two = commands.add_parser("export", help="the adapters of a run as files of the package peft", epilog=EPILOG)
    three = commands.add_parser("import", help="an adapter in peft's files as a run's directory", epilog=EPILOG)
    four = commands.add_parser("teach", help="what a teacher says of a run's batches, kept in a folder", epilog=TEACH)
    for command in (one, two):
        command.add_argument("run", metavar="RUN", type=_run, help="directory of a run with adapters")
    three.add_argument("adapter", metavar="FOLDER", type=Path, help="folder with adapter_config.json")
    for command in (one, two, three, four):
        command.add_argument("out", metavar="OUT", type=_free, help="directory to make")
    three.add_argument(
        "--base", required=True, metavar="MODEL", help="what it stands on: run directory, Hugging Face folder"
    )
    for command in (one, two):
        command.add_argument("--step", type=step, default=NEWEST, metavar="best|last|N", help="checkpoint (last)")
    setting = ANY_SETTING if arguments[:1] == ["teach"] else SETTING
    options = parser.parse_args([word for word in arguments if not setting.match(word)])
    options.overrides = [word for word in arguments if setting.match(word)]
    return options


def _run(text: str) -> Path:
    if not (Path(text) / "config.yaml").is_file():
        raise argparse.ArgumentTypeError(f"{text} is no run directory: it has no config.yaml")
    return Path(text)


def _free(text: str) -> Path:
    if Path(text).exists():
        raise argparse.ArgumentTypeError(f"{text} is there already: choose another directory")
    return Path(text)
