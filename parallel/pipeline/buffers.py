"""Where the values of a pipeline wait: each message and each kept activation gets a slot, worked out from the table.

The interpreter (parallel/pipeline/run.py) reads the outcome as constant tables, and how many slots there are is how
much memory a schedule needs. No JAX here.
"""

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from parallel.pipeline.schedules import BACKWARD, FORWARD, WEIGHT, PipelineSchedule

NOWHERE = 0  # the message slot that is written when there is nothing to write
IDLE, OPS = 0, {FORWARD: 1, BACKWARD: 2, WEIGHT: 3}
AT_MOST_ONCE = "at_most_once"  # in the names of the loops that run an operation or none (parallel/pipeline/run.py)
Pattern = tuple[tuple[tuple[int, int], ...], ...]  # rounds of (sender, receiver); in a round a stage receives once


@dataclass
class Buffers:
    """Tables over (tick, stage), int32, and the sizes of the pools that their slots index."""

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
    embed: np.ndarray  # (tick,): microbatch that all stages embed together, or -1; likewise the next two
    loss: np.ndarray
    embed_gradient: np.ndarray
    pattern: np.ndarray  # (tick,): index into `patterns`
    patterns: list[Pattern] = field(default_factory=list)
    messages: int = 1  # slots of each pool, NOWHERE counted
    kept_input_slots: int = 1
    kept_weight_slots: int = 1
    held_slots: int = 1


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
    table = lambda fill=0: np.full((ticks, stages), fill, np.int32)
    line = lambda: np.full((ticks,), -1, np.int32)
    b = Buffers(*(table() for _ in range(10)), None, *(line() for _ in range(4)))
    b.first = b.first.astype(bool)
    sends: list[list[tuple[int, int]]] = [[] for _ in range(ticks)]
    arriving: dict[tuple[int, int, int], int] = {}  # (tick, sender, receiver): message slot
    for (kind, v, m), tick in when.items():
        (stage, chunk), at = placement[v], (tick, placement[v][0])
        b.op[at], b.chunk[at], b.microbatch[at] = OPS[kind], chunk, m
        b.kept_input[at] = slots["kept_input"].get((v, m), 0)
        b.kept_weight[at] = slots["kept_weight"].get((v, m), 0)
        b.held[at] = slots["held"].get((v, m), 0)
        if kind == WEIGHT:
            continue
        b.source[at] = slots["messages"].get((kind, v, m), NOWHERE)
        if kind == FORWARD and v == 0:
            b.first[at], b.embed[tick] = True, m
        if kind == FORWARD and v == last:
            b.loss[tick] = m
            b.loss_deposit[at] = slots["messages"][BACKWARD, v, m] if trained else NOWHERE
        if kind == BACKWARD and v == 0:
            b.embed_gradient[tick] = m
        after = v + 1 if kind == FORWARD else v - 1
        if 0 <= after <= last:
            receiver, slot = placement[after][0], slots["messages"][kind, after, m]
            if receiver == stage:
                b.deposit[at] = slot
            else:
                sends[tick].append((stage, receiver))
                arriving[tick, stage, receiver] = slot
    by_tick = [_rounds(pairs) for pairs in sends]
    b.patterns = sorted(set(by_tick), key=lambda p: (len(p), p))
    b.pattern = np.array([b.patterns.index(p) for p in by_tick], np.int32)
    b.received = np.full((ticks, stages, max(len(p) for p in b.patterns)), NOWHERE, np.int32)
    for tick, pattern in enumerate(by_tick):
        for i, pairs in enumerate(pattern):
            for sender, receiver in pairs:
                b.received[tick, receiver, i] = arriving[tick, sender, receiver]
    b.messages, b.held_slots = sizes["messages"], sizes["held"]
    b.kept_input_slots, b.kept_weight_slots = sizes["kept_input"], sizes["kept_weight"]
    return b
