"""/v1/batches: files of requests, answered beside live ones and charged to their owner; each tenant sees its own."""

import asyncio

from fastapi import APIRouter, Depends, Request

from serving.access.gate import Caller, needs
from serving.api.answers import Batch, ManyBatches
from serving.api.bodies import BatchBody
from serving.api.files import store_of
from serving.api.pages import PAGES, page_of
from serving.api.routes import READS, SENDS, ends, service_of
from serving.api.sending import answer
from serving.batch import URLS
from serving.body import body_of
from serving.errors import ApiError

router = APIRouter()
PERMISSIONS = dict(zip(URLS, ("chat", "completions", "embeddings", "classify"), strict=True))


@router.post("/v1/batches", response_model=Batch, responses=ends(*SENDS))
async def create(
    request: Request,
    caller: Caller = Depends(needs("batches")),  # noqa: B008
    body: BatchBody = Depends(body_of(BatchBody)),  # noqa: B008
):
    """Answers the lines of a file, each as a request of the caller's own, when there is room beside live requests."""
    store, service, gate = store_of(request), service_of(request), caller.gate
    service.lifecycle.require_open()
    if body.endpoint not in URLS:
        told = f"endpoint={body.endpoint[:64]!r} is none of {', '.join(URLS)}"
        raise ApiError(400, told, param="endpoint", code="invalid_value")
    await gate.allow(caller.identity, PERMISSIONS[body.endpoint], request)
    asked = {"input_file_id": body.input_file_id, "endpoint": body.endpoint}
    asked |= {"completion_window": body.completion_window, "metadata": body.metadata}
    owner = gate.keep(caller.identity)
    told = await asyncio.to_thread(store.add_batch, caller.identity.tenant, owner, asked)
    service.batches.runner.wake()
    return answer(Batch(**told))


@router.get("/v1/batches", response_model=ManyBatches, responses=ends(*READS, 404), openapi_extra={"parameters": PAGES})
async def batches(request: Request, caller: Caller = Depends(needs("batches"))):  # noqa: B008
    """The caller's batches, the newest first."""
    found = await asyncio.to_thread(store_of(request).batches, caller.identity.tenant)
    page, more = page_of(request, found)
    data = [Batch(**one) for one in page]
    ids = {"first_id": data[0].id, "last_id": data[-1].id} if data else {}
    return answer(ManyBatches(data=data, has_more=more, **ids))


@router.get("/v1/batches/{id}", response_model=Batch, responses=ends(*READS, 404))
async def batch(request: Request, id: str, caller: Caller = Depends(needs("batches"))):  # noqa: B008
    """How far one of them is."""
    return answer(Batch(**await asyncio.to_thread(store_of(request).batch, caller.identity.tenant, id)))


@router.post("/v1/batches/{id}/cancel", response_model=Batch, responses=ends(*READS, 404, 409))
async def cancel(request: Request, id: str, caller: Caller = Depends(needs("batches"))):  # noqa: B008
    """Begins no further line of it; what is answered by then is kept."""
    told = await asyncio.to_thread(store_of(request).cancel, caller.identity.tenant, id)
    service_of(request).batches.runner.wake()
    return answer(Batch(**told))
