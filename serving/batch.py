"""Files of requests, answered by the application in this process: OpenAI's format of batches.

A line of the input: {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {...}}.
A line of the output: {"id", "custom_id", "line", "response": {"status_code", "request_id", "body"}, "error"}. `line` is
the number of the input's line, from 1; lines come in the order in which they are finished. What is no request gets a
line whose `error` says why. Each line is on disk before the next is written, so that a batch that was killed goes on
where it ended: no line is lost, none comes twice.
"""

import asyncio
import fcntl
import json
import os
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from starlette.types import ASGIApp, Message

from serving.access.gate import Identity
from serving.body import MOST_BYTES

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/classify")
LONGEST_ID = 512  # characters of a custom_id
BEGINS = b'{"id": "batch_req_'  # each line of an output


class Owner:
    """The gate of a batch: who can read and write its files may do what the model can."""

    async def identify(self, request) -> Identity:
        """The owner of the files."""
        return Identity("batch", "user", "batch")

    async def allow(self, identity, permission, request) -> None:
        """Anything."""

    async def admit(self, identity, request, **sizes) -> "Owner":
        """As much as is asked for."""
        return self

    async def add(self, identity, action, request, **told) -> None:
        """No admin works here."""

    async def settle(self, status, prompt_tokens=0, new_tokens=0) -> None:
        """Nothing was taken."""


