"""Requests that are with the engine, and how its pieces come from its thread into the event loop."""

import asyncio
import contextlib
import time
from collections import deque
from dataclasses import dataclass, field

from inference.requests import Encoded, Listener, Piece


class Answers:
    """What an engine says to the parts of one HTTP request, in order. Listeners are for its thread, the rest is not."""

    def __init__(self):
        self._loop = asyncio.get_running_loop()
        self._said: deque[tuple[int, Piece | Encoded]] = deque()
        self._more = asyncio.Event()
        self._told = False  # that there is more, and the loop has not looked yet

    def listener(self, part: int) -> Listener:
        """Takes the pieces of one part; never waits."""

        def take(piece: Piece | Encoded) -> None:
            self._said.append((part, piece))
            if not self._told:
                self._told = True
                with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                    self._loop.call_soon_threadsafe(self._wake)

        return take

    def _wake(self) -> None:
        self._told = False
        self._more.set()

    async def next(self) -> tuple[int, Piece | Encoded]:
        """The next piece, with the part that it belongs to."""
        while not self._said:
            self._more.clear()
            await self._more.wait()
        return self._said.popleft()


@dataclass
class Entry:
    """An HTTP request that is with the engine, as its owner may see it."""

    id: str
    tenant: str
    model: str
    prompt_tokens: int
    client_id: str | None = None  # what its client calls it
    created: float = field(default_factory=time.time)
    new_tokens: int = 0
    ended: bool = False  # by its owner, through DELETE
    parts: tuple[str, ...] = ()  # its requests to the engine


class Running:
    """The requests that are under way, by id; a tenant sees no other's."""

    def __init__(self):
        self._entries: dict[str, Entry] = {}

    def add(self, entry: Entry) -> None:
        """From now on it can be found."""
        self._entries[entry.id] = entry

    def remove(self, id: str) -> None:
        """It is over."""
        self._entries.pop(id, None)

    def of(self, tenant: str, id: str) -> Entry | None:
        """A tenant's request; None where there is none, or it is another's."""
        entry = self._entries.get(id)
        return entry if entry is not None and entry.tenant == tenant else None

    def all_of(self, tenant: str) -> list[Entry]:
        """A tenant's requests, the oldest first."""
        return [entry for entry in self._entries.values() if entry.tenant == tenant]
