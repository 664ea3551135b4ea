"""Where the values of a pipeline wait: each message and each kept activation gets a slot, worked out from the schedule.

In a tick a stage does one operation. What it reads and writes lies in four pools, arrays of slots on each stage:

    pool           written by                                     read by
    messages       the operation of a neighbour, when it sends    the next operation on that microbatch, as its x or dy
    kept_input     forward: what the input's gradient needs       backward
    kept_weight    forward: what the weights' gradients need      backward, and weight
    held           backward: what it leaves                       weight

A slot is free again as soon as its value has been read for the last time, so that the number of slots, the memory of a
schedule, is its peak and not the number of microbatches. The interpreter (parallel/pipeline/run.py) reads the outcome
as constant arrays: a row for each tick. No JAX here.
"""

import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from parallel.pipeline.schedules import BACKWARD, FORWARD, WEIGHT, PipelineSchedule

NOWHERE = 0  # the message slot that is written when there is nothing to write
IDLE, OPS = 0, {FORWARD: 1, BACKWARD: 2, WEIGHT: 3}
AT_MOST_ONCE = "at_most_once"  # in the names of the loops that run an operation or none (parallel/pipeline/run.py)
Pattern = tuple[tuple[tuple[int, int], ...], ...]  # rounds of (sender, receiver); in a round a stage receives once


class StageRows(NamedTuple):
    """What each stage does in each tick: int32 arrays (tick, stage), for the interpreter one stage's scalars."""

    op: np.ndarray  # IDLE or one of OPS
    chunk: np.ndarray
    microbatch: np.ndarray
    first: np.ndarray  # bool: a forward of the first virtual stage, which reads the embedding
    source: np.ndarray  # message slot that the operation reads
    kept_input: np.ndarray  # slot of what the backward phase needs
    kept_weight: np.ndarray  # slot of what the weight phase needs
    held: np.ndarray  # slot of what the backward phase leaves to the weight phase
    deposit: np.ndarray  # message slot of the output, when the next virtual stage is on the same stage
    loss_deposit: np.ndarray  # message slot of the loss's cotangent
    received: np.ndarray  # (tick, stage, round): message slot of what arrives


class TickRows(NamedTuple):
    """What all stages do together in each tick: int32 arrays (tick,)."""

    embed: np.ndarray  # microbatch that all stages embed, or -1; likewise the next two
    loss: np.ndarray
    embed_gradient: np.ndarray
    pattern: np.ndarray  # index into the patterns: who sends to whom


@dataclass(frozen=True)
class Buffers:
    """The rows of a schedule, and the sizes of the pools that their slots index."""

    stages: StageRows
    ticks: TickRows
    patterns: list[Pattern]
    messages: int  # slots of each pool, NOWHERE counted
    kept_input: int
    kept_weight: int
    held: int


def _rounds(pairs: Iterable[tuple[int, int]]) -> Pattern:
    """The sends of a tick, dealt into rounds in each of which every stage receives at most one message."""
    rounds: list[list[tuple[int, int]]] = []
    for pair in sorted(pairs):
        free = next((r for r in rounds if all(pair[1] != receiver for _, receiver in r)), None)
        rounds.append([pair]) if free is None else free.append(pair)
    return tuple(tuple(r) for r in rounds)


def _color(intervals: list[tuple[int, int, tuple]], first_slot: int) -> tuple[dict[tuple, int], int]:
    """The lowest free slot for each (begin, end, name), both ticks included, and how many slots were needed."""
    slots, free, busy, top = {}, [], [], first_slot
    for begin, end, name in sorted(intervals):
        while busy and busy[0][0] < begin:
            heapq.heappush(free, heapq.heappop(busy)[1])
        slot = heapq.heappop(free) if free else top
        top = max(top, slot + 1)
        heapq.heappush(busy, (end, slot))
        slots[name] = slot
    return slots, top


