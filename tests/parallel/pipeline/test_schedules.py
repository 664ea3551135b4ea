"""Every schedule is legal, as good as its theory says and within its memory; what is illegal is refused."""

import dataclasses
import functools
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.pipeline.schedules import (
    DEFAULT_CHUNKS,
    Op,
    PipelineSchedule,
    check,
    forward_only,
    looped_placement,
    make,
    v_placement,
)

KINDS_OF = {"gpipe": "FB", "1f1b": "FB", "interleaved": "FB", "zero_bubble": "FBW", "zero_bubble_v": "FBW"}
FAMILIES = [
    ("gpipe", 1),
    ("1f1b", 1),
    *(("interleaved", chunks) for chunks in range(1, 5)),
    ("zero_bubble", 1),
    ("zero_bubble_v", 2),
]
SIZES = [(stages, microbatches) for stages in range(1, 9) for microbatches in range(1, 21)]
made = functools.cache(make)  # the grid is walked by several tests


@pytest.fixture(params=FAMILIES, ids=lambda family: f"{family[0]}-{family[1]}")
def family(request):
    return request.param


def replay(schedule: PipelineSchedule, kinds: str) -> list[int]:
    """Runs a table with mailboxes: the most microbatches that each stage holds; AssertionError if it cannot be run.

    Written apart from what it tests: values move between stages, one a tick, and are consumed where they are used.
    """
    parts = len(schedule.placement)
    part_of = {place: part for part, place in enumerate(schedule.placement)}
    activations = {(0, m): "tokens" for m in range(schedule.microbatches)}  # at the input of (part, microbatch)
    cotangents = {(parts - 1, m): "loss" for m in range(schedule.microbatches)}  # at its output
    held, wanted, finished = {}, {}, []
    stage_holds, most = [0] * schedule.stages, [0] * schedule.stages
    for row in schedule.table:
        assert len(row) == schedule.stages
        sent_up, sent_down = {}, {}
        for stage, op in enumerate(row):
            if op is None:
                continue
            at = (part_of[stage, op.chunk], op.microbatch)
            if op.kind == "F":
                held[at] = activations.pop(at, None)
                assert held[at], f"{op} before its input"
                sent_up[at[0] + 1, at[1]] = "activation"
                stage_holds[stage] += 1
            elif op.kind == "B":
                assert at in held, f"{op} before its F"
                assert cotangents.pop(at, None), f"{op} before its input"
                sent_down[at[0] - 1, at[1]] = "cotangent"
                wanted[at] = held.pop(at)
            else:
                assert wanted.pop(at, None), f"{op} before its B"
                finished.append(at)
            stage_holds[stage] -= op.kind == kinds[-1]
            most[stage] = max(most[stage], stage_holds[stage])
        activations |= sent_up
        cotangents |= sent_down
    results = finished if kinds == "FBW" else list(wanted)
    assert sorted(results) == [(part, m) for part in range(parts) for m in range(schedule.microbatches)]
    assert not held, "an F has no B"
    assert all(part == parts for part, _ in activations), "an activation was never used"
    assert all(part == -1 for part, _ in cotangents), "a cotangent was never used"
    assert sum(op is not None for row in schedule.table for op in row) == len(kinds) * len(results)
    return most


def clocked(schedule: PipelineSchedule, costs: dict[str, int]) -> float:
    """The bubble, by a clock that counts in units: an idle stage starts its next operation once its inputs are done."""
    part_of = {place: part for part, place in enumerate(schedule.placement)}
    queues = [[row[stage] for row in schedule.table if row[stage]] for stage in range(schedule.stages)]
    ends, free, clock, work = {}, [0] * schedule.stages, 0, 0
    while any(queues):
        for stage, queue in enumerate(queues):
            if not queue or free[stage] > clock:
                continue
            op = queue[0]
            part, m = part_of[stage, op.chunk], op.microbatch
            needs = {
                "F": [("F", part - 1, m)] if part else [],
                "B": [("F", part, m), *([("B", part + 1, m)] if part + 1 < len(schedule.placement) else [])],
                "W": [("B", part, m)],
            }[op.kind]
            if all(ends.get(need, clock + 1) <= clock for need in needs):
                queue.pop(0)
                free[stage] = ends[op.kind, part, m] = clock + costs[op.kind]
                work += costs[op.kind]
        clock += 1
    return 1 - work / (schedule.stages * max(free))


