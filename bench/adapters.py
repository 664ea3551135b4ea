"""What a decode step costs with adapters beside the model: python bench/adapters.py [--layers 6] [--rank 16]

Eight rows of a random model of SmolLM2-135M's shape, cut to some layers, with as many adapters; the cases are run in
turns. Times are of this process on all cores together (CPU seconds), which other work on the machine changes little,
and ratios are medians over the turns, each to the model alone of the same turn.
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import jax.numpy as jnp
import numpy as np

from config.schema import Config, finish
from data.tokenizer import ByteTokenizer
from finetune.adapters.switched import Places
from inference.opening import Opened
from inference.scheduler import Row, Sequence
from inference.step import Programs, Shape
from model.config import ModelConfig
from model.transformer import describe
from parallel.mesh import AXES, make_mesh

ROWS, TOKENS, STEPS, TURNS = 8, 64, 10, 7


def model_of(layers: int, dtype: str) -> Opened:
    """A random model of SmolLM2-135M's shape, but for its vocabulary."""
    shape = {"layers": layers, "width": 576, "heads": 9, "kv_heads": 3, "head_dim": 64, "ffn": 1536}
    config = finish(Config(model=ModelConfig(**shape, vocab_size=8192), train=replace(Config().train, seq_len=256)))
    mesh = make_mesh(dict.fromkeys(AXES, 1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        description = describe(config.model)
        params = jax.jit(lambda: description.init(jax.random.key(0)))()
    return Opened(Path("bench"), config, ByteTokenizer(), mesh, description, params, jnp.dtype(dtype), None, "bench")


def programs_of(opened: Opened, places: Places | None, reads: int) -> Programs:
    """The programs of one case: a step that decodes, and one that reads so many tokens."""
    programs = Programs(opened, ROWS, 256, 16, 256, reads, places=places)
    programs.shapes = lambda: [Shape(ROWS, 1), Shape(1, reads)]
    programs.compile()
    for place in range(1, places.count + 1) if places else ():
        random, values = np.random.default_rng(place), {}
        for path, weight in places.matrices(opened.config.model).items():
            into, out = weight.shape[: len(weight.contracted)], weight.shape[len(weight.contracted) :]
            draw = lambda *shape, random=random: 0.01 * random.normal(size=(opened.config.model.layers, *shape))
            values["/".join(path)] = {"a": draw(*into, places.rank), "b": draw(places.rank, *out)}
        programs.fill(place, values)
    return programs


def rows_of(case: str, blocks: int = 16) -> list[Row]:
    """The rows of a decode step in the midst of texts."""
    rows = []
    for index in range(ROWS):
        sequence = Sequence([1] * TOKENS, 256, place=index + 1 if case == "eight" else 0)
        sequence.slot, sequence.blocks = index, list(range(index * blocks, (index + 1) * blocks))
        rows.append(Row(sequence, TOKENS - 1, 1, True, 0))
    return rows


def seconds(programs: Programs, rows: list[Row]) -> float:
    """CPU seconds of a step."""
    began = time.process_time()
    for _ in range(STEPS):
        jax.block_until_ready(programs.run(rows, {}))
    return (time.process_time() - began) / STEPS


def main() -> None:
    """Prints one JSON object a case."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--reads", type=int, default=128, help="tokens of the part of a prompt that is read")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    opened = model_of(options.layers, options.dtype)
    names = ("attention/query", "attention/key", "attention/value", "attention/out", "ffn/gate", "ffn/up", "ffn/down")
    paths = tuple(("layers", *name.split("/")) for name in names)
    alone = programs_of(opened, None, options.reads)
    beside = programs_of(opened, Places(ROWS, options.rank, paths), options.reads)
    reading = Sequence([1] * options.reads + [1], 256, place=3)
    reading.slot, reading.blocks = 0, list(range(16))
    read = [Row(reading, 0, options.reads, True, 0)]
    cases = {
        "decode, the model alone": (alone, rows_of("none")),
        "decode, adapters beside, no row has one": (beside, rows_of("none")),
        "decode, eight rows with eight adapters": (beside, rows_of("eight")),
        "read, the model alone": (alone, read),
        "read, with an adapter": (beside, read),
    }
    for programs, rows in cases.values():
        seconds(programs, rows)
    took = {case: [] for case in cases}
    for turn in range(TURNS):
        for case, (programs, rows) in cases.items():
            took[case].append(seconds(programs, rows))
        print(f"turn {turn + 1} of {TURNS}", file=sys.stderr)
    for case, found in took.items():
        base = took["decode, the model alone" if case.startswith("decode") else "read, the model alone"]
        ratios = [a / b for a, b in zip(found, base, strict=True)]
        told = {"ms": round(1e3 * statistics.median(found), 2), "ratio": round(statistics.median(ratios), 3)}
        told |= {"least": round(min(ratios), 3), "most": round(max(ratios), 3)}
        print(json.dumps({"case": case, **told, **vars(options)}))


if __name__ == "__main__":
    main()
