"""The mesh is not a hyperparameter: every product of data, fsdp and tensor on 2 and on 8 devices equals one device."""

import itertools

import jax
import numpy as np
import pytest
from every import few_of
from meshes import MODELS, assert_changes_nothing, one_device

from config import compose
from parallel.mesh import AXES
from training import parity

EIGHT = [s for s in itertools.product((1, 2, 4, 8), repeat=3) if np.prod(s) in (2, 8)]
SIX = [(3, 1, 1), (1, 3, 1), (1, 1, 3), (2, 3, 1), (1, 2, 3)]
ALONE_OR_ALL = [(1, 2, 1), (1, 1, 2), (1, 1, 8), (2, 2, 2), (1, 4, 2)]
CASES = [("llama", s) for s in EIGHT] + [("gpt2", s) for s in ALONE_OR_ALL] + [("gemma", s) for s in SIX]
CASES += [("families", (1, 2, 4))]
FEW = [
    *(("llama", sizes) for sizes in ((8, 1, 1), (1, 8, 1), (1, 2, 4), (2, 2, 2))),
    *(("gpt2", sizes) for sizes in ((1, 1, 8), (2, 2, 2))),
    *(("gemma", (2, 3, 1)), ("families", (1, 2, 4))),
]


def spelled(value) -> str:
    return value if isinstance(value, str) else "x".join(map(str, value))


@pytest.mark.parametrize(("model", "sizes"), few_of(CASES, FEW), ids=spelled)
def test_mesh_changes_nothing(model, sizes):
    assert_changes_nothing(model, dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)))


@pytest.mark.parametrize("name", few_of(["muon", "adafactor", "lion", "sgd"], ["muon", "adafactor"]))
def test_optimizers_do_not_see_the_mesh(name):
    """Six steps on a mesh of 3, where the vocabulary of 256 is padded to 384, lose what one device loses.

    No longer: Lion takes the sign of momenta, and after some ten steps one that is zero up to rounding decides.
    """
    arguments = [*MODELS["gemma"], f"optimizer={name}", "train.grad_accumulation=1", "train.steps=6"]
    arguments += ["model.width=144", "train.remat=none", "model.tied_embeddings=false"]
    three, one = (
        parity.trace(compose.load(arguments), parity.ONE_DEVICE | {"tensor": tensor}, steps=6) for tensor in (3, 1)
    )
    np.testing.assert_allclose(three.losses, one.losses, rtol=1e-5)


def test_parity_sees_a_difference():
    """The comparison can fail: another seed is another run, and the report says so."""
    cfg = compose.load([*MODELS["llama"], "seed=1"])
    lines, good = parity.report(parity.trace(cfg, parity.ONE_DEVICE, steps=3), one_device("llama"))
    assert not good
    assert "DIFFERENT" in lines[0]


def test_no_device_holds_the_whole_model():
    """Parameters, moments and gradients of matrices and tables are split over every device of fsdp x tensor."""
    import jax.numpy as jnp

    from model.transformer import describe
    from parallel.mesh import make_mesh
    from training.optimizer import make_optimizer
    from training.state import abstract_state, init_state

    cfg = compose.load([*MODELS["llama"], "mesh.fsdp=4", "mesh.tensor=2"])
    mesh = make_mesh(dict.fromkeys(AXES, 1) | {"fsdp": 4, "tensor": 2})
    with jax.set_mesh(mesh):
        description = describe(cfg.model)
        for name in ("adamw", "muon", "lion", "sgd", "adafactor"):
            optimizer = make_optimizer(
                compose.load([*MODELS["llama"], f"optimizer={name}"]).optimizer, description.specs
            )
            state = init_state(abstract_state(mesh, description, optimizer, jnp.float32), description, optimizer, 0)
            for path, leaf in jax.tree_util.tree_leaves_with_path((state.params, state.opt_state)):
                whole, part = leaf.size, leaf.addressable_shards[0].data.size
                if whole >= 48 * 48:
                    assert part == whole / 8, (name, jax.tree_util.keystr(path), leaf.shape)