def test_every_schedule_can_be_run(family):
    for stages, microbatches in SIZES:
        schedule = made(family[0], stages, microbatches, family[1])
        assert (schedule.name, schedule.stages, schedule.microbatches, schedule.chunks) == (
            family[0], stages, microbatches, family[1],
        )  # fmt: skip
        most = replay(schedule, KINDS_OF[family[0]])
        assert schedule.peak_in_flight() == tuple(most)
        assert schedule.split == ("W" in KINDS_OF[family[0]])
        assert schedule.ticks == len(schedule.table)
        assert any(schedule.table[-1])


def test_every_schedule_passes_the_check(family):
    for stages, microbatches in SIZES:
        check(made(family[0], stages, microbatches, family[1]))


def test_bubbles_are_those_of_theory(family):
    name, chunks = family
    for stages, m in SIZES:
        bubble = made(name, stages, m, chunks).bubble()
        fill = stages - 1
        plain = fill / (m + fill)  # of gpipe and 1f1b
        enough = m >= (2 * stages - 1 if name == "zero_bubble_v" else stages)
        if name in ("gpipe", "1f1b"):
            theory = plain
        elif not enough:  # no closed form: the stages wait for microbatches that there are not
            assert bubble <= plain + 1e-12
            continue
        elif name == "interleaved":
            theory = fill / (chunks * m + fill)
        else:  # idle for `fill` operations of the 3 (each chunk's F, B, W) that a microbatch takes
            theory = fill / (3 * chunks * m + fill)
        assert bubble == pytest.approx(theory, abs=1e-12), (stages, m)


def test_zero_bubble_has_a_third_of_the_idle_time_of_1f1b():
    idle = {}
    for name in ("1f1b", "zero_bubble", "zero_bubble_v"):
        bubble = make(name, 4, 16).bubble()
        idle[name] = bubble / (1 - bubble)  # relative to the work, which is the same
    assert idle["zero_bubble"] == pytest.approx(idle["1f1b"] / 3)
    assert idle["zero_bubble_v"] == pytest.approx(idle["1f1b"] / 6)


@pytest.mark.parametrize("costs", [(1, 1, 1), (2, 3, 2), (3, 5, 1)])
def test_bubble_is_that_of_a_clocked_simulation(family, costs):
    forward, backward, weight = costs
    for stages, m in [(1, 3), (2, 1), (3, 7), (4, 8), (5, 3), (7, 20)]:
        schedule = made(family[0], stages, m, family[1])
        by_kind = {"F": forward, "B": backward if schedule.split else backward + weight, "W": weight}
        assert schedule.bubble(*costs) == pytest.approx(clocked(schedule, by_kind), abs=1e-12)


def test_a_whole_backward_costs_both_its_halves():
    """The usual orders have the same bubble at any costs; this one's last stage takes its backwards in reverse."""
    good = make("gpipe", 2, 2)
    table = [[Op("F", 0, 0), None], [Op("F", 0, 1), Op("F", 0, 0)], [None, Op("F", 0, 1)], [None, Op("B", 0, 1)]]
    table += [[None, Op("B", 0, 0)], [Op("B", 0, 0), None], [Op("B", 0, 1), None]]
    schedule = dataclasses.replace(good, table=tuple(map(tuple, table)))
    check(schedule)
    assert schedule.bubble() == pytest.approx(1 - 6 / 11)
    assert schedule.bubble(1, 2, 3) == pytest.approx(1 - 12 / 23)


