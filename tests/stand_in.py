"""A replica without a model: python stand_in.py MODEL SOCKET. It answers as the server does, in a tenth of a second.

What it does with a request stands in its body: {"wait": seconds until the first byte, "gap": seconds between events,
"n": events, "stream": bool, "status": to refuse with}.
A model named "broken" does not start; one named "wild" ignores SIGTERM.
"""

import asyncio
import json
import os
import signal
import sys

MODEL, SOCKET = sys.argv[1:]


class StandIn:
    """The state of the process."""

    def __init__(self):
        self.draining, self.running, self.asked = False, 0, 0
        self.over = asyncio.Event()

    def drain(self) -> None:
        self.draining = True
        self.look()

    def look(self) -> None:
        if self.draining and not self.running:
            self.over.set()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                first, *lines = head.decode().split("\r\n")
                headers = dict(line.lower().split(": ", 1) for line in lines if line)
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                await self.route(first.split(" ")[1], headers, json.loads(body or b"{}"), writer)
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def route(self, path: str, headers: dict, asked: dict, writer: asyncio.StreamWriter) -> None:
        if path == "/livez":
            return send(writer, 200, {"status": "alive"})
        if path == "/readyz":
            return send(writer, 503, {"status": "draining"}) if self.draining else send(writer, 200, {})
        if path == "/headers":
            return send(writer, 200, {**headers, "path": path, "pid": os.getpid()})
        if self.draining or "status" in asked:
            return send(writer, asked.get("status", 503), {"error": {"message": "busy"}})
        self.running += 1
        self.asked += 1
        try:
            await self.complete(asked, writer)
        finally:
            self.running -= 1
            self.look()

    async def complete(self, asked: dict, writer: asyncio.StreamWriter) -> None:
        facts = {"model": MODEL, "pid": os.getpid(), "asked": self.asked}
        await asyncio.sleep(asked.get("wait", 0))
        if not asked.get("stream"):
            return send(writer, 200, facts)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        for event in [*([json.dumps(facts)] * asked.get("n", 3)), "[DONE]"]:
            chunk(writer, f"data: {event}\n\n".encode())
            await writer.drain()
            await asyncio.sleep(asked.get("gap", 0))
        chunk(writer, b"")


def send(writer: asyncio.StreamWriter, status: int, body: dict) -> None:
    content = json.dumps(body).encode()
    head = f"HTTP/1.1 {status} {status}\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    writer.write(head.encode() + content)


def chunk(writer: asyncio.StreamWriter, content: bytes) -> None:
    writer.write(f"{len(content):x}\r\n".encode() + content + b"\r\n")


async def main() -> int:
    if MODEL == "broken":
        print(f"error: no model at {MODEL}", file=sys.stderr)
        return 2
    replica = StandIn()
    handler = (lambda: None) if MODEL == "wild" else replica.drain
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, handler)
    server = await asyncio.start_unix_server(replica.answer, SOCKET)
    await replica.over.wait()
    await asyncio.sleep(0.05)
    server.close()
    os._exit(0)  # connections that are kept open have nothing to say


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
