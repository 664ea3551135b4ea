"""POST /v1/classify: texts, or pairs of texts, as labels with their probabilities; of a model with a head of classes.

The answer has the shape of vLLM's /classify, and more: probabilities by the labels' names, and what holds for several
labels a text and for numbers.
"""

import numpy as np
from fastapi import APIRouter, Depends, Request

from inference.requests import Encoded
from serving.access.gate import Caller, needs
from serving.api.answers import Classification, Classifications, EmbeddingUsage
from serving.api.bodies import ClassifyBody, TextPair
from serving.api.exchange import Encode, Exchange, fits, whole
from serving.api.prompts import read_prompts
from serving.api.routes import GENERATES, ends, service_for
from serving.api.sending import answer
from serving.body import body_of
from serving.errors import ApiError
from serving.events import unless_gone
from serving.service import Labels, Service

router = APIRouter()
LIKELY = 0.5  # of several labels, each for itself: from here on a text has it


@router.post("/v1/classify", response_model=Classifications, responses=ends(*GENERATES))
async def classify(
    request: Request,
    caller: Caller = Depends(needs("classify")),  # noqa: B008
    body: ClassifyBody = Depends(body_of(ClassifyBody)),  # noqa: B008
):
    """The label of each text, of each pair of texts, or of each list of token ids."""
    service = service_for(request, body)
    if service.labels is None:
        there = "/v1/embeddings" if service.engine.encoder else "/v1/completions"
        raise ApiError(400, f"{service.name} has no head of classes: it answers {there}", param="model")
    service.require_base()
    ids, types = await _read(service, body)
    fits(service, ids, 0, "input")
    exchange = Exchange(service, caller, Encode(ids, types))
    logits = await unless_gone(request, whole(exchange, gathered))
    data = [judged(service.labels, number, logits[number]) for number in sorted(logits)]
    usage = EmbeddingUsage(prompt_tokens=exchange.prompt_tokens, total_tokens=exchange.prompt_tokens)
    about = {"id": f"classify-{exchange.record.id}", "created": exchange.created, "model": service.name}
    return answer(Classifications(**about, data=data, usage=usage))


async def _read(service: Service, body: ClassifyBody) -> tuple[tuple, tuple]:
    """The tokens of each input, and their types: 1 in the second text of a pair, else 0."""
    before, behind = service.around
    given = [body.input] if isinstance(body.input, TextPair) else body.input
    if not isinstance(given, list) or not isinstance(given[0], TextPair):
        prompts = await read_prompts(service, given, "input", before=before, behind=behind)
        return tuple(prompt.ids for prompt in prompts), ()
    firsts = await read_prompts(service, [pair.text for pair in given], "input", before=before, behind=behind)
    seconds = await read_prompts(service, [pair.pair for pair in given], "input", behind=behind)
    both = [(first.ids, second.ids) for first, second in zip(firsts, seconds, strict=True)]
    return tuple(a + b for a, b in both), tuple((0,) * len(a) + (1,) * len(b) for a, b in both)


async def gathered(exchange: Exchange) -> dict[int, tuple[float, ...]]:
    """What the model says of each input, by its number."""
    found: dict[int, tuple[float, ...]] = {}
    while (told := await exchange.next()) is not None:
        number, encoded = told
        assert isinstance(encoded, Encoded)
        found[number] = encoded.vector
    return found


def judged(labels: Labels, index: int, logits: tuple[float, ...]) -> Classification:
    """The answer for one input, by its logits."""
    logits_C = np.asarray(logits, np.float64)
    if labels.kind == "regression":
        values = dict(zip(labels.names, logits_C.tolist(), strict=True))
        return Classification(index=index, num_classes=len(logits), values=values)
    if labels.kind == "several":
        probs_C = 1 / (1 + np.exp(-np.clip(logits_C, -500, 500)))
    else:
        probs_C = np.exp(logits_C - logits_C.max())
        probs_C /= probs_C.sum()
    probs = probs_C.tolist()
    likely = [name for name, p in zip(labels.names, probs, strict=True) if p >= LIKELY]
    return Classification(
        index=index, label=labels.names[int(probs_C.argmax())], labels=likely if labels.kind == "several" else None,
        probs=probs, probabilities=dict(zip(labels.names, probs, strict=True)), num_classes=len(probs),
    )  # fmt: skip
