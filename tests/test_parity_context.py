"""A split sequence changes nothing: models of every kind on meshes with a context axis equal one device."""

import pytest
from meshes import assert_changes_nothing

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


@pytest.mark.parametrize(("model", "style", "mesh"), CASES, ids=spelled)
def test_a_split_sequence_changes_nothing(model, style, mesh):
    extra = DIVISIBLE if model == "gemma" else ()
    assert_changes_nothing(model, mesh, f"context.style={style}", extra=extra)
