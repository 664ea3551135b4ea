"""Out of device memory: the parts add up, and every setting that is proposed fits by the same arithmetic."""

import re
import subprocess
import sys
from dataclasses import dataclass

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import SingleDeviceSharding

from config.compose import load
from config.layout import mesh_sizes
from parallel.mesh import make_mesh
from performance.fits import Need, Room, memory_of, need, settings_that_fit
from training.config import OptimizerConfig, TrainConfig
from training.job import make_job

SMALL = ["model.layers=1", "model.width=16", "model.heads=2", "model.kv_heads=2", "train.batch_size=2"]
ONE = dict.fromkeys(("pipe", "data", "fsdp", "expert", "context", "tensor"), 1)


@dataclass(frozen=True)
class Account:
    argument_size_in_bytes: int
    temp_size_in_bytes: int


@dataclass(frozen=True)
class Leaf:
    """A parameter of a shape, on one device."""

    shape: tuple[int, ...]
    dtype = np.dtype(np.float32)
    sharding = SingleDeviceSharding(jax.devices()[0])


@dataclass(frozen=True)
class State:
    params: Leaf
    opt_state: tuple[Leaf, Leaf]


BILLIONS = Leaf((8, 10**9))  # parameters: 32 GB
EIGHT = State(BILLIONS, (BILLIONS, BILLIONS))
TWO_ROWS = TrainConfig(batch_size=2)


def test_what_fits_is_not_refused():
    room = Room(EIGHT, 160e9, TWO_ROWS, OptimizerConfig(), ONE)
    room.check()
    room.check(Account(96 * 10**9, 63 * 10**9))


def test_one_line_with_parts_and_ways():
    with pytest.raises(MemoryError) as told:
        Room(EIGHT, 138e9, TWO_ROWS, OptimizerConfig(), ONE).check(Account(96 * 10**9, 63 * 10**9))
    line = str(told.value)
    assert "\n" not in line
    assert "159.0 GB (parameters 32.0 + moments 64.0 + gradients 32.0 + activations 31.0)" in line
    assert "optimizer.moment_dtype=bfloat16 (127.0)" in line
    assert "mesh.fsdp=2" in line
    assert "138.0" in line
    assert "train.batch_size=1" not in line, "half of the activations would still be 5.5 GB too many"


def test_arithmetic_alone_refuses_before_anything_is_compiled():
    with pytest.raises(MemoryError, match="128.0 GB before activations"):
        Room(EIGHT, 80e9, TWO_ROWS, OptimizerConfig(), ONE).check()


def test_the_allocator_is_put_into_words_and_other_faults_are_not():
    room = Room(EIGHT, 138e9, TWO_ROWS, OptimizerConfig(), ONE)
    with pytest.raises(MemoryError, match="parameters 32.0"), room.told():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 64.53GiB")
    with pytest.raises(jax.errors.JaxRuntimeError), room.told():
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


@given(
    st.floats(1e6, 1e12), st.floats(0, 1e12), st.integers(1, 64), st.floats(0.05, 0.99),
    st.sampled_from(["none", "full"]), st.sampled_from(["", "bfloat16"]),
)  # fmt: skip
def test_proposed_numbers_are_below_the_limit(parameters, activations, batch, share, remat, moment_dtype):
    needed = Need(parameters, 2 * parameters, parameters, activations)
    limit = share * needed.total
    train, optimizer = TrainConfig(batch_size=batch, remat=remat), OptimizerConfig(moment_dtype=moment_dtype)
    for way in settings_that_fit(needed, limit, train, optimizer, ONE):
        for number in re.findall(r"\(([\d.]+)\)", way):
            assert float(number) <= limit / 1e9 + 0.051, way
        if found := re.search(r"batch_size=(\d+)", way):
            assert 4 * parameters + activations * int(found[1]) / batch <= limit


def test_of_a_real_state():
    config = load(["model.layers=2", "model.width=64", "model.heads=4", "model.kv_heads=4", "optimizer=adamw"])
    mesh = make_mesh(mesh_sizes(config, 1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        job = make_job(config, mesh)
    count = sum(leaf.size for leaf in jax.tree.leaves(job.abstract.params))
    before = need(job.abstract)
    assert (before.parameters, before.gradients, before.activations) == (4 * count, 4 * count, None)
    assert 8 * count <= before.moments <= 8 * count + 100, "two moments, and a counter"
    after = need(job.abstract, Account(12 * count, 10 * count))
    assert after.activations == pytest.approx(22 * count - before.total)


def test_train_ends_with_one_line_and_exit_code_2(tmp_path):
    program = (
        "import sys, train; from config.compose import load; train.memory_of = lambda device: 1e6; "
        f"sys.exit(train.main([load(['run.dir={tmp_path}/run', 'train.steps=1'])]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert done.stderr.strip().startswith("error: out of device memory: a step needs")
    assert "Traceback" not in done.stderr


def test_a_first_step_that_finds_no_memory_is_one_line_too(tmp_path):
    """As where another process holds some of it: by the compiler's account the step fits."""
    program = (
        "import sys, jax, train; from config.compose import load; from unittest.mock import Mock; "
        "full = jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory while trying to allocate 64.53GiB'); "
        "train.ProfiledStep = lambda *_: Mock(side_effect=full); train.memory_of = lambda device: 1e12; "
        f"sys.exit(train.main([load(['run.dir={tmp_path}/run', 'train.steps=1', *{SMALL}])]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: out of device memory: a step needs")
    assert "a device has 1000.0, of which less was free" in line
    assert "activations" in line


def test_cpus_do_not_say_what_they_have():
    assert memory_of(jax.devices()[0]) == float("inf")
