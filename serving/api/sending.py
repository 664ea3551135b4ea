"""How answers are written."""

from pydantic import BaseModel
from starlette.responses import Response

from serving.api.bodies import Drawing


def answer(body: BaseModel, status: int = 200) -> Response:
    """JSON, as documented."""
    return Response(body.model_dump_json(), status, media_type="application/json")


def wants_usage(body: Drawing) -> bool:
    """Whether a stream is to end with its usage."""
    return body.stream_options is not None and bool(body.stream_options.include_usage)
