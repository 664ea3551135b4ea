"""The application: routes, each of which names who may use it, and errors, all of one shape."""

from collections.abc import Sequence

from fastapi import APIRouter, FastAPI, Request
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from serving.access.gate import Gate
from serving.api import (
    adapters,
    batches,
    chat,
    classify,
    completions,
    embeddings,
    files,
    health,
    models,
    requests,
    tokens,
)
from serving.body import Gone
from serving.errors import ApiError
from serving.schema import schema
from serving.service import Service
from serving.watch import GONE, Watch

ROUTERS = (
    *(room.router for room in (chat, completions, embeddings, classify, files, batches)),
    *(room.router for room in (models, adapters, tokens, requests, health)),
    schema,
)
TITLE = "isomesh"


def create_app(service: Service, gate: Gate, routers: Sequence[APIRouter] = ()) -> FastAPI:
    """The application of a service behind a gate; routers: of other rooms, as of metrics and of the page.

    Raises ValueError for a route that does not say who may use it.
    """
    app = FastAPI(title=TITLE, openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.service, app.state.gate = service, gate
    for router in (*ROUTERS, *routers):
        app.router.routes += router.routes  # plainly, so that all of them can be looked at
    for route in app.routes:
        if permission_of(route) is None:
            raise ValueError(f"{getattr(route, 'path', route)} does not say who may use it: see serving.access.gate")
    app.add_exception_handler(ApiError, _refused)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Gone, _gone)
    app.add_middleware(Watch, told=service.told)
    return app


def permission_of(route: Route) -> str | None:
    """Who may use a route, as it says itself: a permission, or PUBLIC; None where it says nothing."""
    if not isinstance(route, APIRoute):
        return None
    asked = [getattr(dependency.call, "permission", None) for dependency in route.dependant.dependencies]
    return next(filter(None, [getattr(route.endpoint, "permission", None), *asked]), None)


def _refused(request: Request, error: ApiError) -> Response:
    return JSONResponse(error.body, error.status, headers=error.headers)


def _http_error(request: Request, error: HTTPException) -> Response:
    path = repr(request.scope["path"][:100])
    words, code = {
        404: (f"there is nothing at {path}", "not_found"),
        405: (f"{request.method[:20]} is not for {path}", "method_not_allowed"),
    }.get(error.status_code, (str(error.detail), None))
    told = ApiError(error.status_code, words, code=code)
    return JSONResponse(told.body, error.status_code, headers=error.headers)


def _gone(request: Request, error: Gone) -> Response:
    return Response(status_code=GONE)  # nobody reads it
