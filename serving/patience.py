"""How long a connection may take: a client that sends or reads too slowly is cut off, so that it holds nothing."""

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 10.0  # for all headers of a request, from its first byte or the connection's beginning
READ_SECONDS = 60.0  # for which a client may leave what was sent to it unread


class Patient(H11Protocol):
    """Uvicorn's HTTP/1.1 with limits of time. The body's is serving.body's, that between requests uvicorn's own."""

    head_seconds, read_seconds = HEAD_SECONDS, READ_SECONDS
    _head: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        """The clock of the first request starts."""
        super().connection_made(transport)
        self._head = self.loop.call_later(self.head_seconds, transport.abort)

    def data_received(self, data: bytes) -> None:
        """A request that has begun has to go on."""
        if self._head is None and (self.cycle is None or self.cycle.response_complete):
            self._head = self.loop.call_later(self.head_seconds, self.transport.abort)
        super().data_received(data)

    def handle_events(self) -> None:
        """Headers that are complete have been in time."""
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:
            self._head = _stopped(self._head)

    def pause_writing(self) -> None:
        """The client does not read."""
        super().pause_writing()
        self._unread = self._unread or self.loop.call_later(self.read_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """It does again."""
        super().resume_writing()
        self._unread = _stopped(self._unread)

    def connection_lost(self, exc: Exception | None) -> None:
        """All clocks stop."""
        self._head, self._unread = _stopped(self._head), _stopped(self._unread)
        super().connection_lost(exc)


def _stopped(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
