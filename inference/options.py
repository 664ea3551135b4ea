"""The command line of `python -m inference`. No JAX here: a mistake is told before anything slow is imported."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from checkpoint.config import NEWEST, step
from runtime.arguments import Parser

GROUPS = ("sample", "mesh", "runtime")  # of a run's settings, those that may be set anew for generation
LIKE_A_SETTING = re.compile(r"[a-z_]+(\.[a-z_]+)+=")
SETTING = re.compile(rf"({'|'.join(GROUPS)})\.\w+=")


class _Parser(Parser):
    """Says how to give a prompt that looks like an option."""

    def error(self, message: str) -> NoReturn:
        """Ends the process."""
        if message.startswith("unrecognized") or message.endswith("required: PROMPT"):
            message += '; a prompt that begins with a dash stands behind --, as in MODEL -- "-x"'
        super().error(message)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options: `run`, `prompts`, `overrides` of the run's settings, `step`.

    A word like mesh.fsdp=2 is a setting; what stands after -- is a prompt, whatever it looks like. Help ends the
    process with exit code 0, a mistake with one line on stderr and 2.
    """
    arguments = list(arguments)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    parser = _Parser(
        "python -m inference",
        description="Continues prompts with the model of a run, or with a published one.",
        usage="%(prog)s MODEL PROMPT [PROMPT ...] [--step best|last|N] [key=value ...] [-- PROMPT ...]",
        epilog="key=value sets sample.*, mesh.* or runtime.* anew, as for train.py (see its --help): "
        "sample.tokens=200 sample.temperature=0 sample.seed=1 mesh.tensor=2 runtime.cpu_devices=2. "
        "A prompt that looks like an option or a setting goes after --.",
    )
    parser.add_argument("run", metavar="MODEL", type=model, help="run directory, Hugging Face folder or .gguf file")
    parser.add_argument("words", metavar="PROMPT", nargs="*", help='text to continue; "" starts a document')
    parser.add_argument("--chat", action="store_true", help="prompts are messages to a chat model")
    parser.add_argument("--step", type=step, default=NEWEST, metavar="best|last|N", help="checkpoint (last)")
    options = parser.parse_intermixed_args(arguments[:end])
    options.overrides = [word for word in options.words if SETTING.match(word)]
    prompts = [word for word in options.words if not SETTING.match(word)]
    if strange := next((word for word in prompts if LIKE_A_SETTING.match(word)), None):
        allowed = ", ".join(f"{group}.*" for group in GROUPS)
        parser.error(f"{strange} is no setting of generation ({allowed}); if it is a prompt, it goes after --")
    options.prompts = prompts + arguments[end + 1 :]
    if not options.prompts:
        parser.error("the following arguments are required: PROMPT")
    return options


def model(text: str) -> Path:
    """The value of MODEL: a path where a model may lie, or its name on the hub."""
    path = Path(text)
    if path.is_dir() and not any((path / name).is_file() for name in ("config.yaml", "config.json")):
        raise argparse.ArgumentTypeError(
            f"{text} is no run directory: it has no config.yaml; and no Hugging Face folder: it has no config.json"
        )
    return path
