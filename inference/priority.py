"""Sequences of low priority: they begin behind all others, and give up their places where one of those finds none.

What gives way computes its prompt and text again later, so that its text does not change.
"""

from inference.scheduler import Scheduler, Sequence

BEHIND = 1 << 60  # added to the arrival of a sequence: whatever comes later begins first


def put_behind(sequence: Sequence) -> None:
    """Gives a sequence that was not yet added to a scheduler low priority."""
    sequence.arrival += BEHIND


def make_way(scheduler: Scheduler, slots: int) -> int:
    """Takes the places that the first of those that wait needs from sequences of low priority; returns how many."""
    first, taken = next(iter(scheduler.waiting), None), 0
    while first is not None and first.arrival < BEHIND and scheduler.running:
        last, blocks = scheduler.running[-1], scheduler.blocks
        needed = blocks.blocks_for(len(first.tokens) + 1) + len(scheduler.running)
        if last.arrival < BEHIND or (len(scheduler.running) < slots and needed <= blocks.available):
            break
        scheduler.preempt(last)
        taken += 1
    return taken
