"""Answers that come piece by piece, as server-sent events; and how a client's going away is noticed."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from serving.body import Gone
from serving.errors import ApiError
from serving.watch import FAULT, GONE

SEND_SECONDS = 60.0  # a client that takes nothing for so long is gone
HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # proxies are to pass each event on at once
)
DONE = b"data: [DONE]\n\n"

T = TypeVar("T")


def event(data: str) -> bytes:
    """One event; data is JSON, which has no line breaks."""
    return f"data: {data}\n\n".encode()


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of work, which is cancelled when the client goes away; then raises Gone. The body must be read."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_until_gone(request.receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        return task.result()
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait((task,))  # it gives back what it holds


async def _until_gone(receive: Receive) -> None:
    message: Message = {}
    while message.get("type") != "http.disconnect":
        message = await receive()


class EventStream(Response):
    """A response of events, the first of which is at hand. `over` is awaited at the end, whatever happened.

    A fault in the midst is told in an event of its own, and then no [DONE] comes.
    """

    def __init__(self, events: AsyncIterator[bytes], over: Callable[[int], Awaitable[None]]):
        super().__init__()
        self._events, self._over = events, over

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends all; ends early when the client goes away."""
        pump, gone = asyncio.ensure_future(self._pump(send)), asyncio.ensure_future(_until_gone(receive))
        status = GONE
        try:
            await asyncio.wait((pump, gone), return_when=asyncio.FIRST_COMPLETED)
            if pump.done():
                status = pump.result()
        except TimeoutError:
            pass  # it took nothing for too long
        except Exception as error:
            status = GONE if isinstance(error, OSError) else FAULT.status
            raise
        finally:
            gone.cancel()
            pump.cancel()
            await asyncio.wait((pump,))
            scope["state"]["record"].status = status
            await self._over(status)

    async def _pump(self, send: Send) -> int:
        status, last = 200, DONE
        await send({"type": "http.response.start", "status": 200, "headers": list(HEADERS)})
        try:
            async for data in self._events:
                await self._send(send, data, more=True)
        except ApiError as error:
            status, last = error.status, event(json.dumps(error.body))
        except (TimeoutError, OSError):
            raise
        except Exception:
            await self._send(send, event(json.dumps(FAULT.body)), more=False)
            raise
        await self._send(send, last, more=False)
        return status

    async def _send(self, send: Send, data: bytes, more: bool) -> None:
        async with asyncio.timeout(SEND_SECONDS):
            await send({"type": "http.response.body", "body": data, "more_body": more})
