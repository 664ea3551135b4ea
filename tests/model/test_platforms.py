"""What is chosen for a platform changes when and where 16 bits are rounded, and nothing else."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import optax
import pytest
from every import few_of

from config.compose import load
from config.layout import mesh_sizes
from model import platforms
from model.rotary import rope_angles
from parallel.mesh import make_mesh
from training.job import make_job
from training.parity import random_batch

MODELS = {
    "GPT-2": ["model=gpt2_124m"],
    "Llama": ["model=llama_1b", "model.rope_scaling.kind=none", "model.scan_layers=true"],
}
MESHES = {
    "pipeline": ("gpt2", {"pipe": 2, "tensor": 2}, ["pipeline.schedule=zero_bubble"]),
    "split": ("gpt2", {"fsdp": 2, "tensor": 2, "context": 2}, ["model.scan_layers=true"]),
}
SMALL = [
    *("model.layers=2", "model.width=64", "model.heads=4", "model.kv_heads=4", "model.head_dim=16", "model.ffn=128"),
    *("model.vocab_size=400", "tokenizer=bytes", "train.seq_len=64", "train.batch_size=4", "optimizer=adamw"),
]


def loss_and_gradients(model: list[str], dtype: str):
    config = load([*model, *SMALL, f"train.compute_dtype={dtype}"])
    mesh = make_mesh(mesh_sizes(config, 1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        job = make_job(config, mesh)
        _, metrics, gradients = job.step_and_gradients(job.init(0), random_batch(config, 0, slice(0, 4)))
    return float(metrics["train/loss"]), gradients


@pytest.mark.parametrize("model", few_of(MODELS, ["Llama"]))
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-6), ("bfloat16", 2e-2)])
def test_every_row_computes_the_same(model, dtype, bound, monkeypatch):
    loss, gradients = loss_and_gradients(MODELS[model], dtype)
    for name, row in platforms.CHOICES.items():
        monkeypatch.setitem(platforms.CHOICES, "cpu", row)
        theirs, found = loss_and_gradients(MODELS[model], dtype)
        assert theirs == pytest.approx(loss, rel=bound / 2), name
        difference = jax.tree.map(lambda a, b: a - b, found, gradients)
        assert optax.tree.norm(difference) <= bound * optax.tree.norm(gradients), name


@pytest.mark.long
@pytest.mark.parametrize("case", few_of(MESHES, ["split"]))
def test_rows_of_accelerators_are_mesh_invariant_too(case, monkeypatch):
    monkeypatch.setitem(platforms.CHOICES, "cpu", platforms.CHOICES["gpu"])
    model, mesh, how = MESHES[case]
    meshes.one_device.cache_clear()  # of other rows
    try:
        meshes.assert_changes_nothing(model, mesh, *how)
    finally:
        meshes.one_device.cache_clear()


def test_rows_are_of_platforms_and_a_choice_is_used(monkeypatch):
    assert set(platforms.CHOICES) == {"cpu", "gpu", "tpu"}
    # one is of decoding alone, and of the other the next test speaks
    training = replace(platforms.CHOICES["cpu"], by_output=False, angles_apart=False)
    assert training == platforms.Choices(), "float32 runs on CPUs are bitwise what they were"
    before, _ = loss_and_gradients(MODELS["GPT-2"], "bfloat16")
    monkeypatch.setitem(platforms.CHOICES, "cpu", replace(platforms.Choices(), narrow_logits=True))
    assert loss_and_gradients(MODELS["GPT-2"], "bfloat16")[0] != before, "logits are rounded to 16 bits now"


@pytest.mark.parametrize("kind", ["none", "dynamic"])
def test_angles_are_bitwise_the_same_apart(kind, monkeypatch):
    config = load(["model=llama_1b", *SMALL, f"model.rope_scaling.kind={kind}"]).model
    positions_BT = jnp.arange(4090, 4106, dtype=jnp.int32)[None]
    apart = jax.jit(partial(rope_angles, config))(positions_BT)
    monkeypatch.setitem(platforms.CHOICES, "cpu", platforms.Choices())
    for ours, theirs in zip(apart, jax.jit(partial(rope_angles, config))(positions_BT), strict=True):
        np.testing.assert_array_equal(ours, theirs)
