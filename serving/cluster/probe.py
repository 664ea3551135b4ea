"""Whether a process behind a socket answers: one small HTTP request, within a time limit."""

import asyncio
import contextlib
from pathlib import Path
from typing import NamedTuple

MOST_BYTES = 4096  # of an answer that are read


class Answer(NamedTuple):
    """What came back. Nothing listens: status 0. Something listens but says nothing: status None."""

    status: int | None
    body: str = ""

    @property
    def silent(self) -> bool:
        """It has the connection and does nothing with it: it is stopped, or hangs."""
        return self.status is None


async def get(socket: Path, path: str, seconds: float) -> Answer:
    """GET of a path at a unix socket."""
    try:
        async with asyncio.timeout(seconds):
            return await _get(socket, path)
    except (ConnectionRefusedError, FileNotFoundError):
        return Answer(0)
    except (OSError, TimeoutError, ValueError):  # a full backlog, a reset, an answer that is none
        return Answer(None)


async def _get(socket: Path, path: str) -> Answer:
    reader, writer = await asyncio.open_unix_connection(socket)
    try:
        writer.write(f"GET {path} HTTP/1.1\r\nHost: replica\r\nConnection: close\r\n\r\n".encode())
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        _, _, length = head.partition("content-length:")
        body = await reader.read(min(int(length.split()[0]), MOST_BYTES)) if length.strip("\r\n 0") else b""
        return Answer(int(head.split(" ", 2)[1]), body.decode(errors="replace"))
    except (IndexError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        raise ValueError("not an answer") from None
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