class Output:
    """The lines that are done. Use it in `with`; raises ValueError where another batch writes, or it is no output."""

    def __init__(self, path: Path):
        self.path = path
        self.done: dict[int, Any] = {}  # number of a line -> its custom_id

    def __enter__(self) -> "Output":
        self._file = open(self.path, "a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise ValueError(f"{self.path}: another batch is writing to it") from None
        self._file.seek(0)
        whole = 0
        for number, line in enumerate(self._file, 1):
            torn = not line.endswith(b"\n")
            if torn and (whole or BEGINS.startswith(line) or line.startswith(BEGINS)):
                break  # what a killed batch has left of its last line
            try:
                told = {} if torn else json.loads(line)
                self.done[told["line"]] = told["custom_id"]
            except (ValueError, KeyError, TypeError):
                self._file.close()
                raise ValueError(f"{self.path}: line {number} is not of a batch's output") from None
            whole += len(line)
        self._file.truncate(whole)
        return self

    def __exit__(self, *exception) -> None:
        self._file.close()

    def write(self, line: dict) -> None:
        """Adds a line; it is on disk on return."""
        self._file.write(json.dumps(line, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.done[line["line"]] = line["custom_id"]


def lines_of(file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """The numbered lines of an input, without empty ones; None for one that is too long to be a request."""
    number = 0
    while line := file.readline(MOST_BYTES + 2):
        number += 1
        if len(line) > MOST_BYTES and not line.endswith(b"\n"):
            while (rest := file.readline(MOST_BYTES)) and not rest.endswith(b"\n"):
                pass
            yield number, None
        elif line.strip():
            yield number, line


def parsed(line: bytes | None, known: set[str]) -> tuple[Any, str, bytes]:
    """(custom_id, path, body) of a line. Raises ValueError(reason, custom_id or None) for one that is no request."""
    if line is None:
        raise ValueError(f"the line has more than {MOST_BYTES} bytes", None)
    try:
        asked = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError("the line is not JSON", None) from None
    if not isinstance(asked, dict):
        raise ValueError("the line is not a JSON object", None)
    name = asked.get("custom_id")
    if not isinstance(name, str) or not 0 < len(name) <= LONGEST_ID:
        raise ValueError(f"custom_id has to be a string of 1 to {LONGEST_ID} characters", None)
    if name in known:
        raise ValueError("another line has this custom_id", name)
    if asked.get("method") != "POST" or asked.get("url") not in URLS:
        raise ValueError(f"method has to be POST, and url one of {', '.join(URLS)}", name)
    body = asked.get("body")
    if not isinstance(body, dict):
        raise ValueError("body has to be a JSON object", name)
    if body.get("stream"):
        raise ValueError("a batch is not streamed: leave out stream", name)
    return name, asked["url"], json.dumps(body).encode()


Ask = Callable[[str, bytes], Awaitable[dict | None]]  # a path and a body -> `response` of a line; None: not now


async def run(
    app: ASGIApp,
    source: Path,
    output: Output,
    width: int,
    progress: Callable[[int], None] = lambda done: None,
    *,
    ask: Ask | None = None,
    goes_on: Callable[[], bool] = lambda: True,
) -> int:
    """Answers all lines of a file that are not done yet, `width` at a time; returns how many were added.

    progress: called with that number after each. ask: how a line is answered, by default by the application as soon as
    there is room; goes_on: asked before each line, and where it says no the rest is left.
    Raises ValueError where the output is that of another input.
    """
    added, room, tasks, writing = 0, asyncio.Semaphore(width), set(), asyncio.Lock()
    ask = ask or (lambda path, body: _answered(app, path, body, goes_on))

    async def write(line: dict) -> None:
        nonlocal added
        async with writing:
            await asyncio.to_thread(output.write, line)  # it waits for the disk
        added += 1
        progress(added)

    async def one(number: int, name: str, path: str, body: bytes) -> None:
        try:
            if (response := await ask(path, body)) is not None:
                await write({**_heads(number, name), "response": response, "error": None})
        finally:
            room.release()

    with open(source, "rb") as file:
        lines = _requests(file, source, output)
        try:
            while goes_on() and (line := await asyncio.to_thread(next, lines, None)) is not None:
                number, name, path, body, reason = line
                if reason is not None:
                    told = {"code": "invalid_line", "message": reason}
                    await write({**_heads(number, name), "response": None, "error": told})
                    continue
                await room.acquire()
                tasks = {task for task in tasks if not task.done() or task.result()}  # raises what one of them did
                tasks.add(asyncio.create_task(one(number, name, path, body)))
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()  # where one of them, or who runs this, has ended
    return added


def _requests(file: BinaryIO, source: Path, output: Output) -> Iterator[tuple[int, Any, str, bytes, str | None]]:
    """The lines that are not done: number, custom_id, path and body, and why it is no request."""
    known: set[str] = set()
    for number, line in lines_of(file):
        try:
            (name, path, body), reason = parsed(line, known), None
        except ValueError as error:
            (reason, name), path, body = error.args, "", b""
        if name is not None:
            known.add(name)
        if number not in output.done:
            yield number, name, path, body, reason
        elif output.done[number] != name:
            raise ValueError(f"{output.path} is not of {source}: line {number} has another custom_id there")


def _heads(number: int, name: str | None) -> dict:
    return {"id": f"batch_req_{number}", "custom_id": name, "line": number}


async def _answered(app: ASGIApp, path: str, body: bytes, goes_on: Callable[[], bool]) -> dict | None:
    """The answer to a request, which waits as long as there is no room; None where the rest is left."""
    while goes_on():
        status, headers, answer = await call(app, path, body)
        if status not in (429, 503):
            return {"status_code": status, "request_id": headers.get("x-request-id"), "body": json.loads(answer)}
        await asyncio.sleep(float(headers.get("retry-after", 1)))
    return None


async def call(app: ASGIApp, path: str, body: bytes, **more: Any) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of what an application answers to a POST of JSON; more: in the scope of the request."""
    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST",
        "scheme": "http", "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
        "headers": [(b"content-type", b"application/json")], "client": ("batch", 0), "server": ("batch", 0),
        **more,
    }  # fmt: skip
    given, status, headers, parts = [body], 0, {}, []

    async def receive() -> Message:
        if given:
            return {"type": "http.request", "body": given.pop(), "more_body": False}
        await asyncio.Event().wait()  # this client never goes away

    async def send(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
            headers.update({name.decode().lower(): value.decode() for name, value in message["headers"]})
        else:
            parts.append(message.get("body", b""))

    await app(scope, receive, send)
    return status, headers, b"".join(parts)
