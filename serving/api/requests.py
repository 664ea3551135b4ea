"""GET /v1/requests, GET and DELETE /v1/requests/{id}: one's own requests that are under way.

The id is that of the header x-request-id. Whose id is somebody else's, or of no request, is told the same: 404.
"""

from fastapi import APIRouter, Depends, Request

from serving.access.gate import Caller, needs
from serving.api.answers import OneRequest, Requests
from serving.api.routes import READS, ends, service_of
from serving.api.sending import answer
from serving.errors import ApiError
from serving.running import Entry

router = APIRouter()


def _shown(entry: Entry) -> OneRequest:
    same = {name: getattr(entry, name) for name in ("id", "created", "model", "prompt_tokens", "new_tokens", "ended")}
    return OneRequest(**same, client_request_id=entry.client_id)


def _own(request: Request, caller: Caller, id: str) -> Entry:
    entry = service_of(request).running.of(caller.identity.tenant, id)
    if entry is None:
        raise ApiError(404, "no request of yours with this id is under way", param="id", code="request_not_found")
    return entry


@router.get("/v1/requests", response_model=Requests, responses=ends(*READS))
async def requests(request: Request, caller: Caller = Depends(needs("requests"))):  # noqa: B008
    """Those of the caller's tenant, the oldest first."""
    entries = service_of(request).running.all_of(caller.identity.tenant)
    return answer(Requests(data=[_shown(entry) for entry in entries]))


@router.get("/v1/requests/{id}", response_model=OneRequest, responses=ends(*READS, 404))
async def one(request: Request, id: str, caller: Caller = Depends(needs("requests"))):  # noqa: B008
    """How far one of them is."""
    return answer(_shown(_own(request, caller, id)))


@router.delete("/v1/requests/{id}", response_model=OneRequest, responses=ends(*READS, 404))
async def end(request: Request, id: str, caller: Caller = Depends(needs("requests"))):  # noqa: B008
    """Ends it: its client gets the error `request_ended`, and its place is free within a step."""
    entry = _own(request, caller, id)
    entry.ended = True
    for part in entry.parts:
        service_of(request).engine.abort(part)
    return answer(_shown(entry))
