"""Quantisation-aware training: what is trained with is what is kept, and gradients pass as if nothing were rounded."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import MODELS

from compress.__main__ import group_of, losses_of, main
from compress.forms import Fp8, Int4, Int8, Nf4
from compress.options import parse
from compress.recipes import GROUP, RECIPES
from compress.rehearsal import through
from config import compose
from evaluation.scoring import Scorer
from finetune.adapter_config import NoAdapter, QatConfig
from inference.opening import find_model
from training import parity


@pytest.mark.parametrize("form", [Int8(), Fp8(), Int4(8), Nf4(8)], ids=lambda form: type(form).__name__)
def test_the_gradient_is_that_of_the_rounded_matrix(form):
    """Exactly: d f(rounded(w)) / d w is f's gradient at the rounded matrix."""
    w = jnp.asarray(np.random.default_rng(0).standard_normal((2, 4, 8, 6)), jnp.float32)
    f = lambda w: jnp.sum(jnp.sin(w))
    kept = through(w, form, 2, 1)
    assert 0 < float(jnp.abs(kept - w).max()) < 0.5
    np.testing.assert_array_equal(jax.grad(lambda w: f(through(w, form, 2, 1)))(w), jax.grad(f)(kept))
    np.testing.assert_array_equal(through(w[1], form, 2, 0), kept[1])  # each expert for itself


def test_what_is_trained_with_is_what_is_kept(run, tmp_path, capsys):
    """A run that rehearsed int4 has, as int4, the loss that it was trained to have: in groups of its own."""
    text = (run / "config.yaml").read_text()
    rehearsed = tmp_path / "run"
    rehearsed.mkdir()
    adapter = "adapter: {kind: qat, form: int4, group: 16, targets: ['*']}"
    checkpoints = f"dir: {run / 'checkpoints'}"
    lines = text.replace("adapter:\n  kind: none", adapter).replace(
        "checkpoint:\n  dir: null", f"checkpoint:\n  {checkpoints}"
    )
    (rehearsed / "config.yaml").write_text(lines)
    devices = ["mesh.data=8", "runtime.platform=cpu", "runtime.cpu_devices=8"]
    words = [rehearsed, tmp_path / "out", "--recipe", "int4", "--tables", "keep", "--length", "32"]
    assert main(parse([*map(str, words), "--heldout", "8", "--generate", "0", *devices])) == 0
    assert "trained to be rounded" not in capsys.readouterr().err
    rows = np.random.default_rng(1).integers(0, 256, (8, 33)).astype(np.int32)
    losses = []
    for path in (rehearsed, tmp_path / "out", run):
        opened = find_model(path, devices).open()
        with jax.set_mesh(opened.mesh):
            losses.append(losses_of(Scorer(opened.description, opened.params, opened.mesh, opened.dtype), rows))
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-6)
    assert np.abs(losses[2] - losses[0]).max() > 1e-4
    assert json.loads((tmp_path / "out" / "cost.json").read_text())["after"]["memory"] > 0


@pytest.mark.long
def test_the_mesh_changes_nothing():
    """The first step: later ones may turn a code where rounding of sums differs."""
    words = [*MODELS["llama"], "optimizer=adamw", "adapter=qat", "adapter.form=int8"]
    mesh = {"pipe": 2, "fsdp": 2, "tensor": 2}
    one = parity.trace(compose.load(words), parity.ONE_DEVICE)
    ours = parity.trace(compose.load([*words, "pipeline.schedule=1f1b"]), parity.ONE_DEVICE | mesh)
    np.testing.assert_allclose(ours.losses[0], one.losses[0], rtol=1e-5)
    np.testing.assert_allclose(ours.losses, one.losses, rtol=1e-3)
    errors = parity.relative_errors(ours.gradients, one.gradients)
    assert max(errors.values()) < 1e-5, max(errors.items(), key=lambda item: item[1])


@pytest.mark.parametrize(
    ("words", "group", "told"),
    [
        (["int4"], 16, False),
        (["int4-gptq", "--group", "16"], 16, False),
        (["int4", "--group", "32"], 32, True),
        (["int8"], 16, True),
    ],
    ids=str,
)
def test_another_rounding_than_that_of_the_training_is_told(run, tmp_path, capsys, words, group, told):
    options = parse([str(run), str(tmp_path / "out"), "--recipe", *words])
    adapter = QatConfig(form="int4", group=16)
    assert group_of(options, RECIPES[options.recipe], adapter) == group
    assert ("was trained to be rounded to int4 in groups of 16" in capsys.readouterr().err) is told
    assert group_of(parse([str(run), "out", "--recipe", "int4"]), RECIPES["int4"], NoAdapter()) == GROUP
