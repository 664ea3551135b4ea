"""Models of every family as transformers saved them: the same logits, on meshes too, and the same tensors back."""

import json
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest

from checkpoint.huggingface.config_json import read_config, write_config
from checkpoint.huggingface.export import export
from checkpoint.huggingface.families import FAMILIES
from checkpoint.huggingface.load import load
from checkpoint.huggingface.opened import open_pretrained
from checkpoint.huggingface.safetensors import Safetensors
from model.transformer import describe
from parallel.mesh import AXES, make_mesh

GOLDEN = Path(__file__).parent.parent.parent / "golden" / "huggingface"
TYPES = [family.model_type for family in FAMILIES]


@pytest.fixture(autouse=True, scope="module")
def _fast_compile():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def mesh_of(**axes: int):
    """A mesh of these axes on the first devices."""
    return make_mesh({axis: axes.get(axis, 1) for axis in AXES}, jax.devices()[: int(np.prod(list(axes.values())))])


@cache
def expected(family: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (B, T), and logits (B, T, V) of transformers."""
    with np.load(GOLDEN / family / "expected.npz") as found:
        return found["tokens_BT"], found["logits_BTV"]


def logits(family: str, mesh) -> np.ndarray:
    """Ours, of the same weights and tokens."""
    opened, (tokens_BT, _) = open_pretrained(GOLDEN / family), expected(family)
    with jax.set_mesh(mesh):
        description = describe(opened.config)
        params = load(opened, description, mesh)

        @jax.jit
        def forward(params, tokens_BT):
            model = description.bind(params)
            return model.logits(model(tokens_BT)[0])[..., : opened.config.vocab_size]

        return np.asarray(forward(params, tokens_BT))


def assert_agree(ours: np.ndarray, theirs: np.ndarray) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())
    np.testing.assert_array_equal(ours.argmax(-1), theirs.argmax(-1))


@pytest.mark.parametrize("family", TYPES)
def test_logits_are_those_of_transformers(family):
    assert_agree(logits(family, mesh_of(data=1)), expected(family)[1])


@pytest.mark.parametrize(
    ("family", "axes"),
    [
        ("gpt2", {"fsdp": 2}),
        ("gemma2", {"fsdp": 4}),
        ("olmo2", {"fsdp": 2, "tensor": 3}),
        ("mixtral", {"expert": 2}),
        ("bert", {"data": 2, "tensor": 3}),
        ("roberta", {"fsdp": 2}),
    ],
)
def test_a_mesh_reads_its_parts(family, axes):
    """Every device reads its own part of every tensor, and the logits are those of one device."""
    c = open_pretrained(GOLDEN / family).config
    tensor = axes.get("tensor", 1)
    sizes = {"fsdp": c.width, "expert": c.experts or 1}
    axes = {axis: size for axis, size in axes.items() if axis != "tensor" and sizes.get(axis, size) % size == 0}
    axes |= {"tensor": tensor} if c.heads % tensor == 0 and c.ffn % tensor == 0 else {"tensor": 1}
    assert np.prod(list(axes.values())) > 1, "the golden model of this family suits no mesh of the test"
    tokens_BT, theirs = expected(family)
    assert_agree(logits(family, mesh_of(**axes)), theirs)


@pytest.mark.parametrize("family", TYPES)
def test_what_goes_out_is_what_came_in(family, tmp_path):
    """config.json says the same model again, and every tensor is the same to the bit, under the same name."""
    opened, mesh = open_pretrained(GOLDEN / family), mesh_of(data=1)
    written = write_config(opened.config, opened.length, family)
    assert read_config(written, opened.source.names()) == opened.config
    with jax.set_mesh(mesh):
        params = load(opened, describe(opened.config), mesh)
        export(tmp_path / "out", opened.config, written, params, "F32", {"note.txt": "a text"})
    there, here = Safetensors(GOLDEN / family / "model.safetensors"), open_pretrained(tmp_path / "out").source
    assert here.names() == there.names()
    for name in there.names():
        np.testing.assert_array_equal(here.tensor(name), there.tensor(name))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == opened.json["architectures"]
    with pytest.raises(ValueError, match="is there already"):
        export(tmp_path / "out", opened.config, written, params, "F32", {})
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_large_models_go_out_in_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr("checkpoint.huggingface.export.SHARD_BYTES", 10_000)
    opened, mesh = open_pretrained(GOLDEN / "qwen3_moe"), mesh_of(data=1)
    with jax.set_mesh(mesh):
        params = load(opened, describe(opened.config), mesh)
        export(tmp_path / "out", opened.config, opened.json, params, "F32", {})
    again = open_pretrained(tmp_path / "out")
    assert len(again.source.files()) > 2
    assert again.source.names() == opened.source.names()
    for name in again.source.names():
        np.testing.assert_array_equal(again.source.tensor(name), opened.source.tensor(name))
