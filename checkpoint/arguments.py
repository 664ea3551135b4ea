"""What programs that make something of a trained model have in common on their command line: MODEL OUT [key=value ...].

No JAX here: a mistake is told before anything slow is imported.
"""

import argparse
import re
from pathlib import Path

from checkpoint.config import NEWEST, step
from runtime.arguments import Parser


def model_parser(program: str, description: str, *, out: str, required: str, epilog: str) -> Parser:
    """A parser with MODEL, OUT (`out` says what is made), settings and --step.

    program: `python -m NAME`. required: the option without which nothing is made, as usage has it. epilog: below.
    """
    parser = Parser(
        program,
        description=description,
        usage=f"%(prog)s MODEL OUT {required} [options] [key=value ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=epilog,
    )
    parser.add_argument("model", metavar="MODEL", type=model, help="run directory, Hugging Face folder or .gguf file")
    parser.add_argument("out", metavar="OUT", type=free, help=f"{out} to make")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="settings")
    parser.add_argument("--step", type=step, default=NEWEST, metavar="best|last|N", help="checkpoint of a run (last)")
    return parser


def check_settings(parser: Parser, overrides: list[str], allowed: tuple[str, ...], of: str) -> None:
    """Ends the process for a setting that is none of `of`; `allowed` are names, or groups as in mesh.*"""
    names = [re.escape(name).replace(r"\*", r"\w+") for name in allowed]
    known = re.compile(rf"({'|'.join(names)})=")
    if strange := next((word for word in overrides if not known.match(word)), None):
        parser.error(f"{strange} is no setting of {of} ({', '.join(allowed)})")


def model(text: str) -> Path:
    """The value of MODEL: a path, and of a folder one that holds a model."""
    path = Path(text)
    if path.is_dir() and not any((path / name).is_file() for name in ("config.yaml", "config.json")):
        raise argparse.ArgumentTypeError(f"{text} is no run and no Hugging Face folder: no config.yaml, no config.json")
    return path


def free(text: str) -> Path:
    """The value of OUT: a path where nothing is."""
    if Path(text).exists():
        raise argparse.ArgumentTypeError(f"{text} is there already: choose another name")
    return Path(text)


def whole(text: str) -> int:
    """A number, perhaps 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is no whole number")
    return int(text)


def count(text: str) -> int:
    """A number from 1."""
    if (number := whole(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number
