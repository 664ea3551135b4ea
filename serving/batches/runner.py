"""Runs the batches of a store beside live requests: one of each tenant at a time, with low priority.

1. A mark in the store says that a batch is not over. Whoever holds its lock runs it: one process of all replicas, and
   after a kill or a restart whichever looks first.
2. The whole file is looked at first: one line that is no request ends the batch before anything is charged.
3. Each line goes through the application as its owner's own request would: permission, model, limits, audit. Who may
   do no more is asked for each line anew. 429 and 503 wait; every other answer is written down.
4. An answer is on disk before it counts, so that no line has two. At the end they are cut into the files of answers
   and of errors, whose ids follow from the batch's.
"""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import Request
from starlette.types import ASGIApp

from runtime import locks
from runtime.files import replace_text
from serving.access.gate import Gate, Identity
from serving.batch import Output, call, lines_of, parsed, run
from serving.batches.store import MOST_LINES, Store
from serving.errors import ApiError
from serving.service import Service
from serving.watch import LOW_PRIORITY

logger = logging.getLogger("isomesh.serving")

POLL_SECONDS = 5.0  # between two looks for batches that another process has left
TOLD_SECONDS = 1.0  # between two notes of how far a batch is
MOST_WAIT = 30.0  # seconds, whatever Retry-After says
MOST_TENANTS = 8  # whose batches run at the same time
MOST_ERRORS = 20  # of a file that are told
OWNER = "isomesh.batch_owner"  # in the scope of a line's request; no client can set it
OVER = ("completed", "failed", "expired", "cancelled")


class LineGate:
    """The gate of lines: each comes from the owner of its batch, as the real gate knows them now."""

    def __init__(self, gate: Gate):
        self._gate = gate

    @property
    def texts(self) -> bool:
        """Whether bodies are to be in the audit."""
        return getattr(self._gate, "texts", False)

    async def identify(self, request: Request) -> Identity:
        """Raises ApiError 401 where the owner's credentials were revoked, or have expired."""
        return await self._gate.again(request.scope[OWNER])

    async def allow(self, identity: Identity, permission: str, request: Request) -> None:
        """As the real gate."""
        await self._gate.allow(identity, permission, request)

    async def admit(self, identity: Identity, request: Request, **sizes):
        """As the real gate."""
        return await self._gate.admit(identity, request, **sizes)


class Ended(Exception):
    """A batch that cannot go on; says why."""


@dataclass
class Running:
    """A batch that this process runs."""

    mark: Path  # X.open
    told: dict[str, Any]
    not_before: float = 0.0  # time.monotonic() of the next request, after one for which there was no room
    noted: float = 0.0
    counts: dict[str, int] = field(default_factory=lambda: {"total": 0, "completed": 0, "failed": 0})

    def path(self, ending: str) -> Path:
        """Beside its mark."""
        return self.mark.with_suffix(f".{ending}")

    @property
    def status_asked(self) -> str | None:
        """What it has to end as, for a reason from outside."""
        if self.path("cancel").exists():
            return "cancelled"
        return "expired" if time.time() > self.told["expires_at"] else None

    def note(self, **changed) -> None:
        """Says how far it is, to whoever asks any replica."""
        self.told |= {**changed, "request_counts": dict(self.counts)}
        replace_text(self.path("json"), json.dumps(self.told))
        self.noted = time.monotonic()


