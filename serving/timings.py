"""When each request waited, was read and was written: the engine's observer, for metrics and traces.

The engine's thread alone writes here; the event loop reads what is known of a request once its answer is complete.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from serving.watch import LINE

First = Callable[[float], None]  # seconds from the queue to a request's first token
Gap = Callable[[float, int], None]  # seconds between two tokens of a text, and how many tokens came so
Step = Callable[[str, float, int], None]  # read | score | decode, seconds, tokens


@dataclass(slots=True)
class Timing:
    """A request to the engine, in seconds of time.monotonic(); None for what has not happened."""

    queued: float
    began: float | None = None  # its first choice ran
    first: float | None = None  # it had its first token
    ended: float | None = None  # its last choice so far ended
    cached_tokens: int = 0
    decoding: int = 0  # choices that have a first token and have not ended


class Timings:
    """What `engine.observer` is set to. The functions are called in the engine's thread, and must not wait."""

    def __init__(self, first: First, gap: Gap, step: Step, clock: Callable[[], float] = time.monotonic):
        self._first, self._gap, self._step, self._clock = first, gap, step, clock
        self._open: dict[str, Timing] = {}
        self._taken: deque[str] = deque()  # ids that nobody asks for any more
        self._late: set[str] = set()  # of these, those that the engine has yet to find in its inbox
        self._rows = 0  # choices that the next decode step brings tokens to
        self._left = 0  # of these, how many have ended since the last one
        self._fresh: list[float] = []  # when choices got their first token, since the last decode step
        self._decoded: float | None = None  # the end of the last decode step

    # ---------------------------------------------------------------------------------------- in the engine's thread

    def queued(self, id: str) -> None:
        """As inference.choice.Observer."""
        self._forget()
        if id in self._late:
            self._late.remove(id)
        else:
            self._open[id] = Timing(self._clock())

    def began(self, id: str, cached_tokens: int) -> None:
        """As inference.choice.Observer."""
        if (timing := self._open.get(id)) is not None and timing.began is None:
            timing.began, timing.cached_tokens = self._clock(), cached_tokens

    def first_token(self, id: str) -> None:
        """As inference.choice.Observer."""
        if (timing := self._open.get(id)) is not None:
            now = self._clock()
            if timing.first is None:
                timing.first = now
                if not id.startswith(LINE):  # lines of batches wait by intent
                    self._first(now - timing.queued)
            timing.decoding += 1
            self._rows += 1
            self._fresh.append(now)

    def finished(self, id: str, finish: str) -> None:
        """As inference.choice.Observer."""
        if (timing := self._open.get(id)) is not None:
            timing.ended = self._clock()
            if timing.decoding:
                timing.decoding -= 1
                self._left += 1

    def stepped(self, kind: str, seconds: float, tokens: int) -> None:
        """As inference.choice.Observer; a decode step brings at least a token to each choice that has its first."""
        self._step(kind, seconds, tokens)
        if kind != "decode":
            return
        now = self._clock()
        fresh, older = self._fresh[-self._rows :] if self._rows else [], self._rows - len(self._fresh)
        # with speculation several tokens of a text come at once: they share the time since the one before them
        each = tokens / self._rows if tokens > self._rows > 0 else 1.0
        if older > 0 and self._decoded is not None:
            self._gap((now - self._decoded) / each, round(older * each))
        for began in fresh:
            self._gap((now - began) / each, round(each))
        self._rows, self._left, self._fresh, self._decoded = max(0, self._rows - self._left), 0, [], now

    def _forget(self) -> None:
        while self._taken:
            timing = self._open.pop(id := self._taken.popleft(), None)
            if timing is None:
                self._late.add(id)
            else:
                self._left += timing.decoding  # ended by its client, which has not waited for the engine

    # --------------------------------------------------------------------------------------------- in the event loop

    def take(self, id: str, parts: int) -> list[Timing]:
        """Of an HTTP request, whose answer is complete and of which the engine has taken so many parts; once.

        A part that is still in the engine's inbox has none, as of a request that was ended at once.
        """
        names = [f"{id}-{number}" for number in range(parts)]
        found = [timing for name in names if (timing := self._open.get(name)) is not None]
        self._taken.extend(names)
        return found
