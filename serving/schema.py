"""GET /openapi.json: the schema of what this server answers, with every status that it may end with."""

from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic.json_schema import models_json_schema

from serving.access.gate import Caller, needs
from serving.api.routes import READS, ends
from serving.body import Body

schema = APIRouter()
REF = "#/components/schemas/{model}"


@schema.get("/openapi.json", responses=ends(*READS))
async def openapi(request: Request, caller: Caller = Depends(needs("schema"))) -> dict:  # noqa: B008
    """This schema."""
    return schema_of(request.app)


def schema_of(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI schema of an application."""
    routes = [route for route in app.routes if isinstance(route, APIRoute)]
    made = get_openapi(title=app.title, version="1", routes=routes)
    bodies = {route.path: body for route in routes if (body := _body(route)) is not None}
    kinds = sorted({*bodies.values()}, key=lambda kind: kind.__name__)
    _, definitions = models_json_schema([(kind, "validation") for kind in kinds], ref_template=REF)
    components = made.setdefault("components", {}).setdefault("schemas", {})
    components |= definitions.get("$defs", {})
    components.pop("HTTPValidationError", None)
    components.pop("ValidationError", None)
    for path, methods in made["paths"].items():
        for operation in methods.values():
            operation["responses"].pop("422", None)  # FastAPI's own; here it is 400
            if path in bodies:
                reference = {"$ref": REF.format(model=bodies[path].__name__)}
                operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": reference}}}
    return made


def _body(route: APIRoute) -> type[Body] | None:
    return next((body for d in route.dependant.dependencies if (body := getattr(d.call, "body", None))), None)
