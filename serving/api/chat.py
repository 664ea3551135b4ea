"""POST /v1/chat/completions."""

from collections.abc import AsyncIterator

from fastapi import APIRouter, Depends, Request

from inference.requests import Piece, TokenLogprob
from serving.access.gate import Caller, needs
from serving.api.answers import (
    Chat,
    ChatChoice,
    ChatChunk,
    ChatLogprobs,
    ChatMessage,
    ChatToken,
    ChunkChoice,
    Delta,
    TopToken,
    Usage,
)
from serving.api.bodies import ChatBody
from serving.api.drawing import sampling_of
from serving.api.exchange import Exchange, Generate, begun, fits, whole
from serving.api.messages import read_messages
from serving.api.prompts import bound_choices
from serving.api.routes import GENERATES, ends, writer_for
from serving.api.sending import answer, wants_usage
from serving.body import body_of
from serving.errors import ApiError
from serving.events import EventStream, event, unless_gone
from serving.service import Service

router = APIRouter()


@router.post("/v1/chat/completions", response_model=Chat, responses=ends(*GENERATES, stream=True))
async def chat(
    request: Request,
    caller: Caller = Depends(needs("chat")),  # noqa: B008
    body: ChatBody = Depends(body_of(ChatBody)),  # noqa: B008
):
    """Answers the last message of a chat. With `stream`, server-sent events of `chat.completion.chunk`, then [DONE]."""
    service = writer_for(request, body)
    if body.top_logprobs and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs=true", param="top_logprobs", code="invalid_value")
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        message = "max_tokens and max_completion_tokens mean the same: give one of them"
        raise ApiError(400, message, param="max_tokens", code="invalid_value")
    n = body.n or 1
    bound_choices(1, n)
    ids = tuple(await read_messages(service, body.messages))
    asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    most = fits(service, (ids,), asked, "messages")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    sampling = sampling_of(service, body, most, logprobs=logprobs, stop_ids=service.chat.stop_ids)
    exchange = Exchange(service, caller, Generate((ids,), sampling, n, service.adapter))
    teller = Teller(service, exchange, body)
    if not body.stream:
        return answer(await unless_gone(request, whole(exchange, teller.gather)))
    exchange.record.stream = True
    first = await unless_gone(request, begun(exchange))
    return EventStream(teller.events(first), exchange.end)


class Teller:
    """Makes answers of the pieces of an exchange."""

    def __init__(self, service: Service, exchange: Exchange, body: ChatBody):
        self._service, self._exchange, self._body = service, exchange, body
        self._heads = {
            "id": f"chatcmpl-{exchange.record.id}",
            "created": exchange.created,
            "model": service.name,
            "system_fingerprint": service.fingerprint,
        }

    def _logprobs(self, piece: Piece) -> ChatLogprobs | None:
        return ChatLogprobs(content=[self._token(one) for one in piece.logprobs]) if self._body.logprobs else None

    def _token(self, one: TokenLogprob) -> ChatToken:
        top = [TopToken(**self._spelled(token), logprob=logprob) for token, logprob in one.top]
        return ChatToken(**self._spelled(one.token), logprob=one.logprob, top_logprobs=top)

    def _spelled(self, token: int) -> dict:
        raw = self._service.spelling.bytes(token)
        return {"token": self._service.spelling.text(token), "bytes": None if raw is None else list(raw)}

    async def gather(self, exchange: Exchange) -> Chat:
        """The whole answer."""
        texts: dict[int, list[str]] = {}
        logprobs: dict[int, ChatLogprobs] = {}
        ends: dict[int, Piece] = {}
        while (told := await exchange.next()) is not None:
            _, piece = told
            texts.setdefault(piece.index, []).append(piece.text)
            if self._body.logprobs:
                logprobs.setdefault(piece.index, ChatLogprobs(content=[])).content += self._logprobs(piece).content
            if piece.finish is not None:
                ends[piece.index] = piece
        choices = [
            ChatChoice(
                index=index,
                message=ChatMessage(content="".join(texts[index])),
                logprobs=logprobs.get(index),
                finish_reason=ends[index].finish,
                stop_reason=ends[index].stopped_by,
            )
            for index in sorted(texts)
        ]
        return Chat(**self._heads, choices=choices, usage=exchange.usage)

    def _chunk(self, choices: list[ChunkChoice], usage: Usage | None = None) -> bytes:
        return event(ChatChunk(**self._heads, choices=choices, usage=usage).model_dump_json())

    async def events(self, first: tuple[int, Piece]) -> AsyncIterator[bytes]:
        """The events of a stream, after its first piece: of each choice its role first, its end last."""
        told, begun_choices = first, set()
        while told is not None:
            _, piece = told
            if piece.index not in begun_choices:
                begun_choices.add(piece.index)
                yield self._chunk([ChunkChoice(index=piece.index, delta=Delta(role="assistant", content=""))])
            if piece.text or piece.logprobs:
                delta = Delta(content=piece.text)
                yield self._chunk([ChunkChoice(index=piece.index, delta=delta, logprobs=self._logprobs(piece))])
            if piece.finish is not None:
                end = {"finish_reason": piece.finish, "stop_reason": piece.stopped_by}
                yield self._chunk([ChunkChoice(index=piece.index, delta=Delta(), **end)])
            told = await self._exchange.next()
        if wants_usage(self._body):
            yield self._chunk([], self._exchange.usage)