def _slots(schedule: PipelineSchedule, when: dict[tuple[str, int, int], int]) -> tuple[dict[str, dict], dict[str, int]]:
    """The slot of each value in its pool, and the pools' sizes; `when` is the tick of (kind, virtual, microbatch)."""
    placement, stages, last = schedule.placement, schedule.stages, len(schedule.placement) - 1
    # what waits, stage by stage, as (begin, end, name): a message from the tick after it was sent
    waiting = {pool: [[] for _ in range(stages)] for pool in ("messages", "kept_input", "kept_weight", "held")}
    for (kind, v, m), tick in when.items():
        stage = placement[v][0]
        if kind == FORWARD and v > 0:
            waiting["messages"][stage].append((when[FORWARD, v - 1, m] + 1, tick, (FORWARD, v, m)))
        if kind == BACKWARD:
            sender = (FORWARD, v, m) if v == last else (BACKWARD, v + 1, m)
            waiting["messages"][stage].append((when[sender] + 1, tick, (BACKWARD, v, m)))
            done = when.get((WEIGHT, v, m), tick)
            begin = when[FORWARD, v, m]
            waiting["kept_input"][stage].append((begin, tick, (v, m)))
            waiting["kept_weight"][stage].append((begin, done, (v, m)))
            waiting["held"][stage].append((tick, done, (v, m)))
    slots, sizes = {}, {}
    for pool, by_stage in waiting.items():
        colored = [_color(intervals, 1 if pool == "messages" else 0) for intervals in by_stage]
        slots[pool] = {name: slot for names, _ in colored for name, slot in names.items()}
        sizes[pool] = max(1, *(top for _, top in colored))
    return slots, sizes


def allocate(schedule: PipelineSchedule) -> Buffers:
    """The buffers of a schedule: slots are reused as soon as their value has been read for the last time."""
    placement, stages, last = schedule.placement, schedule.stages, len(schedule.placement) - 1
    virtual = {place: v for v, place in enumerate(placement)}
    when = {
        (op.kind, virtual[stage, op.chunk], op.microbatch): tick
        for tick, row in enumerate(schedule.table)
        for stage, op in enumerate(row)
        if op is not None
    }
    trained = any(kind == BACKWARD for kind, _, _ in when)
    slots, sizes = _slots(schedule, when)
    ticks = len(schedule.table)
    by_stage = lambda dtype=np.int32: np.zeros((ticks, stages), dtype)
    by_tick = lambda: np.full((ticks,), -1, np.int32)
    rows = {name: by_stage() for name in StageRows._fields if name not in ("first", "received")}
    rows["first"] = by_stage(bool)
    together = {name: by_tick() for name in ("embed", "loss", "embed_gradient")}
    sends: list[list[tuple[int, int]]] = [[] for _ in range(ticks)]
    arriving: dict[tuple[int, int, int], int] = {}  # (tick, sender, receiver): message slot
    for (kind, v, m), tick in when.items():
        (stage, chunk), at = placement[v], (tick, placement[v][0])
        rows["op"][at], rows["chunk"][at], rows["microbatch"][at] = OPS[kind], chunk, m
        rows["kept_input"][at] = slots["kept_input"].get((v, m), 0)
        rows["kept_weight"][at] = slots["kept_weight"].get((v, m), 0)
        rows["held"][at] = slots["held"].get((v, m), 0)
        if kind == WEIGHT:
            continue
        rows["source"][at] = slots["messages"].get((kind, v, m), NOWHERE)
        if kind == FORWARD and v == 0:
            rows["first"][at], together["embed"][tick] = True, m
        if kind == FORWARD and v == last:
            together["loss"][tick] = m
            rows["loss_deposit"][at] = slots["messages"][BACKWARD, v, m] if trained else NOWHERE
        if kind == BACKWARD and v == 0:
            together["embed_gradient"][tick] = m
        after = v + 1 if kind == FORWARD else v - 1
        if 0 <= after <= last:
            receiver, slot = placement[after][0], slots["messages"][kind, after, m]
            if receiver == stage:
                rows["deposit"][at] = slot
            else:
                sends[tick].append((stage, receiver))
                arriving[tick, stage, receiver] = slot
    sent = [_rounds(pairs) for pairs in sends]
    patterns = sorted(set(sent), key=lambda p: (len(p), p))
    received = np.full((ticks, stages, max(len(p) for p in patterns)), NOWHERE, np.int32)
    for tick, pattern in enumerate(sent):
        for i, pairs in enumerate(pattern):
            for sender, receiver in pairs:
                received[tick, receiver, i] = arriving[tick, sender, receiver]
    index = np.array([patterns.index(p) for p in sent], np.int32)
    return Buffers(StageRows(received=received, **rows), TickRows(pattern=index, **together), patterns, **sizes)
