"""POST /v1/embeddings: texts as vectors, of an encoder or of a model that writes."""

import base64

import numpy as np
from fastapi import APIRouter, Depends, Request

from serving.access.gate import Caller, needs
from serving.api.answers import Embedding, Embeddings, EmbeddingUsage
from serving.api.bodies import EmbeddingBody
from serving.api.classify import gathered
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
    if not service.engine.embeds:
        there = "/v1/completions" if service.labels is None else "/v1/classify"
        raise ApiError(400, f"{service.name} gives no vectors: it answers {there}", param="model")
    service.require_base()
    width = service.engine.width
    if body.dimensions is not None and body.dimensions > width:
        message = f"dimensions={body.dimensions} are more than the {width} that the vectors of {service.name} have"
        raise ApiError(400, message, param="dimensions", code="invalid_value")
    before, behind = service.around
    prompts = await read_prompts(service, body.input, "input", before=before, behind=behind)
    ids = tuple(prompt.ids for prompt in prompts)
    fits(service, ids, 0, "input")
    exchange = Exchange(service, caller, Encode(ids))
    vectors = await unless_gone(request, whole(exchange, gathered))
    if body.dimensions is not None:
        vectors = {number: _cut(vector, body.dimensions) for number, vector in vectors.items()}
    shown = _as_base64 if body.encoding_format == "base64" else list
    data = [Embedding(index=number, embedding=shown(vectors[number])) for number in sorted(vectors)]
    usage = EmbeddingUsage(prompt_tokens=exchange.prompt_tokens, total_tokens=exchange.prompt_tokens)
    return answer(Embeddings(data=data, model=service.name, usage=usage))


def _cut(vector: tuple[float, ...], dimensions: int) -> tuple[float, ...]:
    """The first so many entries, with the length that the whole vector has (Kusupati et al. 2022)."""
    whole, first = np.asarray(vector, np.float64), np.asarray(vector[:dimensions], np.float64)
    return tuple((first * np.linalg.norm(whole) / max(np.linalg.norm(first), 1e-12)).tolist())


def _as_base64(vector: tuple[float, ...]) -> str:
    return base64.b64encode(np.asarray(vector, "<f4").tobytes()).decode()
