"""The command line of `python -m export`. No JAX here: a mistake is told before anything slow is imported."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from checkpoint.config import NEWEST, step
from checkpoint.huggingface.families import BY_TYPE
from runtime.arguments import Parser

SETTINGS = ("mesh", "runtime")  # groups of a model's settings in which some may be set anew
ALLOWED = re.compile(rf"({'|'.join(SETTINGS)})\.\w+=")
TARGETS = {
    "jax": "a folder: the forward pass as a program of any batch and length, for CPU, CUDA and TPU",
    "onnx": "a folder: a decoder with a cache of keys and values, for ONNX Runtime and edge/run.py",
    "gguf": "a file NAME.gguf for llama.cpp",
    "safetensors": "a folder that transformers opens",
}
ONLY = {  # options of some targets
    "type": ("gguf",),
    "length": ("onnx", "gguf"),
    "dtype": ("safetensors",),
    "family": ("safetensors",),
}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options; help ends the process with 0, a mistake with one line on stderr and 2."""
    targets = "\n".join(f"  {name:12} {words}" for name, words in TARGETS.items())
    parser = Parser(
        "python -m export",
        description="Writes a trained model in the format of another program, and checks what it wrote.",
        usage="%(prog)s MODEL OUT --to TARGET [options] [key=value ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"targets:\n{targets}\n\nsettings, as for train.py: mesh.*, runtime.*, as in mesh.tensor=2",
    )
    parser.add_argument("model", metavar="MODEL", type=_model, help="run directory, Hugging Face folder or .gguf file")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder or file to make")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="settings")
    parser.add_argument("--to", choices=TARGETS, required=True, help="see below")
    parser.add_argument("--type", choices=("f32", "f16", "q8_0"), help="of matrices in gguf (f16)")
    parser.add_argument(
        "--length", type=_count, metavar="N", help="tokens of the longest sequence, in onnx and gguf (the model's own)"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of safetensors (as they came)")
    parser.add_argument("--family", choices=sorted(BY_TYPE), help="model_type of safetensors (the first that fits)")
    parser.add_argument("--step", type=step, default=NEWEST, metavar="best|last|N", help="checkpoint of a run (last)")
    options = parser.parse_intermixed_args(list(arguments))
    if strange := next((word for word in options.overrides if not ALLOWED.match(word)), None):
        parser.error(f"{strange} is no setting of an export (mesh.*, runtime.*)")
    for name, targets in ONLY.items():
        if getattr(options, name) is not None and options.to not in targets:
            parser.error(f"--{name} is an option of --to {' or '.join(targets)}, not of {options.to}")
    if options.to == "gguf" and options.out.suffix != ".gguf":
        parser.error(f"{options.out} would be a GGUF file: name it {options.out}.gguf")
    if options.out.exists():
        parser.error(f"{options.out} is there already: choose another name")
    return options


def _model(text: str) -> Path:
    path = Path(text)
    if path.is_dir() and not any((path / name).is_file() for name in ("config.yaml", "config.json")):
        raise argparse.ArgumentTypeError(f"{text} is no run and no Hugging Face folder: no config.yaml, no config.json")
    return path


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number of tokens")
    return int(text)
