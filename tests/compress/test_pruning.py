"""What pruning leaves: the pattern that was asked for, the better weights, and a smaller model that can be trained."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from compress.__main__ import main
from compress.narrowing import Sizes, fitted, narrowed
from compress.options import parse
from compress.pruning import Sparse
from config.compose import load
from inference.opening import find_model
from model.config import ModelConfig
from model.transformer import describe
from parallel.mesh import AXES, make_mesh
from tests.compress.conftest import MODEL

DEVICES = ["runtime.platform=cpu", "runtime.cpu_devices=8"]
FEW = ["--samples", "8", "--length", "32", "--heldout", "8", "--generate", "0", "mesh.data=8"]
SMALL = ModelConfig(layers=3, width=32, heads=4, kv_heads=2, head_dim=8, ffn=32, vocab_size=40, vocab_multiple=8)
SMALL = replace(SMALL, bias="all")
TOKENS_NT = np.random.default_rng(0).integers(0, 40, (8, 16)).astype(np.int32)


def drawn(seed: int) -> tuple[jax.Array, np.ndarray]:
    """Weights, and inputs of very different sizes."""
    draw = np.random.default_rng(seed)
    x_tn = draw.standard_normal((200, 48)) * np.exp(draw.standard_normal(48))
    return jnp.asarray(draw.standard_normal((48, 12)), jnp.float32), x_tn.astype(np.float32)


@pytest.mark.parametrize("with_gram", [False, True])
def test_two_of_each_four_stay(with_gram):
    w_nm, x_tn = drawn(0)
    w_nm = w_nm.at[:8].set(1.0)  # equal ones, too
    mask_nm = Sparse(two_of_four=True).mask(w_nm, x_tn.T @ x_tn if with_gram else None)
    assert np.all(np.asarray(mask_nm).reshape(12, 4, 12).sum(1) == 2)


def test_the_share_is_what_was_asked_for():
    w_nm, x_tn = drawn(1)
    assert int(Sparse(0.25).mask(w_nm, None).sum()) == w_nm.size * 3 // 4
    assert np.all(Sparse(0.25).mask(w_nm, x_tn.T @ x_tn).sum(0) == 36)  # of each output


def test_wanda_is_that_of_its_definition():
    w_nm, x_tn = drawn(2)
    score_nm = np.abs(np.asarray(w_nm)) * np.linalg.norm(x_tn, axis=0)[:, None]
    theirs_nm = score_nm >= np.sort(score_nm, axis=0)[24]
    np.testing.assert_array_equal(Sparse(0.5).mask(w_nm, x_tn.T @ x_tn), theirs_nm)


@pytest.mark.parametrize("two_of_four", [False, True])
def test_wanda_changes_outputs_less_than_magnitude(two_of_four):
    w_nm, x_tn = drawn(3)
    off = lambda mask_nm: np.square(x_tn @ np.asarray(jnp.where(mask_nm, 0, w_nm))).sum()
    form = Sparse(0.5, two_of_four)
    assert off(form.mask(w_nm, x_tn.T @ x_tn)) < 0.7 * off(form.mask(w_nm, None))


def test_a_fitted_matrix_makes_the_outputs_of_the_whole():
    """Where inputs go together, what is left says nearly all that the others said."""
    draw = np.random.default_rng(4)
    x_tn = draw.standard_normal((300, 6)) @ draw.standard_normal((6, 16)) + 0.01 * draw.standard_normal((300, 16))
    w_nm, rows = draw.standard_normal((16, 5)).astype(np.float32), np.arange(0, 16, 2)
    ours = x_tn[:, rows] @ np.asarray(fitted(jnp.asarray(w_nm), jnp.asarray(x_tn.T @ x_tn, jnp.float32), rows))
    cut = x_tn[:, rows] @ w_nm[rows]
    assert np.square(ours - x_tn @ w_nm).sum() < 0.05 * np.square(cut - x_tn @ w_nm).sum()


# ------------------------------------------------------------------------------------------------------------ narrowing


def logits(mesh, description, params) -> np.ndarray:
    def run(params, tokens_BT):
        model = description.bind(params)
        return model.logits(model(tokens_BT)[0])[..., :40]

    with jax.set_mesh(mesh):
        return np.asarray(jax.jit(run)(params, jnp.asarray(TOKENS_NT)))


def narrow(sizes: Sizes, change=lambda params: params, **axes: int):
    """The logits of a model and of what is left of it, on a mesh."""
    devices = jax.devices()[: int(np.prod(list(axes.values())))]
    mesh = make_mesh({axis: axes.get(axis, 1) for axis in AXES}, devices)
    with jax.set_mesh(mesh):
        description = describe(SMALL)
        draw = lambda: change(jax.tree.map(lambda p: 2 * p + 0.01, description.init(jax.random.key(0))))
        params = jax.jit(draw, out_shardings=description.shardings(mesh))()
        target, left = narrowed(description, params, mesh, sizes.of(SMALL), TOKENS_NT)
        jax.tree.map(lambda spec, p: np.testing.assert_equal(p.shape, spec.shape), target.shapes, left)
    return logits(mesh, description, params), logits(mesh, target, left)


def test_what_says_nothing_goes_without_a_loss():
    """Heads, ffn entries and a layer that add nothing to the residual stream."""

    def silenced(params):
        layers = params["layers"]
        out = layers["attention"]["out"]["weight"].at[:, 2:].set(0).at[1].set(0)
        down = layers["ffn"]["down"]["weight"].at[:, ::2].set(0).at[1].set(0)
        attention = layers["attention"] | {"out": layers["attention"]["out"] | {"weight": out}}
        attention["out"]["bias"] = jnp.zeros_like(attention["out"]["bias"])
        ffn = layers["ffn"] | {"down": {"weight": down, "bias": jnp.zeros_like(layers["ffn"]["down"]["bias"])}}
        return params | {"layers": layers | {"attention": attention, "ffn": ffn}}

    whole, left = narrow(Sizes(layers=2, kv_heads=1, ffn=16), silenced, data=1)
    np.testing.assert_allclose(left, whole, rtol=0, atol=2e-3 * np.abs(whole).max())


def test_a_mesh_changes_nothing():
    sizes = Sizes(layers=2, ffn=24)
    _, one = narrow(sizes, data=1)
    _, many = narrow(sizes, fsdp=2, tensor=2)
    np.testing.assert_allclose(many, one, rtol=0, atol=1e-4 * np.abs(one).max())


@pytest.mark.parametrize(
    ("sizes", "config", "message"),
    [
        (Sizes(layers=4), SMALL, "--layers 4: the model has 3"),
        (Sizes(ffn=32), SMALL, "nothing would go"),
        (Sizes(kv_heads=1), replace(SMALL, bias="none", experts=4), "experts are not narrowed"),
        (Sizes(ffn=8), replace(SMALL, parametrization="mup"), "parametrization=mup"),
        (Sizes(layers=2), replace(SMALL, window=8, window_pattern="LG"), "window_pattern=LG"),
    ],
)
def test_sizes_that_cannot_be_are_refused(sizes, config, message):
    with pytest.raises(ValueError, match=message):
        sizes.of(config)


# --------------------------------------------------------------------------------------------------------- the command


def test_a_smaller_model_is_an_ordinary_run(run, tmp_path):
    """It opens, with its own sizes, and a run begins from it."""
    sizes = ["--layers", "1", "--kv-heads", "1", "--ffn", "24"]
    words = [run, tmp_path / "out", "--recipe", "narrow", *sizes, *FEW, *DEVICES]
    assert main(parse([str(word) for word in words])) == 0
    cost = json.loads((tmp_path / "out" / "cost.json").read_text())
    assert cost["after"]["memory"] < 0.6 * cost["before"]["memory"]
    config = load([f"model.from={tmp_path / 'out'}", *DEVICES])
    assert (config.model.layers, config.model.heads, config.model.kv_heads, config.model.ffn) == (1, 2, 1, 24)
    opened = find_model(tmp_path / "out", ["mesh.data=8", *DEVICES]).open()
    assert opened.params["layers"]["attention"]["query"]["weight"].shape == (1, MODEL.width, 2, MODEL.head_dim)


def test_a_pruned_model_has_its_zeros(run, tmp_path):
    words = [run, tmp_path / "out", "--recipe", "wanda-2of4", *FEW, *DEVICES]
    assert main(parse([str(word) for word in words])) == 0
    opened = find_model(tmp_path / "out", ["mesh.data=8", *DEVICES]).open()
    up = np.asarray(opened.params["layers"]["ffn"]["up"]["weight"])
    assert np.all((up.reshape(2, MODEL.width // 4, 4, MODEL.ffn) != 0).sum(2) <= 2)
    assert np.any(np.asarray(opened.params["tokens"]["weight"]) != 0)


def test_a_run_that_trained_a_part_of_its_model_is_pruned_whole(run, tmp_path):
    """What opens is the pruned model, not the one that the run began from."""
    frozen, out = tmp_path / "run", tmp_path / "out"
    frozen.mkdir()
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["adapter"] = {"kind": "freeze", "train": ["final_norm/*"]}
    settings["weights"]["path"], settings["checkpoint"]["dir"] = str(run), str(run / "checkpoints")
    (frozen / "config.yaml").write_text(yaml.safe_dump(settings))
    (frozen / "reference.npz").write_bytes(b"kept")
    words = [frozen, out, "--recipe", "magnitude", "--share", "0.9", *FEW, *DEVICES]
    assert main(parse([str(word) for word in words])) == 0
    assert find_model(out).config.adapter.kind == "none"
    assert (out / "reference.npz").read_bytes() == b"kept"  # what its task is judged beside
    up = find_model(out, ["mesh.data=8", *DEVICES]).open().params["layers"]["ffn"]["up"]["weight"]
    assert np.mean(np.asarray(up) == 0) == pytest.approx(0.9, abs=0.01)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["narrow"], "--layers, --kv-heads and --ffn say what stays"),
        (["int8", "--ffn", "8"], "--layers, --kv-heads and --ffn say what stays"),
        (["wanda", "--share", "1.5"], "1.5 is no share between 0 and 1"),
        (["wanda", "--wide", "attention/value"], "--recipe wanda keeps floats, and --wide keeps matrices in int8"),
    ],
)
def test_mistakes_are_one_line(run, tmp_path, capsys, words, message):
    with pytest.raises(SystemExit) as end:
        parse([str(run), str(tmp_path / "out"), "--recipe", *words])
    assert end.value.code == 2
    assert message in capsys.readouterr().err
