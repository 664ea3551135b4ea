"""Who runs: in the order of arrival, by parts, with blocks of their own, and every sequence to its end."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference.cache import Blocks
from inference.scheduler import Batch, Scheduler, Sequence

SIZE = 4  # tokens of a block


def next_token(tokens: list[int]) -> int:
    """What the model of these tests says: it depends on all tokens before."""
    return (sum(tokens) * 31 + len(tokens)) % 1000


class Machine:
    """A cache whose entries remember for which tokens they were computed, and checks every step against it."""

    def __init__(self, scheduler: Scheduler):
        self.scheduler, self.entries, self.order = scheduler, {}, []

    def step(self) -> Batch | None:
        batch = self.scheduler.plan()
        if batch is None:
            return None
        self.order += batch.begun
        writes = {}
        for row in batch.rows:
            sequence = row.sequence
            for position in range(row.start, row.start + row.count):
                entry = (sequence.blocks[position // SIZE], position % SIZE)
                assert entry not in writes, "two rows write to one place"
                writes[entry] = sequence.tokens[: position + 1]
        readers = {
            block: s for s in self.scheduler.running for block in s.blocks
            if self.scheduler.blocks._held[block] > 1
        }  # fmt: skip
        assert not {block for block, _ in writes} & set(readers), "a shared block is written"
        self.entries |= writes
        for row in batch.rows:
            sequence = row.sequence
            for position in range(row.start + row.count):
                entry = (sequence.blocks[position // SIZE], position % SIZE)
                assert self.entries[entry] == sequence.tokens[: position + 1], "the cache holds what another wrote"
            if row.draws:
                self.scheduler.drew(row, [next_token(sequence.tokens)])
                if sequence.length >= sequence.most:
                    self.scheduler.end(sequence)
        return batch


def expected(prompt: list[int], most: int) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < most:
        tokens.append(next_token(tokens))
    return tokens


REQUESTS = st.lists(
    st.tuples(
        st.lists(st.integers(0, 1), min_size=1, max_size=20),  # prompts of two tokens: many begin alike
        st.integers(1, 16),  # new tokens
        st.integers(0, 6),  # steps after the one before
        st.none() | st.integers(0, 12),  # steps until its client goes away
    ),
    min_size=1,
    max_size=10,
)


@settings(deadline=None, max_examples=150)
@given(REQUESTS, st.integers(1, 4), st.integers(1, 12), st.integers(9, 20), st.booleans(), st.integers(1, 3))
def test_every_sequence_gets_its_text_and_nothing_is_lost(requests, slots, chunk, count, sharing, read_rows):
    scheduler = Scheduler(Blocks(count, SIZE, sharing), slots, chunk, read_rows)
    machine, added, leaving = Machine(scheduler), [], {}
    coming = list(requests)
    wait, steps = 0, 0
    while coming or scheduler.waiting or scheduler.running:
        while coming and wait <= 0:
            prompt, new, wait, leaves = coming.pop(0)
            sequence = Sequence(list(prompt), len(prompt) + new)
            scheduler.add(sequence)
            added.append((sequence, prompt))
            if leaves is not None:
                leaving[sequence] = steps + leaves
        batch = machine.step()
        wait -= 1
        steps += 1
        for sequence, step in list(leaving.items()):
            if steps >= step:
                scheduler.end(sequence)
                del leaving[sequence]
        assert len(scheduler.running) <= slots
        assert len({s.slot for s in scheduler.running}) == len(scheduler.running)
        if batch is not None:
            assert batch.rows
            assert sum(row.count for row in batch.rows if batch.kind != "decode") <= chunk
        assert steps < 5000, "it does not end"
    assert scheduler.blocks.available == count, "blocks are lost"
    for sequence, prompt in added:
        whole = expected(prompt, sequence.most)
        assert sequence.tokens == whole[: len(sequence.tokens)]
    first = list(dict.fromkeys(machine.order))
    assert first == sorted(first, key=lambda s: s.arrival), "somebody who came later began before"


def run_to_end(machine: Machine) -> list[Batch]:
    batches = []
    while (batch := machine.step()) is not None:
        batches.append(batch)
    return batches


def test_a_long_prompt_delays_others_by_a_part_only():
    scheduler = Scheduler(Blocks(100, SIZE), 4, 8)
    machine = Machine(scheduler)
    short = Sequence([1, 2], 22)
    scheduler.add(short)
    machine.step()
    scheduler.add(Sequence([7] * 100, 110))
    kinds = [batch.kind for batch in run_to_end(machine)]
    assert "read read" not in " ".join(kinds[: 2 * 12])
    assert short.ended


def test_equal_prompts_are_computed_once():
    scheduler = Scheduler(Blocks(100, SIZE), 4, 64)
    first = Sequence([5] * 18, 22)
    others = [Sequence([5] * 18, 22, after=first) for _ in range(2)]
    for sequence in (first, *others):
        scheduler.add(sequence)
    batches = run_to_end(Machine(scheduler))
    read = {s: sum(r.count for b in batches for r in b.rows if r.sequence is s) for s in (first, *others)}
    assert read[first] == 18 + 3
    assert all(read[s] == 18 - 16 + 3 and s.cached == 16 for s in others)


def test_the_last_come_gives_way():
    scheduler = Scheduler(Blocks(7, SIZE), 2, 64)
    first, last = Sequence([1] * 8, 24), Sequence([2] * 8, 20)
    scheduler.add(first)
    scheduler.add(last)
    batches = run_to_end(Machine(scheduler))
    assert {s for batch in batches for s in batch.preempted} == {last}
    assert (first.tokens, last.tokens) == (expected([1] * 8, 24), expected([2] * 8, 20))


def test_what_was_proposed_to_a_sequence_is_void_when_it_loses_its_place():
    scheduler = Scheduler(Blocks(10, SIZE), 1, 64)
    machine, sequence = Machine(scheduler), Sequence([1] * 6, 12)
    scheduler.add(sequence)
    machine.step()
    sequence.draft = [3, 4]
    scheduler.preempt(sequence)
    rows = [row for batch in run_to_end(machine) for row in batch.rows]
    assert not any(row.drafted for row in rows)
    assert sequence.tokens == expected([1] * 6, 12)


@pytest.mark.parametrize("where", ["waiting", "running"])
def test_what_ends_gives_back_all_it_had(where):
    scheduler = Scheduler(Blocks(10, SIZE), 1, 64)
    running, waiting = Sequence([1] * 8, 24), Sequence([2] * 8, 20)
    scheduler.add(running)
    scheduler.add(waiting)
    row = scheduler.plan().rows[0]
    scheduler.end(running if where == "running" else waiting)
    assert row.valid == (where == "waiting")
    scheduler.end(running)
    assert scheduler.blocks.available == 10
