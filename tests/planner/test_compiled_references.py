"""Predicted memory against what the compilers for GPUs and TPUs said of the same steps: tests/golden/compiled.

They were compiled without a device (tests/aot/golden.py --write); here only the arithmetic runs.
"""

import itertools
import math
import statistics
from types import SimpleNamespace

import pytest
from jax.sharding import AbstractMesh, AxisType

from config.layout import mesh_sizes
from model import attention
from model.specs import leaves, parameter_specs
from parallel import context
from parallel.sharding import parameter_sharding
from planner import memory as arithmetic
from runtime.memory import temporary_bytes
from tests.aot.cases import CASES, kept

KEPT = {name: found for name, case in CASES.items() if case.platform != "cpu" and (found := kept(name))}


def needed(found: dict) -> float:
    """Bytes a device by the compiler's account."""
    return found["arguments"] + found["temporary"] + found["code"]


@pytest.mark.parametrize("name", KEPT)
def test_a_layout_that_is_called_fit_is_one_to_the_compiler(name):
    """The allowance of a plan covers what compilers place beyond the arrays that are counted."""
    assert KEPT[name]["settings"] == CASES[name].settings, "compile it again: python -m tests.aot.golden ... --write"
    memory = CASES[name].predicted().memory
    assert memory.total >= needed(KEPT[name]), f"{memory.total / 1e9:.3f} of {needed(KEPT[name]) / 1e9:.3f} GB"


def in_tiles(shape: tuple[int, ...]) -> int:
    """Entries that an array takes on a TPU, which fills tiles of 8 x 128: of the dims that may be the two of a tile,
    the compiler takes those with the least padding.
    """
    up = lambda size, unit: -(-size // unit) * unit
    if len(shape) == 1:
        return up(shape[0], 128)
    pairs = itertools.permutations(range(len(shape)), 2)
    padded = lambda row, lane: [up(s, {row: 8, lane: 128}.get(dim, 1)) for dim, s in enumerate(shape)]
    return min(math.prod(padded(*pair)) for pair in pairs)


def share_in_tiles(name: str) -> float:
    """How much larger the parameters' shards are in tiles."""
    case = CASES[name]
    sizes = mesh_sizes(case.planner.config, case.devices)
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    specs = [spec for _, spec in leaves(parameter_specs(case.planner.config.model))]
    shapes = [parameter_sharding(mesh, spec.shape, spec.axes).shard_shape(spec.shape) for spec in specs]
    return sum(map(in_tiles, shapes)) / sum(map(math.prod, shapes))


def test_arguments_are_the_state_and_the_batch():
    """On TPUs in tiles, which counts where small dims are split further."""
    for name, found in KEPT.items():
        memory = CASES[name].predicted().memory
        expected = memory.parameters + memory.moments
        if CASES[name].platform == "tpu":
            expected *= share_in_tiles(name)
        assert found["arguments"] == pytest.approx(expected, rel=0.02), name


def test_memory_is_what_the_compilers_say():
    off = {}
    for name, found in KEPT.items():
        memory = CASES[name].predicted().memory
        off[name] = (memory.total - memory.fragmentation) / needed(found) - 1
    told = {name: f"{error:+.1%}" for name, error in off.items() if abs(error) > 0.15}
    assert not told
    assert statistics.median(map(abs, off.values())) < 0.1


def test_what_the_arithmetic_mirrors_is_what_runs():
    """The planner reads no module that computes, and has these numbers twice."""
    assert (arithmetic.MOST_SCORES, arithmetic.SMALLEST_CHUNK) == (context.MOST_SCORES, context.SMALLEST_CHUNK)
    assert arithmetic.QUERY_CHUNK == attention.QUERY_CHUNK


def test_what_is_temporary_on_a_tpu_is_its_peak_without_the_arguments():
    account = SimpleNamespace(argument_size_in_bytes=3, temp_size_in_bytes=9, peak_memory_in_bytes=10)
    assert [temporary_bytes(account, platform) for platform in ("cpu", "gpu", "tpu")] == [9, 9, 7]
