"""Who proposes the tokens that a step checks: a look-up in each sequence, or a smaller model beside the served one.

The smaller model has a cache of its own, in which the blocks of every sequence have the same numbers as in the other
one: the scheduler's books hold for both. What it has not read costs right proposals, and never a wrong text.
"""

import logging
from dataclasses import replace

import jax
import numpy as np

from inference.engine_options import EngineOptions
from inference.opening import Opened
from inference.scheduler import Batch, Row, Scheduler, Sequence
from inference.step import Programs

log = logging.getLogger("isomesh.inference")


class Proposals:
    """Sets the draft of every sequence that may have one. For the thread that owns the devices, but for its making."""

    def __init__(self, options: EngineOptions, opened: Opened, reach: int, draft: Opened | None):
        """Raises ValueError for a smaller model that does not fit the served one, or is not there or not asked for."""
        self._options, self._reach, self._draft, self._programs = options, reach, draft, None
        if (options.speculation == "draft") != (draft is not None):
            raise ValueError(
                f"speculation={options.speculation!r}: a smaller model and speculation='draft' go together"
            )
        if draft is not None:
            _check(opened, reach, draft)

    def warm_up(self, blocks: int) -> None:
        """Compiles the programs of the smaller model, if there is one."""
        if self._draft is not None:
            o = self._options
            self._programs = Programs(self._draft, o.max_running, blocks, o.block, self._reach, o.chunk, o.cache_dtype)
            self._draft = replace(self._draft, params={})
            self._programs.compile()

    def propose(self, scheduler: Scheduler) -> None:
        """Drafts for the sequences that would draw one token in the next step."""
        if self._options.speculation == "none":
            return
        wanted: dict[Sequence, int] = {}
        for sequence in scheduler.running:
            sequence.draft = []
            most = min(self._options.drafted, sequence.most - sequence.length - 1)
            ready = not (sequence.reads or sequence.pending) and sequence.owner.look_up is not None
            if ready and most > 0 and scheduler.reserve(sequence, sequence.length + most):
                wanted[sequence] = most
        if self._programs is not None:
            try:
                self._by_model(wanted)
            except Exception:
                self._fault()
            return
        for sequence, most in wanted.items():
            sequence.draft = sequence.owner.look_up.propose(sequence.tokens, most)

    def follow(self, batch: Batch) -> None:
        """The smaller model reads the parts of prompts that the served one reads."""
        if self._programs is not None and batch.kind != "decode":
            try:
                self._programs.run([replace(row, draws=False) for row in batch.rows], {})
            except Exception:
                self._fault()

    def empty(self) -> None:
        """An empty cache of the smaller model: its arrays may be gone with a step that failed."""
        if self._programs is not None:
            self._programs.empty()

    def _fault(self) -> None:
        """The smaller model failed: it has read nothing now, and the served one goes on without it in this step."""
        log.exception("a step of the smaller model failed")
        self.empty()

    def _by_model(self, wanted: dict[Sequence, int]) -> None:
        """A token more for every sequence in each turn; the last turn only writes the last token into the cache."""
        newest = {sequence: sequence.tokens[-1] for sequence in wanted}
        for turn in range(max(wanted.values(), default=-1) + 1):
            rows = [
                Row(sequence, sequence.length - 1 + turn, 1, False, sequence.epoch, (newest[sequence],))
                for sequence, most in wanted.items()
                if turn <= most
            ]
            drawn = np.asarray(jax.device_get(self._programs.run(rows, {}).tokens_B)).tolist()
            for row, token in zip(rows, drawn, strict=False):
                newest[row.sequence] = token
                if turn < wanted[row.sequence]:
                    row.sequence.draft.append(token)


def _check(opened: Opened, reach: int, draft: Opened) -> None:
    """Raises ValueError where one cannot propose for the other."""
    ours, theirs = draft.config.model, opened.config.model
    if draft.tokenizer.digest != opened.tokenizer.digest or ours.vocab_size != theirs.vocab_size:
        raise ValueError(f"the smaller model {draft.path} has another tokenizer than {opened.path}")
    if not ours.causal:
        raise ValueError(f"the smaller model {draft.path} is an encoder")
    length = ours.max_positions
    if ours.positions == "learned" and length < reach:
        raise ValueError(
            f"the smaller model {draft.path} has {length} positions, fewer than {reach}: set max_length={length}"
        )
