"""Quantised parts compute what their numbers say, and lie on any mesh as the matrices that they replace."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compress.forms import Fp8, Int4, Int8, Int8Rows, Nf4, dense, forms_for, from_json, to_json
from compress.layers import quantise
from compress.recipes import RECIPES
from model.config import ModelConfig
from model.specs import LAYERS
from model.transformer import describe
from parallel.mesh import AXES, make_mesh

DENSE = ModelConfig(
    layers=1, width=32, heads=4, kv_heads=2, head_dim=8, ffn=48, vocab_size=40, vocab_multiple=8, bias="all"
)
EXPERTS = replace(DENSE, experts=4, shared_experts=1, ffn=24, bias="none", tied_embeddings=False)
GROUP = 16
TOKENS_NT = np.random.default_rng(0).integers(0, 40, (8, 16)).astype(np.int32)


def mesh_of(**axes: int):
    return make_mesh({axis: axes.get(axis, 1) for axis in AXES}, jax.devices()[: int(np.prod(list(axes.values())))])


@functools.cache
def made(config: ModelConfig, recipe: str, axes: tuple[tuple[str, int], ...] = ()):
    """The mesh, the float model and the quantised one, each (description, params), on it."""
    mesh = mesh_of(**dict(axes) or {"data": 1})
    with jax.set_mesh(mesh):
        description = describe(config)
        draw = lambda: jax.tree.map(lambda p: p + 0.01, description.init(jax.random.key(0)))
        params = jax.jit(draw, out_shardings=description.shardings(mesh))()
        forms = forms_for(description, RECIPES[recipe], GROUP, tables=True)
        samples = TOKENS_NT if RECIPES[recipe].calibrated else None
        return mesh, (description, params), quantise(description, params, mesh, forms, RECIPES[recipe].method, samples)


def logits(mesh, description, params, dtype=jnp.float32) -> np.ndarray:
    def run(params, tokens_BT):
        model = description.bind(params)
        return model.logits(model(tokens_BT, dtype=dtype)[0])[..., : description.config.vocab_size]

    with jax.set_mesh(mesh):
        return np.asarray(jax.jit(run)(params, jnp.asarray(TOKENS_NT)))


@pytest.mark.parametrize(
    ("config", "recipe"), [(DENSE, "int8"), (DENSE, "int4-awq"), (EXPERTS, "int4"), (DENSE, "nf4"), (EXPERTS, "fp8")]
)
def test_a_quantised_model_computes_what_its_numbers_say(config, recipe):
    """As the float model with the dequantised matrices does; in bfloat16, too, within its rounding."""
    mesh, (plain, params), (description, codes) = made(config, recipe)
    numbers = jax.jit(functools.partial(dense, description))(codes)
    ours, theirs = logits(mesh, description, codes), logits(mesh, plain, numbers)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())
    whole = logits(mesh, plain, params)
    assert 0 < np.abs(ours - whole).mean() < {"int8": 0.02, "fp8": 0.1}.get(recipe, 0.3) * np.abs(whole).mean()
    if recipe == "int8":
        narrow = logits(mesh, description, codes, jnp.bfloat16)
        np.testing.assert_allclose(narrow, ours, rtol=0, atol=0.1 * np.abs(ours).max())


def test_tokens_in_int8():
    """As int8 with the same codes, within the rounding of what they are multiplied with; on a mesh as well."""
    mesh, _, (description, codes) = made(DENSE, "w8a8")
    _, _, (weights, _) = made(DENSE, "int8")
    ours, theirs = logits(mesh, description, codes), logits(mesh, weights, codes)  # the codes are those of int8
    assert 0 < np.abs(ours - theirs).mean() < 0.03 * np.abs(theirs).mean()
    other, _, (its, its_codes) = made(DENSE, "w8a8", (("fsdp", 2), ("tensor", 2)))
    np.testing.assert_allclose(logits(other, its, its_codes), ours, rtol=0, atol=1e-2 * np.abs(ours).max())


MESHES = [{"fsdp": 2, "tensor": 2}, {"expert": 2, "tensor": 2}]


@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_a_mesh_changes_nothing(axes):
    """Plain rounding gives the same codes bit by bit, and the model the same logits."""
    config, named = (EXPERTS if "expert" in axes else DENSE), tuple(axes.items())
    recipe = "int4"
    mesh, _, (description, codes) = made(config, recipe, named)
    one_mesh, _, (one, one_codes) = made(config, recipe)
    jax.tree.map(np.testing.assert_array_equal, codes, one_codes)
    theirs = logits(one_mesh, one, one_codes)
    np.testing.assert_allclose(logits(mesh, description, codes), theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())


@pytest.mark.long
def test_calibration_on_a_mesh():
    """What is summed in another order turns a code here or there at most; the result is better than plain rounding."""
    _, _, (_, codes) = made(DENSE, "int4-gptq", (("fsdp", 2), ("tensor", 2)))
    mesh, (plain, params), (description, one) = made(DENSE, "int4-gptq")
    same = [np.mean(np.asarray(a) == np.asarray(b)) for a, b in zip(*map(jax.tree.leaves, (codes, one)), strict=True)]
    assert min(same) > 0.97
    _, _, (rounded, its) = made(DENSE, "int4")
    whole = logits(mesh, plain, params)
    off = lambda description, params: np.square(logits(mesh, description, params) - whole).mean()
    assert off(description, one) < 0.8 * off(rounded, its)


def test_experts_are_calibrated_by_their_own_tokens():
    mesh, (plain, params), (description, codes) = made(EXPERTS, "int4-gptq")
    _, _, (rounded, its) = made(EXPERTS, "int4")
    whole = logits(mesh, plain, params)
    off = lambda description, params: np.square(logits(mesh, description, params) - whole).mean()
    assert off(description, codes) < off(rounded, its)


def test_codes_are_split_like_the_matrix():
    """Over fsdp, tensor and expert; where a mesh does not divide the groups, they are whole and the codes are not."""
    for config, axes in ((DENSE, {"fsdp": 2, "tensor": 2}), (EXPERTS, {"expert": 2, "fsdp": 2, "tensor": 2})):
        with jax.set_mesh(mesh := mesh_of(**axes)):
            description = describe(config)
            forms = forms_for(description, RECIPES["int4"], GROUP, tables=True)
            small = describe(config, forms=forms)
            whole, ours = description.shardings(mesh), small.shardings(mesh)
            for path in forms:
                theirs, codes = whole, ours
                for name in path:
                    theirs, codes = theirs[name], codes[name]
                assert codes["weight"].spec == theirs["weight"].spec, path
    with jax.set_mesh(mesh := mesh_of(fsdp=4)):
        forms = forms_for(describe(DENSE), RECIPES["int4"], GROUP, tables=True)
        query = describe(DENSE, forms=forms).shardings(mesh)[LAYERS]["attention"]["query"]
        assert query["weight"].shard_shape((1, 16, 4, 8)) == (1, 4, 4, 8)
        assert query["step"].shard_shape((1, 2, 4, 8)) == (1, 2, 4, 8)


def test_codes_are_gathered_as_codes():
    """What travels over fsdp is a byte for two weights."""
    mesh, _, (description, codes) = made(DENSE, "int4", (("fsdp", 2), ("tensor", 2)))
    with jax.set_mesh(mesh):
        run = jax.jit(lambda params, tokens_BT: description.bind(params)(tokens_BT)[0])
        text = run.lower(codes, jnp.asarray(TOKENS_NT)).compile().as_text()
    gathered = [line for line in text.splitlines() if " all-gather(" in line]
    assert any("u8[" in line.split(" all-gather(")[0] for line in gathered)


def test_forms_are_told_and_read():
    forms = {("layers", "ffn", "up"): Int4(16, True), ("layers", "ffn", "down"): Int8(), ("tokens",): Int8Rows()}
    forms |= {("layers", "ffn", "gate"): Nf4(16), ("layers", "attention", "out"): Fp8()}
    forms |= {("layers", "attention", "key"): Int8(activations=True)}
    assert from_json(to_json(forms)) == forms


def test_some_matrices_stay_wide():
    with jax.set_mesh(mesh_of(data=1)):
        description = describe(DENSE)
        forms = forms_for(description, RECIPES["int4-gptq"], GROUP, tables=False, wide=("ffn/down", "*/value"))
        wide = {"/".join(path[1:]) for path, form in forms.items() if form == Int8()}
        assert wide == {"ffn/down", "attention/value"}
        with pytest.raises(ValueError, match="--wide ffn/dwn: no matrix of a layer is called so; there are attention"):
            forms_for(description, RECIPES["int4"], GROUP, tables=False, wide=("ffn/dwn",))


def test_groups_that_do_not_fit_are_refused():
    with jax.set_mesh(mesh_of(data=1)):
        description = describe(replace(DENSE, head_dim=6))
        with pytest.raises(ValueError, match="a dim of 6 has no groups of 16: they would be of 2"):
            forms_for(description, RECIPES["int4"], GROUP, tables=True)
