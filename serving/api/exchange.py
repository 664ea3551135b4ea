"""One HTTP request and the engine: admitted, submitted in parts, listened to, and accounted for however it ends."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

from inference.requests import Busy, Encoded, EncodeRequest, Piece, Request, Sampling
from serving.access.gate import Admission, Caller
from serving.api.answers import Usage
from serving.errors import ApiError
from serving.running import Answers, Entry
from serving.service import Service
from serving.watch import GONE, LOW_PRIORITY, Record

logger = logging.getLogger("isomesh.serving")

ENDED = "this request was ended by its owner through DELETE"


@dataclass(frozen=True)
class Generate:
    """Prompts to be continued, each in n ways."""

    prompts: tuple[tuple[int, ...], ...]
    sampling: Sampling
    n: int = 1
    adapter: str = ""  # beside the model; "": none

    @property
    def new_tokens(self) -> int:
        """The most that can come of it."""
        return len(self.prompts) * self.n * self.sampling.max_tokens

    def parts(self, id: str) -> list[Request]:
        """Requests to the engine. Every prompt draws from a seed of its own."""
        seed = self.sampling.seed
        seeds = [None if seed is None else seed + number for number in range(len(self.prompts))]
        each = zip(self.prompts, seeds, strict=True)
        return [
            Request(f"{id}-{number}", prompt, replace(self.sampling, seed=own), self.n, self.adapter)
            for number, (prompt, own) in enumerate(each)
        ]


@dataclass(frozen=True)
class Encode:
    """Texts to be encoded."""

    prompts: tuple[tuple[int, ...], ...]
    types: tuple[tuple[int, ...], ...] = ()  # of each prompt's tokens; (): all 0
    n: int = 1
    new_tokens: int = 0

    def parts(self, id: str) -> list[EncodeRequest]:
        """Requests to the engine."""
        types = self.types or ((),) * len(self.prompts)
        each = enumerate(zip(self.prompts, types, strict=True))
        return [EncodeRequest(f"{id}-{number}", tokens, own) for number, (tokens, own) in each]


class Exchange:
    """`begin`, then `next` until it gives None, then `end`, which is safe to call at any time and acts once."""

    def __init__(self, service: Service, caller: Caller, work: Generate | Encode):
        self.service, self._caller, self._work = service, caller, work
        self.record: Record = caller.request.state.record
        self.prompt_tokens = sum(map(len, work.prompts))
        self.cached_tokens = self.new_tokens = 0
        self.created = int(time.time())
        self._admission: Admission | None = None
        self._entry: Entry | None = None
        self._left = {}  # part -> choices that have not finished
        self._answers = Answers()
        self._over = False

    async def begin(self) -> None:
        """Takes room in the caller's limits, gives the work to the engine. Raises ApiError; `end` is due even then."""
        service, record, caller = self.service, self.record, self._caller
        record.model, record.prompt_tokens = service.name, self.prompt_tokens
        service.lifecycle.require_open()
        choices, most = len(self._work.prompts) * self._work.n, service.engine.options.max_waiting
        if choices > most:
            told = f"{choices} inputs or choices are more than the {most} that may wait (--max-waiting)"
            raise ApiError(400, told, code="invalid_value")
        self._admission = await caller.admit(service.name, self.prompt_tokens, self._work.new_tokens)
        parts = self._work.parts(record.id)
        if caller.request.scope.get(LOW_PRIORITY):
            parts = [replace(part, low=True) for part in parts]
        self._entry = Entry(
            record.id, caller.identity.tenant, service.name, self.prompt_tokens,
            record.client_id, parts=tuple(part.id for part in parts),
        )  # fmt: skip
        service.running.add(self._entry)
        service.lifecycle.at_work += 1
        for number, part in enumerate(parts):
            self._left[number] = self._work.n
            try:
                await self._submit(part, number)
            except Busy as busy:
                raise ApiError(503, f"{busy}", code="overloaded", retry_after=busy.retry_after) from None
            except ValueError as error:
                raise ApiError(400, f"{error}", code="invalid_value") from None
            if self._entry.ended:  # while a grammar was compiled: the engine did not know of the part then
                raise self._aborted()

    async def _submit(self, part: Request | EncodeRequest, number: int) -> None:
        """Gives a part to the engine; in a thread where it has a grammar, which may take seconds to compile."""
        engine, listener = self.service.engine, self._answers.listener(number)
        if isinstance(part, EncodeRequest) or part.sampling.grammar is None:
            engine.submit(part, listener)
            self.record.parts += 1
            return
        tenant = self._caller.identity.tenant
        async with self.service.compiling(tenant, lambda: engine.submit(part, listener)) as submitted:
            try:
                await asyncio.wrap_future(submitted)
            except asyncio.CancelledError:  # the client is gone, but the thread submits if it has begun
                if not submitted.cancel():
                    (ended,), _ = await asyncio.wait((asyncio.wrap_future(submitted),))
                    self.record.parts += ended.exception() is None
                raise
        self.record.parts += 1

    async def next(self) -> tuple[int, Piece | Encoded] | None:
        """The next piece, with the number of its prompt; None after the last. Raises ApiError for one that failed."""
        if not any(self._left.values()):
            return None
        number, piece = await self._answers.next()
        if isinstance(piece, Encoded):
            self._left[number] = 0
            if piece.error is not None:
                raise self._aborted() if piece.error == "aborted" else self._failed(piece.error)
            return number, piece
        self.new_tokens += len(piece.tokens)
        self.cached_tokens += piece.cached_tokens
        self._entry.new_tokens = self.new_tokens
        if piece.finish is not None:
            self._left[number] -= 1
            self.record.finishes += (piece.finish,)
        if piece.finish == "aborted":
            raise self._aborted()
        if piece.finish == "error":
            raise self._failed(piece.error)
        return number, piece

    def _aborted(self) -> ApiError:
        if self._entry.ended:  # clients are not to try again by themselves
            return ApiError(409, ENDED, code="request_ended", headers={"x-should-retry": "false"})
        return ApiError(503, "the server ended this request: it is going down", code="draining", retry_after=1)

    def _failed(self, error: str | None) -> ApiError:
        self.record.fault = "engine"
        logger.error("the engine failed on %s: %s", self.record.id, error)
        return ApiError(500, "the engine failed on this request", code="engine_error")

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        return Usage.of(self.prompt_tokens, self.new_tokens, self.cached_tokens)

    async def end(self, status: int) -> None:
        """Frees the engine of what is still running and settles the caller's limits."""
        if self._over:
            return
        self._over = True
        for number, left in self._left.items():
            if left:
                self.service.engine.abort(f"{self.record.id}-{number}")
        if self._entry is not None:
            self.service.running.remove(self.record.id)
            self.service.lifecycle.at_work -= 1
        self.record.cached_tokens, self.record.new_tokens = self.cached_tokens, self.new_tokens
        if self._admission is not None:
            settled = self._admission.settle(status, self.prompt_tokens, self.new_tokens)
            await asyncio.shield(asyncio.ensure_future(settled))  # also when the client has gone away


