"""Mesh arithmetic: what is legal, what is refused, and the advice that goes with it."""

import itertools
import math
import re

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.axes import ACTIVATION_AXES
from parallel.config import PipelineConfig, schedule_for
from parallel.mesh import (
    AXES,
    MeshConfig,
    MicrobatchRequirement,
    Requirement,
    factorizations,
    make_mesh,
    requirement,
    resolve,
)
from parallel.sharding import batch_sharding


def test_rest_takes_what_is_left():
    assert resolve(MeshConfig(), 8)["fsdp"] == 8
    assert resolve(MeshConfig(tensor=2, data=-1, fsdp=1), 8) == dict.fromkeys(AXES, 1) | {"data": 4, "tensor": 2}


def test_a_wrong_product_shows_the_arithmetic_and_legal_meshes():
    with pytest.raises(
        ValueError, match=r"mesh 2\*2\*3 = 12 needs 12 devices, 8 found; nearest legal: .*mesh.tensor=2"
    ):
        resolve(MeshConfig(data=2, fsdp=2, tensor=3), 8)
    with pytest.raises(ValueError, match="3 does not divide 8 devices"):
        resolve(MeshConfig(tensor=3), 8)


def test_two_rests_and_zero_are_refused():
    with pytest.raises(ValueError, match="only one mesh axis can be -1"):
        MeshConfig(data=-1)
    with pytest.raises(ValueError, match="mesh.tensor=0"):
        MeshConfig(tensor=0)


def test_a_broken_requirement_names_it():
    heads = Requirement("model.heads", 6, ("tensor",))
    with pytest.raises(ValueError, match=r"model.heads=6 does not divide by mesh.tensor=4; nearest legal"):
        resolve(MeshConfig(tensor=4), 8, [heads])
    with pytest.raises(ValueError, match="no mesh of 7 devices is legal"):
        resolve(MeshConfig(), 7, [Requirement(name, 4, (name,)) for name in AXES])
    kv = Requirement("model.kv_heads", 2, ("tensor",), or_divisor=True)
    assert resolve(MeshConfig(tensor=8), 8, [kv])["tensor"] == 8


@given(
    devices=st.integers(1, 64),
    sizes=st.tuples(*[st.sampled_from((1, 1, 1, 2, 3, 4, 8))] * len(AXES)),
    needs=st.tuples(*[st.integers(1, 48)] * len(AXES)),
)
def test_what_is_advised_is_legal(devices, sizes, needs):
    requirements = [Requirement(f"size of {axis}", n, (axis,)) for axis, n in zip(AXES, needs, strict=True)]
    config = MeshConfig(**dict(zip(AXES, sizes, strict=True)))
    try:
        resolved = resolve(config, devices, requirements)
    except ValueError as error:
        message = str(error)
        assert "\n" not in message
        for advice in re.findall(r"(?:legal: |or )((?:mesh\.\w+=\d+ ?)+)", message):
            asked = {a: int(n) for a, n in re.findall(r"mesh\.(\w+)=(\d+)", advice)}
            assert resolve(MeshConfig(**({"fsdp": 1} | asked)), devices, requirements)
    else:
        assert math.prod(resolved.values()) == devices
        assert all(r.problem(resolved) is None for r in requirements)


def test_factorizations_are_all_of_them_once():
    found = [tuple(s[axis] for axis in AXES) for s in factorizations(12)]
    wanted = [s for s in itertools.product((1, 2, 3, 4, 6, 12), repeat=len(AXES)) if math.prod(s) == 12]
    assert sorted(found) == sorted(wanted)


def test_to_change_a_row_is_enough(monkeypatch):
    """Batches over data and fsdp alone: what must divide, the layout, the rows of a process and microbatches follow."""
    sizes = dict.fromkeys(AXES, 1) | {"data": 2, "expert": 4}
    mesh = make_mesh(sizes, jax.devices()[:8])
    found = lambda: (
        requirement("train.batch_size", 4, "batch").problem(sizes),
        MicrobatchRequirement("train.batch_size", 4, 2).problem(sizes | {"pipe": 2}),
        batch_sharding(mesh).shard_shape((8, 16)),
        schedule_for(PipelineConfig(), 8, sizes | {"pipe": 2}).microbatches,
    )
    broken, uneven, shape, microbatches = found()
    assert "mesh.data=2 * mesh.expert=4 = 8" in broken
    assert "mesh.expert=4" in uneven
    assert (shape, microbatches) == ((1, 16), 1)
    monkeypatch.setitem(ACTIVATION_AXES, "batch", ("data", "fsdp"))
    assert found() == (None, None, (4, 16), 4)
