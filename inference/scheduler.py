"""Who runs in the next step. No JAX here: sequences go in, rows of tokens to be computed come out.

1. Whoever came first begins first. A sequence begins when a slot is free and the cache has room for its tokens; one
   that does not fit yet holds back those behind it.
2. Steps alternate, where there is work of both kinds: one reads the next parts of prompts, of at most `chunk` tokens
   together, the first that began first; the other gives every sequence that has read its own a token more. So a long
   prompt delays the others by a chunk and not by its length.
3. Where a sequence needs a block and none is left, the one that came last gives up its blocks. It goes back to its
   place in the queue, and later computes prompt and text so far again: its text does not change.
"""

import sys
from bisect import insort
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from inference.cache import Blocks

_arrivals = count()


@dataclass(eq=False)
class Sequence:
    """Tokens that grow by one a step, and what of them is computed."""

    tokens: list[int]  # of the prompt, then of the text as far as it is known
    most: int  # tokens to be reached
    shares: bool = True  # whether blocks that others computed may be read
    scored: bool = False  # whether the tokens of the prompt get log-probabilities while they are read
    waits: bool = False  # whether each token has to be known before the next one is drawn
    place: int = 0  # of its adapter; 0: none
    salt: bytes = b""  # of the names of its blocks
    after: "Sequence | None" = None  # whose prompt, the same one, is computed first
    arrival: int = field(default_factory=_arrivals.__next__)
    prompt: int = 0  # tokens of the prompt
    slot: int = -1  # while it runs
    blocks: list[int] = field(default_factory=list)
    names: list[bytes] = field(default_factory=list)  # of full blocks
    named: int = 0  # of its blocks, the first ones
    computed: int = 0  # tokens whose keys and values are in the cache, or will be after the steps begun
    pending: int = 0  # tokens drawn by steps whose results were not read yet
    cached: int = 0  # tokens that were found in the cache when it began last
    epoch: int = 0  # results of steps of another epoch are void
    draft: list[int] = field(default_factory=list)  # tokens that are proposed to follow
    ended: bool = False
    owner: Any = None  # whoever the results are for

    def __post_init__(self):
        self.prompt = len(self.tokens)

    @property
    def length(self) -> int:
        """Tokens that exist, known or not."""
        return len(self.tokens) + self.pending

    @property
    def reads(self) -> bool:
        """Whether there is more to compute than the newest token."""
        return self.computed < self.length - 1


@dataclass(frozen=True)
class Row:
    """`count` tokens of a sequence from `start` on are computed; `draws` one more, if they are the last."""

    sequence: Sequence
    start: int
    count: int
    draws: bool
    epoch: int
    drafted: tuple[int, ...] = ()  # the last of the tokens, which are proposals

    @property
    def valid(self) -> bool:
        """Whether the sequence still waits for the results."""
        return self.sequence.epoch == self.epoch and not self.sequence.ended


@dataclass(frozen=True)
class Batch:
    """The rows of one step, and the sequences that began or lost their place before it."""

    kind: str  # read | score (reads, for log-probabilities) | decode
    rows: tuple[Row, ...]
    begun: tuple[Sequence, ...] = ()
    preempted: tuple[Sequence, ...] = ()


