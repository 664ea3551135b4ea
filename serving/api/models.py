"""GET /v1/models and /v1/models/{id}."""

from fastapi import APIRouter, Depends, Request

from serving.access.gate import Caller, needs
from serving.api.answers import Model, Models
from serving.api.routes import READS, ends, service_of
from serving.api.sending import answer
from serving.errors import ApiError
from serving.service import Service

router = APIRouter()


def shown(service: Service) -> Model:
    """A model, or an adapter, as clients see it."""
    shared = {"created": service.created, "max_model_len": service.engine.reach}
    return Model(id=service.name, root=service.digest, parent=service.parent, **shared)


@router.get("/v1/models", response_model=Models, responses=ends(*READS))
async def models(request: Request, caller: Caller = Depends(needs("models"))):  # noqa: B008
    """The models that the caller may use."""
    service = service_of(request)
    return answer(Models(data=[shown(one) for one in service.all() if one.sees(caller.identity)]))


@router.get("/v1/models/{model:path}", response_model=Model, responses=ends(*READS, 404))
async def model(request: Request, model: str, caller: Caller = Depends(needs("models"))):  # noqa: B008
    """One of them."""
    for one in service_of(request).all():
        if one.name == model and one.sees(caller.identity):
            return answer(shown(one))
    raise ApiError(404, f"the model {model[:100]!r} is not here", param="model", code="model_not_found")