async def whole(exchange: Exchange, gather: Callable[[Exchange], Awaitable]) -> object:
    """The result of `gather` over the exchange, from beginning to end."""
    async with _undone_where_it_fails(exchange):
        await exchange.begin()
        result = await gather(exchange)
    await exchange.end(200)
    return result


async def begun(exchange: Exchange) -> tuple[int, Piece]:
    """The first piece of a stream, whose end is due later; if it does not come, all is undone."""
    async with _undone_where_it_fails(exchange):
        await exchange.begin()
        return await exchange.next()


@contextlib.asynccontextmanager
async def _undone_where_it_fails(exchange: Exchange) -> AsyncIterator[None]:
    """Ends the exchange with the status of what is raised inside, if anything is."""
    try:
        yield
    except BaseException as error:
        status = error.status if isinstance(error, ApiError) else 500 if isinstance(error, Exception) else GONE
        await exchange.end(status)
        raise


def fits(service: Service, prompts: Sequence[Sequence[int]], new_tokens: int | None, param: str) -> int:
    """New tokens that every prompt leaves room for: those asked for, or all. Raises ApiError 400 beyond the reach."""
    reach, vocabulary = service.engine.reach, service.engine.vocabulary
    longest = max(map(len, prompts))
    if not min(map(len, prompts)):
        raise ApiError(400, f"{param} has no tokens", param=param, code="invalid_value")
    if longest + (new_tokens or 0) > reach:
        message = f"{longest} prompt tokens + {new_tokens or 0} new ones = {longest + (new_tokens or 0)} are more than "
        message += f"the {reach} that {service.name} reads; ask for {max(0, reach - longest)} new ones at most"
        raise ApiError(400, message, param=param, code="context_length_exceeded")
    if strange := next((token for ids in prompts for token in ids if not 0 <= token < vocabulary), None):
        message = f"token {strange} is outside of the vocabulary, 0 to {vocabulary - 1}"
        raise ApiError(400, message, param=param, code="invalid_value")
    return reach - longest if new_tokens is None else new_tokens
