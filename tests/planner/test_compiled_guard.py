"""What the compiler for CPUs makes of two small steps: collectives and memory stay as tests/golden/compiled has them.

Those of GPUs and TPUs: make test-aot.
"""

import jax
import pytest

from parallel.config import PipelineConfig, schedule_for
from performance.collectives import Collective
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


@pytest.mark.parametrize("name", ["zero_bubble", "zero_bubble_v", "interleaved", "1f1b", "gpipe"])
def test_collectives_of_a_pipeline_count_as_often_as_they_run(name):
    """In a program's text they stand once a tick, whether or not a branch skips them."""
    sizes = dict.fromkeys(("data", "fsdp", "expert", "context", "tensor"), 1) | {"pipe": 2}
    schedule = schedule_for(PipelineConfig(schedule=name, microbatches=4), 4, sizes)

    def times(scope: str, layers: int = 1) -> int:
        once = Collective(
            "all-gather", ("fsdp",), 2, "f32", 8.0, layers * schedule.ticks, "loop", f"jit(f)/{scope}/dot"
        )
        return compiled_step.as_often_as_run(once, schedule).times

    assert times("at_most_once.F/while/body", layers=3) == 3 * 4 * schedule.chunks
    assert times("at_most_once.B/while/body") == 4 * schedule.chunks
    assert times("at_most_once.W") == (4 * schedule.chunks if schedule.split else 0)
    assert times("at_most_once.loss/while/body") == times("at_most_once.embed_gradient") == 4
    assert times("cond/branch_1_fun/embed") == 4
    assert times("clip") == schedule.ticks
    assert sum(times(f"send/cond/branch_{n}_fun/ppermute") for n in range(99)) == schedule.ticks
