"""Around every request: its id, its record, one line in the log, and an answer even where the server has a fault.

The line is JSON, so that no header or path can forge another one, and holds no prompt and no secret.
"""

import json
import logging
import secrets
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.errors import ApiError

logger = logging.getLogger("isomesh.serving")

LONGEST_FIELD = 200  # characters that a client's own words take in a line
LOOKS = ("/livez", "/readyz")  # several a second, by who supervises: a line only where they find something
LOW_PRIORITY = "isomesh.low_priority"  # in the scope of a request that gives way to others; no client can set it
LIVE, LINE = "req-", "batch-"  # what the ids of requests begin with: of clients, of lines of batches
GONE = 499  # in the log: the client went away before its answer was complete
FAULT = ApiError(500, "the server failed on this request; its id is in the header x-request-id", code="internal_error")


@dataclass
class Record:
    """What is known of a request once it is over. `serving.metrics` and `serving.traces` live on these."""

    id: str  # the server's own
    method: str
    path: str
    address: str
    client_id: str | None  # what the client calls it, cleaned
    traceparent: str | None = None  # of the trace that its client has begun
    began: float = field(default_factory=time.monotonic)
    route: str = ""  # the path as it is declared; empty where there is none
    status: int = 0
    seconds: float = 0.0
    first_seconds: float | None = None  # until the first byte of the answer
    who: str = ""
    role: str = ""
    tenant: str = ""
    model: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    stream: bool = False
    parts: int = 0  # requests that the engine has taken for it
    finishes: tuple[str, ...] = ()  # of its choices
    fault: str = ""  # of the server

    def line(self) -> str:
        """JSON of what is there; control characters are escaped."""
        fields = {key: value for key, value in vars(self).items() if value not in ("", None, (), False)}
        fields |= {"began": round(time.time() - self.seconds, 3), "seconds": round(self.seconds, 6)}
        return json.dumps(fields)


Told = Callable[[Record], None]


def cleaned(text: str, longest: int = LONGEST_FIELD) -> str:
    """A client's words without what terminals and logs would obey."""
    return "".join(character for character in text[:longest] if character.isprintable())


def header(scope: Scope, name: bytes) -> str | None:
    """The value of a header of a request."""
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)


class Watch:
    """The outermost middleware. `told` is read at the end of each request, so that it may still grow."""

    def __init__(self, app: ASGIApp, told: Sequence[Told] = ()):
        self._app, self._told = app, told

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves a request."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        own = header(scope, b"x-request-id")
        record = Record(
            id=f"{LINE if scope.get(LOW_PRIORITY) else LIVE}{secrets.token_hex(12)}",
            method=cleaned(scope["method"], 20),
            path=cleaned(scope["path"]),
            address=(scope.get("client") or ("",))[0],
            client_id=cleaned(own, 64) if own else None,
            traceparent=cleaned(header(scope, b"traceparent") or "", 64) or None,
        )
        scope.setdefault("state", {})["record"] = record

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = record.status or message["status"]
                own = [(b"x-request-id", record.id.encode()), (b"x-content-type-options", b"nosniff")]
                message = {**message, "headers": [*message.get("headers", ()), *own]}
                record.first_seconds = time.monotonic() - record.began
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception as error:
            # the error's own words may quote a prompt: its kind and place are enough
            record.fault = type(error).__name__
            logger.error("%s in %s\n%s", record.fault, record.id, "".join(traceback.format_tb(error.__traceback__)))
            if not record.status:
                await _answer(watched, FAULT)
        finally:
            self._end(scope, record)

    def _end(self, scope: Scope, record: Record) -> None:
        record.seconds = time.monotonic() - record.began
        record.status = record.status or GONE
        record.route = getattr(scope.get("route"), "path", "")
        if caller := scope["state"].get("caller"):
            record.who, record.role, record.tenant = (getattr(caller.identity, x) for x in ("name", "role", "tenant"))
        looks = record.status == 200 and record.path in LOOKS
        logger.log(logging.DEBUG if looks else logging.INFO, "%s", record.line())
        for told in self._told:
            told(record)


async def _answer(send: Send, error: ApiError) -> None:
    body = json.dumps(error.body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
