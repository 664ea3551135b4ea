"""The command line of `python -m export`. No JAX here: a mistake is told before anything slow is imported."""

import argparse
from collections.abc import Sequence

from checkpoint.arguments import check_settings, count, model_parser
from checkpoint.huggingface.families import BY_TYPE

SETTINGS = ("mesh", "runtime")  # groups of a model's settings in which some may be set anew
MAY_BE_SET = tuple(f"{group}.*" for group in SETTINGS)
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
    parser = model_parser(
        "python -m export",
        "Writes a trained model in the format of another program, and checks what it wrote.",
        out="folder or file",
        required="--to TARGET",
        epilog=f"targets:\n{targets}\n\nsettings, as for train.py: {', '.join(MAY_BE_SET)}, as in mesh.tensor=2",
    )
    parser.add_argument("--to", choices=TARGETS, required=True, help="see below")
    parser.add_argument("--type", choices=("f32", "f16", "q8_0"), help="of matrices in gguf (f16)")
    parser.add_argument(
        "--length", type=count, metavar="N", help="tokens of the longest sequence, in onnx and gguf (the model's own)"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of safetensors (as they came)")
    parser.add_argument("--family", choices=sorted(BY_TYPE), help="model_type of safetensors (the first that fits)")
    options = parser.parse_intermixed_args(list(arguments))
    check_settings(parser, options.overrides, MAY_BE_SET, "an export")
    for name, targets in ONLY.items():
        if getattr(options, name) is not None and options.to not in targets:
            parser.error(f"--{name} is an option of --to {' or '.join(targets)}, not of {options.to}")
    if options.to == "onnx" and options.length == 1:
        parser.error("--length 1 has no room for a token behind a prompt: set 2 or more")
    if options.to == "gguf" and options.out.suffix != ".gguf":
        parser.error(f"{options.out} would be a GGUF file: name it {options.out}.gguf")
    return options
