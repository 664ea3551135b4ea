"""A trained model in the format of another program: python -m export MODEL OUT --to TARGET [key=value]; --help.

What was checked of it goes to stdout, everything else to stderr. Exit codes: 0 done; 2 the user's mistake.
"""

import sys

from export.options import SETTINGS, parse
from runtime import leave
from runtime.exit_codes import DONE, MISTAKE

if __name__ == "__main__":
    leave.answer_signals()
    OPTIONS = parse(sys.argv[1:])  # before the slow imports: a typo is told in a fraction of a second

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from export import program
from export.huggingface import ends, export_weights
from export.limits import architecture_of, check_onnx
from export.weights import as_arrays, plain_params, reference
from inference.opening import Found, Opened, chat_of, find_model
from runtime.files import file_made, folder_made

TOLERANCE = {"float32": 1e-4}  # of the largest logit, by what matmuls are computed in
ROUGH = 2e-2  # of 16 bits
PROMPT, NEW = "The first of them is", 32  # what the check begins with, and how many tokens it adds


@dataclass(frozen=True)
class Check:
    """How an export compares with the model that it was made of."""

    error: float  # the largest difference of two logits
    largest: float  # logit
    same: int = 0  # of the tokens chosen greedily, those that the model itself chooses
    tokens: int = 0

    def within(self, tolerance: float) -> "Check":
        """Raises ValueError where it is another model."""
        if not self.error <= tolerance * self.largest:
            raise ValueError(f"not written: outputs differ by {self.error:.2g}, of {self.largest:.3g} at most")
        return self

    def __str__(self) -> str:
        greedy = f"greedy    {self.same} of {self.tokens} tokens the same\n" if self.tokens else ""
        return f"outputs   differ by {self.error:.2g} at most, the largest is {self.largest:.3g}\n{greedy}"


def main(options: argparse.Namespace) -> int:
    """Exports; returns the exit code."""
    try:
        run(options)
    except leave.MISTAKES as error:
        return leave.ended(MISTAKE, leave.one_line(error))
    except ImportError as error:
        if error.name not in ("onnx", "onnxruntime", "gguf"):
            raise
        missing = f"error: --to {options.to} needs the package {error.name}: make setup EXTRAS=export"
        return leave.ended(MISTAKE, missing)
    return DONE


def run(options: argparse.Namespace) -> None:
    """Writes what was asked for. Raises ValueError or OSError for what the user can mend."""
    began = time.perf_counter()
    if options.to == "safetensors":
        export_weights(argparse.Namespace(**vars(options), path=options.model, folder=options.out))
        return
    found = find_model(options.model, options.overrides, SETTINGS)
    write = {"jax": to_jax, "onnx": to_onnx, "gguf": to_gguf}[options.to](found, options)
    model = found.open(options.step)
    check = write(model, plain_params(found, model))
    print(check or "", end="")
    files = [options.out] if options.out.is_file() else list(options.out.iterdir())
    size = sum(file.stat().st_size for file in files) / 1e6
    print(f"size      {size:,.1f} MB")
    print(f"{options.out}: {options.to} in {time.perf_counter() - began:.0f} s", file=sys.stderr)


Write = Callable[[Opened, dict], Check | None]  # from the model on its mesh, and its plain parameters


def to_jax(found: Found, options: argparse.Namespace) -> Write:
    """How a program of JAX is written."""

    def write(model: Opened, params: dict) -> Check:
        config = model.config.model
        with folder_made(options.out) as folder:
            program.save(folder, config, params, model.dtype, model.tokenizer.as_json(), about(found, model))
            loaded = program.load(folder)
            draw = np.random.default_rng(0)
            tokens_BT = draw.integers(0, config.vocab_size, (2, min(found.reach, 24)))
            theirs, ours = reference(model, params, model.dtype)(tokens_BT), loaded(tokens_BT)
            check = Check(float(np.abs(ours - theirs).max()), float(np.abs(theirs).max()))
            return check.within(TOLERANCE.get(str(jnp.dtype(model.dtype)), ROUGH))

    return write


def to_onnx(found: Found, options: argparse.Namespace) -> Write:
    """How a graph of ONNX is written. Raises ValueError for what it cannot hold."""
    check_onnx(found.config.model)
    from export import onnx_folder  # its packages are an extra

    length = length_of(found, options)

    def write(model: Opened, params: dict) -> Check:
        config, told = model.config.model, about(found, model)
        with folder_made(options.out) as folder:
            arrays = as_arrays(config, params)
            onnx_folder.save(folder, config, arrays, length, model.tokenizer.as_json(), told)
            prompt = [*found.begin, *model.tokenizer.encode(PROMPT).tolist()] or [model.tokenizer.eos_id]
            prompt = prompt[: max(1, length // 2)]
            session = onnx_folder.Session(folder, config)
            new, chosen_by = session.greedy(prompt, min(NEW, length - len(prompt)))
            whole, _ = session.read(prompt + new)
            theirs = reference(model, params)(np.array([prompt + new]))[0]
            behind = theirs[len(prompt) - 1 : -1]
            error = max(np.abs(whole - theirs).max(), np.abs(chosen_by - behind).max())
            same = int((behind.argmax(-1) == np.array(new)).sum())
            return Check(float(error), float(np.abs(theirs).max()), same, len(new)).within(TOLERANCE["float32"])

    return write


def to_gguf(found: Found, options: argparse.Namespace) -> Write:
    """How a GGUF file is written. Raises ValueError for what llama.cpp cannot hold."""
    config = found.config.model
    architecture, length = architecture_of(config).name, length_of(found, options)
    from export import gguf_file  # its package is an extra
    from export.gguf_vocabulary import vocabulary_of

    vocabulary = vocabulary_of(found.tokenizer, config.vocab_size)

    def write(model: Opened, params: dict) -> None:
        named = {"kind": options.type or "f16", "length": length, "name": model.path.resolve().name}
        with file_made(options.out) as file:
            gguf_file.save(file, architecture, config, params, vocabulary, **named, chat=chat_source(model.path))

    return write


def length_of(found: Found, options: argparse.Namespace) -> int:
    """Tokens of the longest sequence. Raises ValueError where learned positions do not reach so far."""
    config, length = found.config.model, options.length or found.reach
    if config.positions == "learned" and length > config.max_positions:
        raise ValueError(f"--length {length} is more than the model's {config.max_positions} learned positions")
    return length


def about(found: Found, model: Opened) -> dict:
    """What every manifest says of the model."""
    last = ends(model)
    source = {"path": str(model.path), "step": model.step, "digest": model.digest}
    return {"begin": list(found.begin), "ends": last if isinstance(last, list) else [last], "source": source}


def chat_source(path: Path) -> str | None:
    """The chat template of the model at a path, if it has one."""
    try:
        return chat_of(path).source
    except ValueError:
        return None


if __name__ == "__main__":
    sys.exit(main(OPTIONS))
