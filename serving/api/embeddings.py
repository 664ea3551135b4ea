"""POST /v1/embeddings: texts as vectors, of an encoder."""

import base64

import numpy as np
from fastapi import APIRouter, Depends, Request

from serving.access.gate import Caller, needs
from serving.api.answers import Embedding, Embeddings, EmbeddingUsage
from serving.api.bodies import EmbeddingBody
from serving.api.exchange import Encode, Exchange, fits, whole
from serving.api.prompts import read_prompts
from serving.api.routes import GENERATES, ends, service_for
from serving.api.sending import answer
from serving.body import body_of
from serving.errors import ApiError
from serving.events import unless_gone

router = APIRouter()


@router.post("/v1/embeddings", response_model=Embeddings, responses=ends(*GENERATES))
async def embed(
    request: Request,
    caller: Caller = Depends(needs("embeddings")),  # noqa: B008
    body: EmbeddingBody = Depends(body_of(EmbeddingBody)),  # noqa: B008
):
    """A vector for each text or list of token ids."""
    service = service_for(request, body)
    if not service.engine.encoder:
        raise ApiError(400, f"{service.name} is no encoder: it answers /v1/completions", param="model")
    if body.dimensions is not None:
        message = f"dimensions={body.dimensions}: the vectors of {service.name} cannot be shortened"
        raise ApiError(400, message, param="dimensions", code="unsupported_parameter")
    prompts = await read_prompts(service, body.input, "input", before=service.begin, behind=service.end)
    ids = tuple(prompt.ids for prompt in prompts)
    fits(service, ids, 0, "input")
    exchange = Exchange(service, caller, Encode(ids))
    vectors = await unless_gone(request, whole(exchange, _gather))
    shown = _as_base64 if body.encoding_format == "base64" else list
    data = [Embedding(index=number, embedding=shown(vectors[number])) for number in sorted(vectors)]
    usage = EmbeddingUsage(prompt_tokens=exchange.prompt_tokens, total_tokens=exchange.prompt_tokens)
    return answer(Embeddings(data=data, model=service.name, usage=usage))


async def _gather(exchange: Exchange) -> dict[int, tuple[float, ...]]:
    vectors = {}
    while (told := await exchange.next()) is not None:
        number, encoded = told
        vectors[number] = encoded.vector
    return vectors


def _as_base64(vector: tuple[float, ...]) -> str:
    return base64.b64encode(np.asarray(vector, "<f4").tobytes()).decode()
