"""A split sequence changes nothing: models of every kind on meshes with a context axis equal one device."""

from unittest import mock

import numpy as np
import pytest
from every import few_of
from meshes import MODELS, assert_changes_nothing

from config import compose
from data.packing import rows_of
from data.token_files import Tokens
from training import parity

# sizes that the meshes below divide, where those of tests/meshes.py do not
DIVISIBLE = ("train.seq_len=16", "model.heads=8", "model.kv_heads=4")
CASES = [
    ("llama", "ring", {"context": 4, "tensor": 2}),  # two key-value heads
    ("llama", "ulysses", {"context": 4, "data": 2}),  # fewer key-value heads than context shards
    ("gpt2", "ring", {"context": 2}),  # dropout and learned positions, in the order of the ring
    ("gpt2", "ring", {"context": 2, "tensor": 2, "fsdp": 2}),
    ("gpt2", "gather", {"context": 4}),
    ("gemma", "ring", {"context": 4}),  # packed documents, sliding windows, microbatches
    ("gemma", "ring", {"context": 2, "data": 2, "fsdp": 2}),
    ("gemma", "ulysses", {"context": 2, "tensor": 2}),
    ("gemma", "ring", {"pipe": 2, "context": 2}),
]


def spelled(value) -> str:
    return value if isinstance(value, str) else " ".join(f"{axis}={size}" for axis, size in value.items())


FEW = [
    ("llama", "ulysses", {"context": 4, "data": 2}),
    ("gpt2", "ring", {"context": 2, "tensor": 2, "fsdp": 2}),
    ("gpt2", "gather", {"context": 4}),
    ("gemma", "ring", {"context": 4}),
]


@pytest.mark.parametrize(("model", "style", "mesh"), few_of(CASES, FEW), ids=spelled)
def test_a_split_sequence_changes_nothing(model, style, mesh):
    extra = DIVISIBLE if model == "gemma" else ()
    assert_changes_nothing(model, mesh, f"context.style={style}", extra=extra)


def packed_batch(config, step: int, rows: slice) -> dict[str, np.ndarray]:
    """Documents of random lengths as data.packing=best_fit packs them, some of the rows not full."""
    draw, seq_len, batch_size = np.random.default_rng(step), config.train.seq_len, config.train.batch_size
    lengths = draw.choice([1, 2, 3, 5, 9, seq_len + 1, 2 * seq_len], 6 * batch_size)
    tokens = draw.integers(1, config.model.vocab_size, lengths.sum())
    packed = rows_of(Tokens.of([tokens], [np.cumsum(lengths)]), seq_len, 0, "best_fit")
    return packed.read(np.arange(len(packed) - batch_size, len(packed))[rows])  # the last have short documents


@pytest.mark.parametrize("style", ["ring", "ulysses"])
def test_packed_documents_stay_apart_on_a_split_sequence(style):
    settings = [*MODELS["llama"], "data.segments=true", "data.packing=best_fit", f"context.style={style}"]
    cfg = compose.load(settings)
    batch = packed_batch(cfg, 0, slice(None))
    assert batch["segments_BT"].max() > 2
    assert (batch["segments_BT"] == 0).any()
    with mock.patch.object(parity, "random_batch", packed_batch):
        one = parity.trace(cfg, parity.ONE_DEVICE)
        lines, good = parity.report(parity.trace(cfg, parity.ONE_DEVICE | {"context": 2, "tensor": 2}), one)
    assert good, lines
