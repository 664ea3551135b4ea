"""Text from an exported model on a small machine: python edge/run.py FOLDER "prompt"; --help says more.

FOLDER is what `python -m export MODEL FOLDER --to onnx` wrote. This one file needs onnxruntime, numpy and tokenizers,
and nothing of the project: copy it beside the folder. The text goes to stdout as it is made; speed and memory go to
stderr. Exit codes: 0 done; 2 the user's mistake; 130 interrupted.
"""

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

CHUNK = 64  # tokens of a prompt that are read at once: of more, the logits would be most of the memory


def opened(file: Path, how: Callable[[str], Any]) -> Any:
    """What a library makes of a file. Raises FileNotFoundError, and ValueError where it cannot read the file."""
    file.stat()
    try:
        return how(str(file))
    except Exception as error:  # the libraries' errors have no class of their own
        raise ValueError(f"{file} is damaged: {error}") from None


class Decoder:
    """The model of a folder, with the keys and values of the tokens that it has read."""

    def __init__(self, folder: Path, threads: int):
        self.about = opened(folder / "manifest.json", lambda file: json.loads(Path(file).read_text())["body"])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.enable_cpu_mem_arena = False  # it keeps what a long prompt once needed
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
        session = lambda file: onnxruntime.InferenceSession(file, options, ["CPUExecutionProvider"])
        self._session = opened(folder / "model.onnx", session)
        self._past = [given.name for given in self._session.get_inputs()[1:]]
        empty = np.zeros((1, self.about["kv_heads"], 0, self.about["head_dim"]), np.float32)
        self._cache = [empty] * len(self._past)

    def read(self, tokens: list[int]) -> np.ndarray:
        """Logits (V,) of the token after these."""
        for at in range(0, len(tokens), CHUNK):
            part = np.array([tokens[at : at + CHUNK]], np.int64)
            given = {"input_ids": part, **dict(zip(self._past, self._cache, strict=True))}
            logits, *self._cache = self._session.run(None, given)
        return logits[0, -1]


def drawn(logits: np.ndarray, temperature: float, draw: np.random.Generator) -> int:
    """The next token: the likeliest at temperature 0."""
    if not temperature:
        return int(logits.argmax())
    scores = logits.astype(np.float64) / temperature
    weights = np.exp(scores - scores.max())
    return int(draw.choice(len(weights), p=weights / weights.sum()))


def pieces(tokenizer: Tokenizer, tokens: Iterator[int]) -> Iterator[str]:
    """The text of tokens, a piece at a time; what is not UTF-8 yet waits for the next token."""
    ids, said = [], ""
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):
            yield text[len(said) :]
            said = text
    yield tokenizer.decode(ids)[len(said) :]


def peak_megabytes() -> float:
    """The most memory that this process has had, resident."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage has that of the process before as well, which started this one
        return next(int(line.split()[1]) / 1e3 for line in status.read_text().splitlines() if "VmHWM" in line)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # bytes on macOS


def run(options: argparse.Namespace) -> None:
    """Prints the prompt's continuation. Raises ValueError or OSError for what the user can mend."""
    began = time.perf_counter()
    tokenizer = opened(options.folder / "tokenizer.json", Tokenizer.from_file)
    tokenizer.encode_special_tokens = True  # a text that spells one stays text
    decoder = Decoder(options.folder, options.threads)
    about = decoder.about
    prompt = about["begin"] + tokenizer.encode(options.prompt, add_special_tokens=False).ids or about["ends"][:1]
    room = about["length"] - len(prompt)
    if room < 1:
        raise ValueError(f"a prompt of {len(prompt)} tokens leaves no room in the {about['length']} of the model")
    loaded = time.perf_counter()
    logits, read = decoder.read(prompt), time.perf_counter()
    draw, new = np.random.default_rng(options.seed), []

    def generated() -> Iterator[int]:
        nonlocal logits
        while len(new) < min(options.tokens, room):
            token = drawn(logits, options.temperature, draw)
            if token in about["ends"]:
                return
            new.append(token)
            yield token
            logits = decoder.read([token])

    print(options.prompt, end="", flush=True)
    for piece in pieces(tokenizer, generated()):
        print(piece, end="", flush=True)
    print()
    seconds = time.perf_counter() - read
    told = f"{len(prompt)} tokens read at {len(prompt) / (read - loaded):,.0f} tokens/s, "
    told += f"{len(new)} written at {len(new) / seconds:,.0f} tokens/s, opened in {loaded - began:.1f} s"
    print(f"{told}; peak memory {peak_megabytes():,.0f} MB resident", file=sys.stderr)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser("python edge/run.py", description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="made by python -m export MODEL FOLDER --to onnx")
    parser.add_argument("prompt", metavar="PROMPT", help="text to continue")
    parser.add_argument("--tokens", type=int, default=128, metavar="N", help="new ones at most (128)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0: the likeliest token (0)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws (0)")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="0: as many as there are cores (0)")
    options = parser.parse_args(arguments)
    if options.tokens < 0 or options.temperature < 0 or options.threads < 0 or options.seed < 0:
        parser.error("--tokens, --temperature, --seed and --threads are 0 or more")
    return options


if __name__ == "__main__":
    try:
        run(parse(sys.argv[1:]))
    except FileNotFoundError as error:
        print(f"error: {error.filename} is not there: FOLDER is no export to onnx", file=sys.stderr)
        sys.exit(2)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
