"""What endpoints have in common: the service of a request, and the statuses that a route may end with."""

from fastapi import Request

from serving.api.answers import Error
from serving.api.bodies import Drawing, refuse_unsupported
from serving.body import Body
from serving.service import Service

READS = (400, 401, 403, 429, 500, 503)  # any route behind the gate
SENDS = (*READS, 404, 408, 413, 415)  # one that also has a body
GENERATES = (*SENDS, 409)  # one that works with the model, and can be ended by DELETE


def service_of(request: Request) -> Service:
    """The service of the application that a request came to."""
    return request.app.state.service


def service_for(request: Request, body: Body) -> Service:
    """The service as that of the model or adapter that the body names, if it names any. Raises ApiError 404."""
    return service_of(request).under(body.model)


def writer_for(request: Request, body: Drawing) -> Service:
    """The same for a body that wants a text. Raises ApiError where the model writes none or the body asks too much."""
    service = service_for(request, body)
    service.require_decoder()
    refuse_unsupported(body)
    return service


def ends(*statuses: int, stream: bool = False) -> dict:
    """`responses` of a route."""
    found = {status: {"model": Error, "description": WORDS[status]} for status in statuses}
    if stream:
        found[200] = {"content": {"text/event-stream": {"schema": {"type": "string"}}}}
    return found


WORDS = {
    400: "The request is not one that can be served; `param` names the field",
    401: "Credentials are missing or not valid",
    403: "These credentials do not allow it",
    404: "There is no such thing here",
    408: "The body did not arrive in time",
    409: "The request was ended by its owner",
    413: "The body is too long",
    415: "The body is not plain JSON",
    429: "Beyond the limits of these credentials; Retry-After says when to come again",
    500: "A fault of the server",
    503: "No room, or the server is going down; Retry-After says when to come again",
}
