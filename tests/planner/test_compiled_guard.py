"""What the compiler for CPUs makes of two small steps: collectives and memory stay as tests/golden/compiled has them.

Those of GPUs and TPUs: make test-aot.
"""

import jax
import pytest

from planner import compiled_step
from tests.aot import golden
from tests.aot.cases import CASES, kept

GUARDED = [name for name, case in CASES.items() if case.hardware == "cpu" and case.guarded]


@pytest.fixture
def compiled(monkeypatch):
    """What the compiler says of a case, on this process's eight devices."""
    monkeypatch.setattr(compiled_step, "devices_of", lambda asked, config: jax.devices())
    return golden.asked


@pytest.mark.parametrize("name", GUARDED)
def test_collectives_and_memory_are_as_they_were(name, compiled):
    now = compiled(name)
    assert not (lines := golden.changes(name, now, kept(name))), "\n".join(lines)


def test_a_change_is_told_with_what_to_do():
    name = GUARDED[0]
    before = kept(name)
    first, *others = before["collectives"]
    now = before | {"temporary": before["temporary"] * 1.5, "collectives": others}
    said = "\n".join(golden.changes(name, now, before))
    assert "temporary" in said
    assert "(+50.0%)" in said
    assert f"{first['kind']} over {' '.join(first['axes'])}" in said
    assert "-> 0 x" in said
    assert "this project's program changed" in said
    assert f"python -m tests.aot.golden cpu --write {name}" in said
    other = golden.changes(name, now | {"versions": {"jax": "9"}}, before)
    assert "the compiler changed" in "\n".join(other)
    assert not golden.changes(name, before, before)
    assert "has never been kept" in golden.changes(name, now, None)[0]
