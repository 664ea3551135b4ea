"""GET /livez and /readyz, POST /drain, GET /state."""

from dataclasses import asdict

from fastapi import APIRouter, Depends, Request

from serving.access.gate import PUBLIC, Caller, needs
from serving.api.answers import Alive, Draining
from serving.api.routes import READS, ends, service_of
from serving.api.sending import answer
from serving.errors import ApiError
from serving.lifecycle import RETRY_SECONDS

router = APIRouter()


@router.get("/livez", response_model=Alive)
async def livez():
    """Whether the process answers."""
    return answer(Alive())


@router.get("/readyz", response_model=Alive, responses=ends(503))
async def readyz(request: Request):
    """Whether the next request would be served: the model is warm, its step loop turns, and nobody has said drain."""
    if why := service_of(request).ready:
        raise ApiError(503, f"not ready: {why}", code="not_ready", retry_after=RETRY_SECONDS)
    return answer(Alive())


livez.permission = readyz.permission = PUBLIC


@router.post("/drain", response_model=Draining, responses=ends(*READS))
async def drain(request: Request, caller: Caller = Depends(needs("drain"))):  # noqa: B008
    """Takes no more work; what runs is finished. There is no way back but a new start."""
    lifecycle = service_of(request).lifecycle
    lifecycle.drain()
    return answer(Draining(at_work=lifecycle.at_work))


@router.get("/state", responses=ends(*READS))
async def state(request: Request, caller: Caller = Depends(needs("state"))) -> dict:  # noqa: B008
    """The state of the engine: what runs and waits, its cache, and totals since the start."""
    service = service_of(request)
    return asdict(service.engine.state()) | {"model": service.name, "at_work": service.lifecycle.at_work}