def test_memory_bounds(family):
    name, chunks = family
    for stages, m in SIZES:
        peak = made(name, stages, m, chunks).peak_in_flight()
        if name == "gpipe":
            assert peak == (m,) * stages
        elif name == "1f1b" or (name, chunks) == ("interleaved", 1):
            assert peak == tuple(min(m, stages - stage) for stage in range(stages))
        elif name == "zero_bubble":
            assert peak == (min(m, stages),) * stages
        elif name == "zero_bubble_v":
            assert max(peak) <= 2 * min(m, stages)
        elif m % stages == 0:  # Megatron's count, for whole groups of microbatches
            steady = [2 * (stages - 1 - stage) + (chunks - 1) * stages + 1 for stage in range(stages)]
            assert peak == tuple(min(chunks * m, count) for count in steady)


@pytest.mark.parametrize("name", ["1f1b", "zero_bubble", "zero_bubble_v", "interleaved"])
def test_memory_does_not_grow_with_microbatches(name):
    peaks = {make(name, 4, microbatches).peak_in_flight() for microbatches in (8, 32, 128)}
    assert len(peaks) == 1


def test_microbatches_go_in_order(family):
    """So that every mesh sums gradients and draws dropout in the same order."""
    for stages, m in [(1, 3), (3, 7), (4, 2), (4, 16)]:
        schedule = made(family[0], stages, m, family[1])
        seen = {}
        for _, stage, op in schedule.operations():
            seen.setdefault((op.kind, stage, op.chunk), []).append(op.microbatch)
        assert all(order == list(range(m)) for order in seen.values())
        assert len(seen) == len(KINDS_OF[family[0]]) * stages * family[1]


def test_placements():
    assert made("interleaved", 3, 3, 2).placement == ((0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1))
    assert made("zero_bubble_v", 3, 3).placement == ((0, 0), (1, 0), (2, 0), (2, 1), (1, 1), (0, 1))


@pytest.mark.parametrize("chunks", [1, 2, 3])
@pytest.mark.parametrize("v_shape", [False, True])
def test_forward_only(chunks, v_shape):
    chunks = 2 if v_shape else chunks
    for stages, m in SIZES:
        placement = v_placement(stages) if v_shape else looped_placement(stages, chunks)
        schedule = forward_only(stages, m, placement)
        arrived, count, orders = {(0, i) for i in range(m)}, 0, {}
        for row in schedule.table:
            sent = set()
            for stage, op in enumerate(row):
                if op is not None:
                    part = placement.index((stage, op.chunk))
                    assert op.kind == "F"
                    arrived.remove((part, op.microbatch))
                    sent.add((part + 1, op.microbatch))
                    orders.setdefault(part, []).append(op.microbatch)
                    count += 1
            arrived |= sent
        assert schedule.chunks == chunks
        assert count == stages * chunks * m
        assert all(order == list(range(m)) for order in orders.values())
        if (
            m >= stages
        ):  # the least that is possible: the last stage waits, and in a V its last result goes all the way back
            assert schedule.ticks == chunks * m + (stages - 1) * (2 if v_shape else 1)


def mutated(schedule: PipelineSchedule, cells: dict[tuple[int, int], Op | None]) -> PipelineSchedule:
    table = [list(row) for row in schedule.table]
    for (tick, stage), op in cells.items():
        table[tick][stage] = op
    return dataclasses.replace(schedule, table=tuple(map(tuple, table)))


@given(st.data())
def test_the_check_refuses_exactly_what_cannot_be_run(data):
    name, chunks = data.draw(st.sampled_from(FAMILIES))
    schedule = made(name, data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5)), chunks)
    cell = st.tuples(st.integers(0, schedule.ticks - 1), st.integers(0, schedule.stages - 1))
    for _ in range(data.draw(st.integers(1, 3))):  # exchange two cells of a stage, idle or not
        (one, stage), (other, _) = data.draw(cell), data.draw(cell)
        table = schedule.table
        schedule = mutated(schedule, {(one, stage): table[other][stage], (other, stage): table[one][stage]})
    try:
        replay(schedule, KINDS_OF[name])
        legal = True
    except AssertionError:
        legal = False
    if legal:
        check(schedule)
    else:
        with pytest.raises(ValueError, match=r"tick \d+, stage \d+: [FBW] of chunk"):
            check(schedule)


