"""Requests for vectors: those that wait, and the steps that answer them. For the thread that owns the devices."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from inference.encoder import Encoder
from inference.requests import Encoded, EncodeRequest, Listener


@dataclass(frozen=True)
class Answered:
    """A request that is over."""

    request: EncodeRequest
    listener: Listener
    finish: str  # one of inference.requests.FINISHES
    answer: Encoded


@dataclass(frozen=True)
class EncodeStep:
    """What one step did."""

    begun: tuple[EncodeRequest, ...]
    answered: tuple[Answered, ...]
    tokens: int  # that it read
    error: Exception | None = None  # of a step that failed; what it had at work is answered with it


class Encodes(Protocol):
    """What the engine asks of whoever makes vectors."""

    running: int  # requests that are at work between two steps

    def __len__(self) -> int:
        """Requests that wait."""

    def add(self, request: EncodeRequest, listener: Listener) -> None:
        """Another one, behind those of its priority."""

    def step(self) -> EncodeStep | None:
        """The next step; None where there is nothing to do, or no room for it yet."""

    def remove(self, id: str) -> Listener | None:
        """Takes a request out; the listener of it, if it was there."""

    def all(self) -> Iterator[tuple[EncodeRequest, Listener]]:
        """Takes every request out."""


class EncodeQueue:
    """Requests in the order in which they came, those of low priority behind the others."""

    def __init__(self):
        self._waiting: deque[tuple[EncodeRequest, Listener]] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[tuple[EncodeRequest, Listener]]:
        return iter(self._waiting)

    def add(self, request: EncodeRequest, listener: Listener) -> None:
        """Behind the last of its priority."""
        at = len(self._waiting)
        while not request.low and at and self._waiting[at - 1][0].low:
            at -= 1
        self._waiting.insert(at, (request, listener))

    def remove(self, id: str) -> Listener | None:
        """Takes a request out; the listener of it, if it was there."""
        one = next((one for one in self._waiting if one[0].id == id), None)
        if one is None:
            return None
        self._waiting.remove(one)
        return one[1]

    def pop(self) -> tuple[EncodeRequest, Listener]:
        """The first one."""
        return self._waiting.popleft()


class Whole:
    """Encodes of a model that writes no text: each step answers requests from their first to their last token."""

    running = 0

    def __init__(self, encoder: Encoder | None):
        """None: of a model that has no vectors; nothing is ever added."""
        self._encoder, self._queue = encoder, EncodeQueue()

    def __len__(self) -> int:
        return len(self._queue)

    def add(self, request: EncodeRequest, listener: Listener) -> None:
        """As Encodes."""
        self._queue.add(request, listener)

    def remove(self, id: str) -> Listener | None:
        """As Encodes."""
        return self._queue.remove(id)

    def all(self) -> Iterator[tuple[EncodeRequest, Listener]]:
        """As Encodes."""
        while self._queue:
            yield self._queue.pop()

    def step(self) -> EncodeStep | None:
        """The first one, and those behind it that are padded to the same length, as many as a step takes."""
        if not self._queue:
            return None
        encoder = self._encoder
        length = encoder.bucket(len(next(iter(self._queue))[0].tokens))
        taken = [one for one in self._queue if encoder.bucket(len(one[0].tokens)) == length][: encoder.rows[-1]]
        for request, _ in taken:
            self._queue.remove(request.id)
        requests = tuple(request for request, _ in taken)
        try:
            vectors = encoder.run(requests)
        except Exception as error:
            return EncodeStep(requests, tuple(failed(one, error) for one in taken), 0, error)
        answered = tuple(done(one, vector) for one, vector in zip(taken, vectors, strict=True))
        return EncodeStep(requests, answered, sum(len(request.tokens) for request in requests))


def done(one: tuple[EncodeRequest, Listener], vector: np.ndarray) -> Answered:
    """A request with its vector, or with an error where that is none."""
    if not np.isfinite(vector).all():
        return Answered(*one, "error", Encoded(error="the model's numbers are not finite"))
    return Answered(*one, "stop", Encoded(tuple(vector.tolist())))


def failed(one: tuple[EncodeRequest, Listener], error: Exception) -> Answered:
    """A request whose step failed."""
    return Answered(*one, "error", Encoded(error=f"the step failed: {type(error).__name__}"))


def check_tokens(tokens: Sequence[int], reach: int, vocabulary: int) -> None:
    """Raises ValueError for a sequence that has no vector."""
    if not 1 <= len(tokens) <= reach:
        raise ValueError(f"a sequence of {len(tokens)} tokens: the model takes 1 to {reach}")
    if strange := [token for token in tokens if not 0 <= token < vocabulary]:
        raise ValueError(f"token {strange[0]} is outside of the vocabulary, 0 to {vocabulary - 1}")
