"""The command line of `python -m inference`. No JAX here: a mistake is told before anything slow is imported."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from parallel.mesh import AXES, MeshConfig
from runtime.arguments import Parser
from runtime.config import PLATFORMS

NEWEST, BEST = "last", "best"  # choices of --step besides a number


class _Parser(Parser):
    """Says how to give a prompt that looks like an option."""

    def error(self, message: str) -> NoReturn:
        """Ends the process."""
        if message.startswith("unrecognized") or message.endswith("required: PROMPT"):
            message += '; a prompt that begins with a dash stands behind --, as in RUN_DIR -- "-x"'
        super().error(message)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options; `sample` is a dict of those that were given of SampleConfig, the run's own hold for the rest.

    Help ends the process with exit code 0, a mistake with one line on stderr and 2.
    """
    parser = _Parser("python -m inference", description="Continues prompts with the model of a run.")
    parser.add_argument("run", metavar="RUN_DIR", type=_run, help="directory of a run of train.py")
    parser.add_argument("prompts", metavar="PROMPT", nargs="+", help='text to continue; "" starts a document')
    sampling = parser.add_argument_group("sampling (defaults: the run's)")
    sampling.add_argument("--tokens", type=int, metavar="N", help="new tokens for each prompt")
    sampling.add_argument("--temperature", type=float, metavar="X", help="0: always the likeliest token")
    sampling.add_argument("--top-k", type=int, metavar="K", help="only the K likeliest tokens; 0 off")
    sampling.add_argument("--top-p", type=float, metavar="P", help="only the likeliest that make up P; 1 off")
    sampling.add_argument("--seed", type=int, metavar="S", help="the same seed gives the same text")
    parser.add_argument("--step", type=_step, default=NEWEST, metavar="best|last|N", help="checkpoint (last)")
    parser.add_argument("--mesh", type=_mesh, default="", metavar="AXIS=N,...", help="fsdp=2,tensor=2 (fsdp=-1: all)")
    parser.add_argument("--platform", choices=PLATFORMS, default="auto", help="auto takes an accelerator if it can")
    parser.add_argument("--devices", type=_devices, default=1, metavar="N", help="simulated devices of the CPU (1)")
    options = parser.parse_args(arguments)
    options.sample = {
        name: value
        for name in ("tokens", "temperature", "top_k", "top_p", "seed")
        if (value := getattr(options, name)) is not None
    }
    return options


def _run(text: str) -> Path:
    if not (Path(text) / "config.yaml").is_file():
        raise argparse.ArgumentTypeError(f"{text} is no run directory: it has no config.yaml")
    return Path(text)


def _step(text: str) -> str | int:
    if text in (NEWEST, BEST):
        return text
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is neither best nor last nor the number of a step")
    return int(text)


def _devices(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of devices, 1 or more")
    return int(text)


def _mesh(text: str) -> MeshConfig:
    """`fsdp=2,tensor=2`: axes that are not named have size 1; nothing named: fsdp takes all devices."""
    sizes = {}
    for part in filter(None, text.split(",")):
        axis, _, size = part.partition("=")
        if axis not in AXES or axis in sizes or not size.removeprefix("-").isdecimal():
            raise argparse.ArgumentTypeError(f"{part} is not AXIS=N with an axis named once of {', '.join(AXES)}")
        sizes[axis] = int(size)
    try:
        return MeshConfig(**{"fsdp": 1, **sizes}) if sizes else MeshConfig()
    except ValueError as error:  # argparse would replace its text
        raise argparse.ArgumentTypeError(str(error)) from None
