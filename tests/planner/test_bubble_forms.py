"""Closed forms of pipelines against the tables that they stand for."""

import pytest

from parallel.pipeline.buffers import allocate
from parallel.pipeline.schedules import make
from planner import bubble

SCHEDULES = [
    ("gpipe", 1),
    ("1f1b", 1),
    ("interleaved", 2),
    ("interleaved", 3),
    ("zero_bubble", 1),
    ("zero_bubble_v", 2),
]
SIZES = [(4, 1), (4, 2), (2, 4), (2, 8), (4, 8), (4, 16), (8, 16), (8, 24)]
COSTS = [(1.0, 1.0, 1.0), (1.0, 1.4, 1.0)]  # forward, backward for inputs, for weights


@pytest.mark.parametrize(("name", "chunks"), SCHEDULES)
@pytest.mark.parametrize(("stages", "microbatches"), SIZES)
def test_time_is_that_of_the_table(name, chunks, stages, microbatches):
    table = make(name, stages, microbatches, chunks)
    for costs in COSTS:
        for lockstep in (False, True):
            share = (table.lockstep_bubble if lockstep else table.bubble)(*costs)
            exact = microbatches * sum(costs) / (1 - share)
            ours = bubble.seconds(name, stages, microbatches, chunks, *costs, lockstep)
            assert ours == pytest.approx(exact, rel=0.1), (costs, lockstep)


@pytest.mark.parametrize(("name", "chunks"), SCHEDULES)
@pytest.mark.parametrize(("stages", "microbatches"), SIZES)
def test_ticks_and_slots_are_those_of_the_table(name, chunks, stages, microbatches):
    table = make(name, stages, microbatches, chunks)
    buffers, ours = allocate(table), bubble.slots(name, stages, microbatches, chunks)
    assert bubble.ticks(name, stages, microbatches, chunks) == pytest.approx(table.ticks, rel=0.12)
    assert ours.kept * chunks == pytest.approx(buffers.kept_weight, rel=0.15)
    if table.split:
        assert ours.held * chunks == pytest.approx(buffers.held, rel=0.15)
    assert ours.messages >= buffers.messages - 2
