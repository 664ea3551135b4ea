"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter, as vLLM has them: adapters come and go while others write.

A server has places for them if it was started with --max-adapters and --max-adapter-rank.
"""

import asyncio
from pathlib import Path

from fastapi import APIRouter, Depends, Request

from serving.access.gate import Caller, needs
from serving.api.answers import Model
from serving.api.bodies import LoadAdapterBody, UnloadAdapterBody
from serving.api.models import shown
from serving.api.routes import SENDS, ends, service_of
from serving.api.sending import answer
from serving.body import body_of
from serving.errors import ApiError
from serving.service import Service

router = APIRouter()
FIXED = "the adapters of this server are those that it was started with: --max-adapters makes room for more"


@router.post("/v1/load_lora_adapter", response_model=Model, responses=ends(*SENDS))
async def load(
    request: Request,
    caller: Caller = Depends(needs("adapters")),  # noqa: B008
    body: LoadAdapterBody = Depends(body_of(LoadAdapterBody)),  # noqa: B008
):
    """Reads an adapter from a folder of the server's machine; on return requests may name it."""
    service = _changed(request, body.lora_name)
    try:
        await asyncio.to_thread(service.load, body.lora_name, Path(body.lora_path))
    except (ValueError, OSError) as error:
        raise ApiError(400, f"{error}"[:1000], param="lora_path", code="invalid_value") from None
    view = service.under(body.lora_name)
    await caller.gate.add(caller.identity, "adapters load", request, model=view.name, subject=view.digest)
    return answer(shown(view))


@router.post("/v1/unload_lora_adapter", response_model=Model, responses=ends(*SENDS))
async def unload(
    request: Request,
    caller: Caller = Depends(needs("adapters")),  # noqa: B008
    body: UnloadAdapterBody = Depends(body_of(UnloadAdapterBody)),  # noqa: B008
):
    """Takes no new requests for an adapter; what runs is finished, then its place is free."""
    service = _changed(request, body.lora_name)
    view = service.under(body.lora_name)
    try:
        service.engine.adapters.unload(body.lora_name)
    except ValueError as error:  # somebody else was faster
        raise ApiError(404, f"{error}", param="lora_name", code="model_not_found") from None
    await caller.gate.add(caller.identity, "adapters unload", request, model=view.name, subject=view.digest)
    return answer(shown(view))


def _changed(request: Request, name: str) -> Service:
    """The service whose adapter of this name comes or goes. Raises ApiError 400 where none may."""
    service = service_of(request)
    if service.load is None:
        raise ApiError(400, FIXED, code="adapters_fixed")
    if name == service.name:
        raise ApiError(400, f"{service.name} is the model itself", param="lora_name", code="invalid_value")
    return service
