"""How fast batches are made, without a model: python bench/loader.py [--documents N] [--seq-len T] [--batch B].

Writes five sources of random documents (lognormal lengths, as of web text: mean about 500 tokens) to a folder, packs
them, mixes them by weights that change, and reads batches in this process alone. Prints a line for each of
concatenation and packing, of one source and of five: tokens a second, and seconds to the first batch.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np

from data.loader import Loader
from data.mixture import MixtureSource, Plan
from data.streams import Mixture
from data.token_files import Tokens

SOURCES = {
    "web": MixtureSource(weight={0: 5, 1000: 2}),
    "code": MixtureSource(weight=2),
    "books": MixtureSource(weight={0: 1, 1000: 4}),
    "maths": MixtureSource(weight=0.5, epochs=4),
    "talk": MixtureSource(weight=0.1),
}
EOS = 0


def write_source(folder: Path, name: str, documents: int, seed: int) -> tuple[Path, np.ndarray]:
    """The tokens of a source in a file, and where its documents end."""
    draw = np.random.default_rng(seed)
    lengths = draw.lognormal(5.5, 1.2, documents).astype(np.int64) + 2
    ends = np.cumsum(lengths)
    tokens = draw.integers(1, 50_000, ends[-1], dtype=np.uint16)
    tokens[ends - 1] = EOS
    tokens.tofile(folder / name)
    return folder / name, ends


def stream_of(files: dict, packing: str, seq_len: int, batch_size: int) -> Mixture:
    """A mixture of the files, or of the one that there is."""
    shape = {"seq_len": seq_len, "batch_size": batch_size}
    loaders = {}
    for name, (path, ends) in files.items():
        tokens = Tokens.of([np.asarray(np.memmap(path, np.uint16, mode="r"))], [ends])
        loaders[name] = Loader(tokens, seed=0, eos_id=EOS, packing=packing, **shape)
    rows = {name: loader.sequences_per_epoch for name, loader in loaders.items()}
    sizes = {name: len(loader.tokens) for name, loader in loaders.items()}
    return Mixture(loaders, Plan({name: SOURCES[name] for name in files}, rows, sizes, temperature=1.0, **shape))


def measure(stream: Mixture, tokens_a_step: int, seconds: float) -> float:
    """Tokens a second, reading steps one after another for so long; the best of three stretches."""
    rates, step = [], 0
    for _ in range(3):
        began, first = time.perf_counter(), step
        while time.perf_counter() - began < seconds / 3:
            stream.batch(step)
            step += 1
        rates.append((step - first) * tokens_a_step / (time.perf_counter() - began))
    return max(rates)


def main() -> None:
    """Writes, reads, prints."""
    options = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    options.add_argument("--documents", type=int, default=400_000, help="of each source (default: 400000)")
    options.add_argument("--seq-len", type=int, default=2048)
    options.add_argument("--batch", type=int, default=32)
    options.add_argument("--seconds", type=float, default=6, help="of reading, for each line (default: 6)")
    asked = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = {name: write_source(Path(folder), name, asked.documents, seed) for seed, name in enumerate(SOURCES)}
        total = sum(int(ends[-1]) for _, ends in files.values())
        print(f"{total / 1e9:.2f}B tokens in {len(files) * asked.documents:,} documents, rows of {asked.seq_len:,}")
        for packing in ("concatenate", "best_fit"):
            for count in (1, len(files)):
                some = dict([*files.items()][:count])
                began = time.perf_counter()
                stream = stream_of(some, packing, asked.seq_len, asked.batch)
                stream.batch(0)
                ready = time.perf_counter() - began
                rate = measure(stream, asked.seq_len * asked.batch, asked.seconds)
                fill = [loader.rows.fill for loader in stream.loaders.values()]
                print(
                    f"{packing:12} {count} source(s): {rate / 1e6:6.1f}M tokens/s, first batch after {ready:.2f} s, "
                    f"fill {min(fill):.2%}"
                )


if __name__ == "__main__":
    main()