class Scheduler:
    """The queue, the sequences that run, and their blocks."""

    def __init__(self, blocks: Blocks, slots: int, chunk: int, read_rows: int = 1, alike: int = sys.maxsize):
        """Blocks of sequences of up to `alike` tokens depend on the tokens before them alone: these are shared."""
        self.blocks, self.chunk, self.read_rows, self.alike = blocks, chunk, read_rows, alike
        self.waiting: list[Sequence] = []  # by arrival
        self.running: list[Sequence] = []  # by arrival
        self._slots = list(range(slots))[::-1]
        self._decoded_last = True

    def add(self, sequence: Sequence) -> None:
        """To the queue, at the place of its arrival."""
        insort(self.waiting, sequence, key=lambda s: s.arrival)

    def end(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is."""
        if sequence in self.running:
            self._stop(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        sequence.ended = True

    def preempt(self, sequence: Sequence) -> None:
        """Takes a running sequence's blocks and slot, and puts it back into the queue."""
        self._stop(sequence)
        self.add(sequence)

    def plan(self) -> Batch | None:
        """The next step, whose rows count as computed from now on; None where there is nothing to do."""
        begun, preempted = self._begin(), []
        reading = any(s.reads for s in self.running)
        if not (reading and self._decoded_last):
            rows = self._decodes(preempted)
            if rows:
                self._decoded_last = True
                return self._batch("decode", rows, begun, preempted)
        self._decoded_last = False
        rows = self._reads()
        kind = "score" if rows and rows[0].sequence.scored else "read"
        return self._batch(kind, rows, begun, preempted) if rows or begun or preempted else None

    def drew(self, row: Row, tokens: list[int]) -> None:
        """The tokens that a step drew for a row become known."""
        sequence = row.sequence
        sequence.pending -= 1
        sequence.tokens += tokens
        sequence.computed += len(tokens) - 1
        self._name_full(sequence)

    def grew(self, sequence: Sequence, token: int) -> None:
        """A proposal was right: its keys and values are in the cache, and the token after it is known."""
        sequence.tokens.append(token)
        sequence.computed += 1
        self._name_full(sequence)

    def reserve(self, sequence: Sequence, tokens: int) -> bool:
        """Gives a running sequence blocks for so many tokens, if there are free ones."""
        needed = self.blocks.blocks_for(tokens) - len(sequence.blocks)
        if needed > 0 and (taken := self.blocks.take(needed)) is not None:
            sequence.blocks += taken
            needed = 0
        return needed <= 0

    # ---- beginning ----

    def _begin(self) -> list[Sequence]:
        begun = []
        while self.waiting and self._slots and self._fits(self.waiting[0]):
            sequence = self.waiting.pop(0)
            sequence.slot = self._slots.pop()
            insort(self.running, sequence, key=lambda s: s.arrival)
            begun.append(sequence)
        return begun

    def _fits(self, sequence: Sequence) -> bool:
        """Gives a sequence the blocks of its tokens, if that leaves one for each that runs already."""
        first = sequence.after
        if first is not None and not first.ended and first.computed < first.prompt - 1:
            return False
        blocks, tokens = self.blocks, sequence.tokens
        sequence.names = blocks.names(tokens, sequence.names, sequence.salt)
        # one token at least is computed, so that there are logits after the last
        reusable = sequence.names[: (len(tokens) - 1) // blocks.size]
        found = blocks.find(reusable) if sequence.shares and sequence.prompt <= self.alike else []
        blocks.hold(found)
        needed = blocks.blocks_for(len(tokens) + 1) - len(found)
        fits = needed + len(self.running) <= blocks.available or (not self.running and needed <= blocks.available)
        if not fits:
            blocks.release(found)
            return False
        sequence.blocks = found + blocks.take(needed)
        sequence.computed = sequence.cached = len(found) * blocks.size
        return True

    def _stop(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.blocks.release(sequence.blocks)
        self._slots.append(sequence.slot)
        sequence.blocks, sequence.draft, sequence.slot = [], [], -1
        sequence.computed = sequence.pending = sequence.named = 0
        sequence.epoch += 1

    # ---- rows ----

    def _reads(self) -> list[Row]:
        """The next parts of prompts, of the sequences that began first."""
        reading = [sequence for sequence in self.running if sequence.reads]
        rows, left = [], self.chunk
        for sequence in reading:
            if left and len(rows) < self.read_rows and sequence.scored == reading[0].scored:
                # the last token gets no score: nothing follows it, and it draws in a step of its own
                count = min(left, sequence.length - sequence.computed - sequence.scored)
                rows.append(self._row(sequence, count))
                left -= count
        return rows

    def _decodes(self, preempted: list[Sequence]) -> list[Row]:
        """A token for each sequence that has read its own; the first come takes blocks from the last come."""
        rows = []
        for sequence in list(self.running):
            if sequence.slot < 0 or sequence.reads or sequence.length >= sequence.most:
                continue
            if sequence.waits and sequence.pending:
                continue
            if self._has_room(sequence, preempted):
                rows.append(self._row(sequence, 1 + len(sequence.draft)))
        return rows

    def _has_room(self, sequence: Sequence, preempted: list[Sequence]) -> bool:
        """Whether the sequence has blocks for its next tokens; others may lose theirs, or it itself its own."""
        while True:
            needed = self.blocks.blocks_for(sequence.computed + 1 + len(sequence.draft)) - len(sequence.blocks)
            if needed <= 0:
                return True
            if (taken := self.blocks.take(needed)) is not None:
                sequence.blocks += taken
                return True
            if sequence.draft:
                sequence.draft = []
                continue
            last = self.running[-1]
            self.preempt(last)
            preempted.append(last)
            if last is sequence:
                return False

    def _row(self, sequence: Sequence, count: int) -> Row:
        start, drafted = sequence.computed, tuple(sequence.draft)
        draws = start + count - len(drafted) == sequence.length
        sequence.computed += count - len(drafted)
        sequence.pending += draws
        sequence.draft = []
        return Row(sequence, start, count, draws, sequence.epoch, drafted)

    def _batch(self, kind: str, rows: list[Row], begun, preempted) -> Batch:
        for row in rows:
            self._name_full(row.sequence)
        return Batch(kind, tuple(rows), tuple(begun), tuple(preempted))

    def _name_full(self, sequence: Sequence) -> None:
        """Names the blocks that are full of known tokens by now."""
        full = min(sequence.computed, len(sequence.tokens)) // self.blocks.size
        if full > len(sequence.names):
            known = sequence.tokens[: full * self.blocks.size]
            sequence.names = self.blocks.names(known, sequence.names, sequence.salt)
        alike = self.alike // self.blocks.size if sequence.prompt <= self.alike else 0
        for index in range(sequence.named, min(full, alike)):
            self.blocks.name(sequence.blocks[index], sequence.names[index])
        sequence.named = max(full, sequence.named)