class Runner:
    """One of a server. `lines`: the application that answers a line; its gate is a LineGate."""

    def __init__(self, store: Store, service: Service, lines: ASGIApp):
        self._store, self._service, self._lines = store, service, lines
        options = service.engine.options
        self.width = max(1, min(options.max_running, options.max_waiting // 4))  # live requests wait in the same queue
        self._room: asyncio.Semaphore | None = None
        self._tasks: dict[Path, asyncio.Task] = {}  # by the folder of a tenant
        self._look: asyncio.Event | None = None
        self._watching: asyncio.Task | None = None

    def wake(self) -> None:
        """Looks for batches now, and every few seconds from now on; in the event loop's thread."""
        if self._watching is None or self._watching.done():
            self._room, self._look = asyncio.Semaphore(self.width), asyncio.Event()
            self._watching = asyncio.get_running_loop().create_task(self._watch())
        self._look.set()

    async def _watch(self) -> None:
        while not self._service.lifecycle.draining:
            self._look.clear()
            try:
                marks = await asyncio.to_thread(self._store.open_batches)
            except OSError as error:
                logger.error("the batches cannot be looked at: %s", error)
                marks = []
            for mark in marks:
                tenant = mark.parent
                if tenant not in self._tasks and len(self._tasks) < MOST_TENANTS:
                    self._tasks[tenant] = asyncio.get_running_loop().create_task(self._one(mark))
                    self._tasks[tenant].add_done_callback(lambda _, tenant=tenant: self._tasks.pop(tenant, None))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._look.wait(), POLL_SECONDS)

    async def _one(self, mark: Path) -> None:
        """A batch to its end, if no other process runs it."""
        again = True
        try:
            with mark.open("r+b") as lock:
                locks.acquire(lock)
                batch = Running(mark, json.loads(mark.with_suffix(".json").read_text()))
                await self._run(batch)
                again = not mark.exists()  # there may be a next one of this tenant
        except (locks.Locked, FileNotFoundError):
            again = False
        except OSError as error:
            logger.error("%s: %s; tried again", mark.stem, error)
            await asyncio.sleep(POLL_SECONDS)
        if again and not self._service.lifecycle.draining:
            asyncio.get_running_loop().call_soon(self._look.set)

    async def _run(self, batch: Running) -> None:
        try:
            if batch.told["status"] not in OVER:
                await self._answer(batch)
        except Ended as ended:
            await self._end(batch, "failed", [{"code": "batch_ended", "message": str(ended), "line": None}])
        except (OSError, asyncio.CancelledError):
            raise
        except Exception as error:
            logger.exception("%s", batch.told["id"])
            told = {"code": "internal_error", "message": f"the server failed on it: {type(error).__name__}"}
            await self._end(batch, "failed", [{**told, "line": None}])
        if batch.told["status"] in OVER:
            for ending in ("lines", "cancel", "open"):
                batch.path(ending).unlink(missing_ok=True)

    async def _answer(self, batch: Running) -> None:
        told, store = batch.told, self._store
        try:
            source = await asyncio.to_thread(store.content, told["tenant"], told["input_file_id"])
        except ApiError:
            raise Ended("its file is gone") from None
        if told["status"] == "validating":
            total, errors = await asyncio.to_thread(look_at, source, told["endpoint"])
            batch.counts["total"] = total
            if errors:
                return await self._end(batch, "failed", errors)
            batch.note(status="in_progress", in_progress_at=int(time.time()))
        batch.counts["total"] = max(batch.counts["total"], told["request_counts"]["total"])
        with Output(batch.path("lines")) as output:
            good, bad = await asyncio.to_thread(count, batch.path("lines"))
            batch.counts |= {"completed": good, "failed": bad}

            def progress(_: int) -> None:
                if time.monotonic() - batch.noted > TOLD_SECONDS:
                    batch.note()

            ask = lambda path, body: self._ask(batch, path, body)
            await run(self._lines, source, output, self.width, progress, ask=ask, goes_on=lambda: self._goes_on(batch))
            done = sum(batch.counts[kind] for kind in ("completed", "failed")) == batch.counts["total"]
        if done or batch.status_asked:
            await self._end(batch, "completed" if done else batch.status_asked)

    def _goes_on(self, batch: Running) -> bool:
        return not self._service.lifecycle.draining and batch.status_asked is None

    async def _ask(self, batch: Running, path: str, body: bytes) -> dict | None:
        """The answer to a line; None where it is left for later."""
        scope = {OWNER: batch.told["owner"], LOW_PRIORITY: True}
        while True:
            await asyncio.sleep(max(0.0, batch.not_before - time.monotonic()))
            async with self._room:
                if not self._goes_on(batch):
                    return None
                status, headers, answer = await call(self._lines, path, body, **scope)
            if status == 401:
                raise Ended("the key or token that it was made with does not work any more")
            if status not in (429, 503):
                batch.counts["completed" if status == 200 else "failed"] += 1
                return {
                    "status_code": status, "request_id": headers.get("x-request-id"), "body": json.loads(answer)
                }  # fmt: skip
            wait = min(MOST_WAIT, float(headers.get("retry-after", 1)))
            batch.not_before = max(batch.not_before, time.monotonic() + wait)

    async def _end(self, batch: Running, status: str, errors: list[dict] | None = None) -> None:
        """Cuts the answers into files and says how it ended."""
        now = int(time.time())
        batch.note(**({"status": "finalizing", "finalizing_at": now} if status == "completed" else {}))
        files = await asyncio.to_thread(self._files, batch, status)
        ended = {"status": status, f"{status}_at": int(time.time()), **files}
        if status == "cancelled":
            ended["cancelling_at"] = int(batch.path("cancel").read_text() or now)
        if errors:
            ended["errors"] = {"object": "list", "data": [{"param": None, **error} for error in errors]}
        batch.note(**ended)

    def _files(self, batch: Running, status: str) -> dict[str, str]:
        """The files of answers and of errors, as far as there is something in them."""
        id, found = batch.told["id"], {}
        paths = {"output": batch.path("output"), "error": batch.path("error")}
        with paths["output"].open("wb") as good, paths["error"].open("wb") as bad:
            done = set()
            for line in batch.path("lines").open("rb") if batch.path("lines").exists() else ():
                answer = json.loads(line)
                done.add(answer["line"])
                is_good = answer["response"] is not None and answer["response"]["status_code"] == 200
                (good if is_good else bad).write(line)
            if status == "expired":
                source = self._store.content(batch.told["tenant"], batch.told["input_file_id"])
                for line in left_over(source, done):
                    bad.write(json.dumps(line).encode() + b"\n")
        for kind, path in paths.items():
            if path.stat().st_size:
                name = f"{id}_{kind}.jsonl"
                own = f"file-{id.removeprefix('batch_')}{kind[0]}"
                found[f"{kind}_file_id"] = self._store.keep_result(batch.told["tenant"], own, path, name)
            path.unlink(missing_ok=True)
        return found


def look_at(source: Path, endpoint: str) -> tuple[int, list[dict]]:
    """How many requests a file holds, and what is wrong with the first lines that are none, or not for this route."""
    known: set[str] = set()
    errors, total = [], 0
    with source.open("rb") as file:
        for number, line in lines_of(file):
            total += 1
            if total > MOST_LINES:
                told = f"a batch has at most {MOST_LINES} lines"
                return total, [{"code": "too_many_lines", "message": told, "line": number}]
            try:
                name, path, _ = parsed(line, known)
                known.add(name)
                if path != endpoint:
                    errors.append(
                        {"code": "mismatched_endpoint", "message": f"url {path} is not the batch's {endpoint}"}
                    )
                    errors[-1]["line"] = number
            except ValueError as error:
                errors.append({"code": "invalid_line", "message": error.args[0], "line": number})
            if len(errors) == MOST_ERRORS:
                break
    if not total:
        errors = [{"code": "empty_file", "message": "the file has no lines", "line": None}]
    return total, errors


def count(lines: Path) -> tuple[int, int]:
    """Lines that were answered well, and others."""
    good = total = 0
    with lines.open("rb") as file:
        for line in file:
            response = json.loads(line)["response"]
            good += response is not None and response["status_code"] == 200
            total += 1
    return good, total - good


def left_over(source: Path, done: set[int]):
    """What the error file says of lines that there was no time for."""
    told: Mapping[str, str] = {"code": "batch_expired", "message": "there was no time for this line"}
    with source.open("rb") as file:
        for number, line in lines_of(file):
            if number not in done:
                name = json.loads(line)["custom_id"]
                yield {"id": f"batch_req_{number}", "custom_id": name, "line": number, "response": None, "error": told}
