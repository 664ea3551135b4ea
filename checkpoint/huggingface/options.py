"""The command line of `python -m checkpoint.huggingface`. No JAX here: a mistake is told before slow imports."""

import argparse
from pathlib import Path

from checkpoint.config import NEWEST, step
from checkpoint.huggingface.families import BY_TYPE
from runtime.arguments import Parser

SETTINGS = "key=value sets mesh.*, runtime.* and the like as for train.py: mesh.tensor=2 runtime.cpu_devices=2."


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options; help ends the process with 0, a mistake with one line on stderr and 2."""
    parser = Parser("python -m checkpoint.huggingface", description="Published weights in and out.", epilog=SETTINGS)
    commands = parser.add_subparsers(dest="command", required=True, metavar="import|export")
    one = commands.add_parser("import", help="a published model as a run directory", epilog=SETTINGS)
    one.add_argument("path", metavar="PATH", help="Hugging Face folder, .gguf file, or a name on the hub")
    one.add_argument("run", metavar="RUN_DIR", type=Path, help="directory to make")
    one.add_argument("--allow-pickle", action="store_true", help="read PyTorch's own files where there are no others")
    two = commands.add_parser("export", help="a model as a folder that transformers opens", epilog=SETTINGS)
    two.add_argument("path", metavar="MODEL", type=Path, help="run directory, Hugging Face folder or .gguf file")
    two.add_argument("folder", metavar="FOLDER", type=Path, help="folder to make")
    two.add_argument("--step", type=step, default=NEWEST, metavar="best|last|N", help="checkpoint of the run (last)")
    two.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the tensors (as they came)")
    two.add_argument("--family", choices=sorted(BY_TYPE), help="model_type to write (the first that can say the model)")
    for command in (one, two):
        command.add_argument("overrides", metavar="key=value", nargs="*", help="settings")
    return parser.parse_args(arguments)
