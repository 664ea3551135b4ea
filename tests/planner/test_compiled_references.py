"""Predicted memory against what the compilers for GPUs and TPUs said of the same steps: tests/golden/compiled.

They were compiled without a device (tests/aot/golden.py --write); here only the arithmetic runs.
"""

import statistics

import pytest

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


def test_arguments_are_the_state_and_the_batch():
    for name, found in KEPT.items():
        memory = CASES[name].predicted().memory
        assert found["arguments"] == pytest.approx(memory.parameters + memory.moments, rel=0.02), name


def test_memory_is_what_the_compilers_say():
    off = {}
    for name, found in KEPT.items():
        memory = CASES[name].predicted().memory
        off[name] = (memory.total - memory.fragmentation) / needed(found) - 1
    told = {name: f"{error:+.1%}" for name, error in off.items() if abs(error) > 0.15}
    assert not told
    assert statistics.median(map(abs, off.values())) < 0.1