@given(st.data())
def test_a_changed_operation_is_refused(data):
    name, chunks = data.draw(st.sampled_from(FAMILIES))
    schedule = made(name, data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5)), chunks)
    tick, stage, op = data.draw(st.sampled_from(list(schedule.operations())))
    kinds = [kind for kind in "FBWX" if kind != op.kind]
    changes = [
        *(dataclasses.replace(op, kind=kind) for kind in kinds),
        dataclasses.replace(op, microbatch=op.microbatch + 1),
        dataclasses.replace(op, chunk=op.chunk - 1),
        dataclasses.replace(op, chunk=op.chunk + 1),
    ]
    if [other.kind for _, _, other in schedule.operations()].count("W") != 1 or op.kind != "W":
        changes.append(None)  # without its only W it would be a legal schedule that has none
    with pytest.raises(ValueError, match=rf"^{name}: "):
        check(mutated(schedule, {(tick, stage): data.draw(st.sampled_from(changes))}))


def test_refusals_say_where_and_what():
    good = make("1f1b", 2, 2)
    early = mutated(good, {(1, 1): None, (0, 1): Op("F", 0, 0)})
    message = (
        "tick 0, stage 1: F of chunk 0, microbatch 0 needs F of chunk 0, microbatch 0 of stage 0, which is at tick 0"
    )
    with pytest.raises(ValueError, match=f"{message}: it can be at tick 1 at the soonest"):
        check(early)
    with pytest.raises(
        ValueError, match=r"tick 0, stage 0: F of chunk 0, microbatch 0 is there, but stage 0 has no B of"
    ):
        check(mutated(good, {(3, 0): None}))
    with pytest.raises(ValueError, match=r"tick 3 has 1 entries for 2 stages"):
        check(dataclasses.replace(good, table=(*good.table[:3], (None,))))
    with pytest.raises(ValueError, match=r"does not hold each of 2 stages \* 1 chunks once"):
        check(dataclasses.replace(good, placement=((0, 0), (0, 0))))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("1f1b", 0, 4), "a pipeline of 0 stages is impossible"),
        (("1f1b", 4, -1), "a pipeline of -1 microbatches is impossible"),
        (("1f1b", 4, 4, 2), "1f1b cannot have chunks=2; use 1, or 0 to choose"),
        (("zero_bubble_v", 4, 4, 3), "zero_bubble_v cannot have chunks=3; use 2"),
        (("interleaved", 4, 4, -1), "interleaved cannot have chunks=-1; use 1 or more"),
        (("2f2b", 4, 4), "2f2b is unknown; use gpipe, 1f1b, interleaved, zero_bubble, zero_bubble_v or a path"),
    ],
)
def test_impossible_schedules_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make(*arguments)


def test_default_chunks():
    chunks = {name: make(name, 2, 2).chunks for name in DEFAULT_CHUNKS}
    assert chunks == {"gpipe": 1, "1f1b": 1, "interleaved": 2, "zero_bubble": 1, "zero_bubble_v": 2}


def test_no_array_library_is_imported():
    code = "import sys, parallel.pipeline.schedules as s; s.make('1f1b', 4, 8); "
    code += "sys.exit(bool({'jax', 'numpy'} & {*sys.modules}))"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3], check=True)


@pytest.mark.parametrize("stages", [2, 4])
def test_lockstep_costs_as_much_as_the_longest_operation_of_each_tick(stages):
    """Unit costs: every tick is 1 for a split schedule, so the share of empty cells is the bubble."""
    for name in DEFAULT_CHUNKS:
        schedule = make(name, stages, 8)
        cells = [op for row in schedule.table for op in row]
        if schedule.split:
            assert schedule.lockstep_bubble() == pytest.approx(cells.count(None) / len(cells))
        assert schedule.lockstep_bubble() >= schedule.bubble() - 1e-9
    assert make("gpipe", stages, 8).lockstep_bubble() == pytest.approx((stages - 1) / (8 + stages - 1))
