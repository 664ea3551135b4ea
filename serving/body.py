"""A request's body, read within bounds: bytes, seconds and depth come before any meaning."""

import asyncio
from collections.abc import Callable

from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.requests import ClientDisconnect, Request

from serving.errors import ApiError

MOST_BYTES = 4 << 20
MOST_BRACKETS = 1 << 17  # a million small lists take seconds to look at, for all others, too
MOST_MISTAKES = 1000  # that are looked at
SECONDS = 30.0  # that a body may take to arrive
INLINE_BYTES = 64 << 10  # bodies up to this are parsed where they are; larger ones in a thread


class Gone(Exception):
    """The client went away before it was answered."""


class Body(BaseModel):
    """JSON that a client sends: types as they stand, no field that nobody knows, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


def body_of(kind: type[Body]) -> Callable:
    """A dependency that gives an endpoint the body of its request; it comes after the caller, who is asked first."""

    async def read(request: Request) -> kind:
        raw = await read_bytes(request)
        if getattr(request.app.state.gate, "texts", False):  # the operator wants them in the audit
            request.state.audited_text = raw.decode(errors="replace")
        if raw.count(b"[") + raw.count(b"{") > MOST_BRACKETS:
            raise ApiError(400, f"a body has at most {MOST_BRACKETS} brackets and braces", code="invalid_json")
        try:
            if len(raw) <= INLINE_BYTES:
                return kind.model_validate_json(raw)
            return await asyncio.to_thread(kind.model_validate_json, raw)
        except ValidationError as error:
            raise refusal(kind, error) from None

    read.body = kind
    return read


async def read_bytes(request: Request) -> bytes:
    """The body. Raises ApiError 408, 413 or 415."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "send application/json: the header Content-Type says something else, or nothing")
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding != "identity":
        raise ApiError(415, "a compressed body is not read: send it without Content-Encoding")
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length[:20]) > MOST_BYTES:
        raise _too_long()
    parts, size = [], 0
    try:
        async with asyncio.timeout(SECONDS):
            async for part in request.stream():
                size += len(part)
                if size > MOST_BYTES:
                    raise _too_long()
                parts.append(part)
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {SECONDS:g} s", headers={"Connection": "close"}) from None
    except ClientDisconnect:
        raise Gone from None
    return b"".join(parts)


def _too_long() -> ApiError:
    message = f"a body has at most {MOST_BYTES} bytes"
    return ApiError(413, message, code="request_too_large", headers={"Connection": "close"})


def refusal(kind: type[Body], error: ValidationError) -> ApiError:
    """What a client is told of a body that is not as it has to be: the first mistake, and what would be right."""
    if error.error_count() > MOST_MISTAKES:
        return ApiError(400, f"the body has {error.error_count()} mistakes", code="invalid_value")
    errors = error.errors(include_url=False, include_context=False, include_input=False)
    first = errors[0]
    if first["type"].startswith("json_"):
        return ApiError(400, f"the body is not JSON that can be read: {first['msg'][:200]}", code="invalid_json")
    where = [part for part in first["loc"] if not isinstance(part, str) or part.isidentifier() or "-" in part]
    if not where:
        return ApiError(400, f"the body has to be a JSON object: {first['msg']}", code="invalid_type")
    top = str(where[0])[:64]
    name = top
    for part in where[1:]:
        name += f"[{part}]" if isinstance(part, int) else f".{part}"[:64]
    if first["type"] == "extra_forbidden":
        valid = f"; there are: {', '.join(kind.model_fields)}" if len(where) == 1 else ""
        return ApiError(400, f"unrecognized field {name}{valid}", param=name, code="unknown_parameter")
    known = kind.model_fields.get(top)
    if known is not None and known.description and len({tuple(e["loc"]) for e in errors if e["loc"][0] == top}) > 1:
        return ApiError(400, f"{top} has to be {known.description}", param=top, code="invalid_type")
    return ApiError(400, f"{name}: {first['msg'][:300]}", param=name, code="invalid_value")
