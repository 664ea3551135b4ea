"""POST /v1/completions."""

from collections.abc import AsyncIterator

from fastapi import APIRouter, Depends, Request

from inference.requests import Piece, TokenLogprob
from serving.access.gate import Caller, needs
from serving.api.answers import Completion, CompletionChoice, Logprobs, Usage
from serving.api.bodies import CompletionBody
from serving.api.drawing import sampling_of
from serving.api.exchange import Exchange, Generate, begun, fits, whole
from serving.api.prompts import Prompt, bound_choices, read_prompts
from serving.api.routes import GENERATES, ends, writer_for
from serving.api.sending import answer, wants_usage
from serving.body import body_of
from serving.errors import ApiError
from serving.events import EventStream, event, unless_gone
from serving.service import Service
from serving.spelling import Offsets, Spelling

router = APIRouter()
DEFAULT_TOKENS = 16  # where max_tokens is not given


@router.post("/v1/completions", response_model=Completion, responses=ends(*GENERATES, stream=True))
async def complete(
    request: Request,
    caller: Caller = Depends(needs("completions")),  # noqa: B008
    body: CompletionBody = Depends(body_of(CompletionBody)),  # noqa: B008
):
    """Continues prompts: texts or token ids. With `stream`, server-sent events of the same shape, then [DONE]."""
    service = writer_for(request, body)
    n = body.n or 1
    if body.best_of not in (None, n):
        message = f"best_of={body.best_of} is not supported: choices are returned as they are drawn; n says how many"
        raise ApiError(400, message, param="best_of", code="unsupported_parameter")
    given = body.prompt if isinstance(body.prompt, list) and not isinstance(body.prompt[0], int) else [body.prompt]
    bound_choices(len(given), n)
    before = () if body.add_special_tokens is False else service.begin
    prompts = await read_prompts(service, body.prompt, "prompt", before=before)
    most = DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens
    ids = tuple(prompt.ids for prompt in prompts)
    fits(service, ids, most, "prompt")
    asked = {"logprobs": body.logprobs, "prompt_logprobs": body.logprobs if body.echo else None}
    exchange = Exchange(service, caller, Generate(ids, sampling_of(service, body, most, **asked), n, service.adapter))
    teller = Teller(service, exchange, prompts, body)
    if not body.stream:
        return answer(await unless_gone(request, whole(exchange, teller.gather)))
    exchange.record.stream = True
    first = await unless_gone(request, begun(exchange))
    return EventStream(teller.events(first), exchange.end)


class Teller:
    """Makes answers of the pieces of an exchange."""

    def __init__(self, service: Service, exchange: Exchange, prompts: list[Prompt], body: CompletionBody):
        self._service, self._exchange, self._prompts, self._body = service, exchange, prompts, body
        self._n = body.n or 1
        self._spelling: Spelling = service.spelling
        self._begun: dict[tuple[int, int], Offsets] = {}
        self._before: dict[int, tuple[TokenLogprob | None, ...]] = {}  # of the tokens of each prompt

    def _choice(self, number: int, piece: Piece) -> CompletionChoice:
        """What a piece adds to its choice."""
        if piece.prompt_logprobs is not None:
            self._before[number] = piece.prompt_logprobs
        first = (number, piece.index) not in self._begun
        offsets = self._begun.setdefault((number, piece.index), Offsets(self._spelling))
        found = Logprobs(top_logprobs=[] if self._body.logprobs else None)
        text = piece.text
        if first and self._body.echo:
            prompt = self._prompts[number]
            text = (self._service.tokenizer.decode(prompt.ids) if prompt.text is None else prompt.text) + text
            told = self._before.get(number, ())
            for token, logprob in zip(prompt.ids, told, strict=bool(told)) if told else ():
                self._add(found, offsets, token, logprob)
        elif first:
            offsets.skip(self._prompts[number].text or "")
        for logprob in piece.logprobs:
            self._add(found, offsets, logprob.token, logprob)
        return CompletionChoice(
            index=number * self._n + piece.index,
            text=text,
            logprobs=None if self._body.logprobs is None else found,
            finish_reason=piece.finish,
            stop_reason=piece.stopped_by,
        )

    def _add(self, found: Logprobs, offsets: Offsets, token: int, logprob: TokenLogprob | None) -> None:
        spelled = self._spelling.text
        found.tokens.append(spelled(token))
        found.text_offset.append(offsets.push(token))
        found.token_logprobs.append(None if logprob is None else logprob.logprob)
        if found.top_logprobs is not None:
            top = None if logprob is None else {spelled(other): value for other, value in logprob.top}
            found.top_logprobs.append(top)

    def _completion(self, choices: list[CompletionChoice], usage: Usage | None = None) -> Completion:
        return Completion(
            id=f"cmpl-{self._exchange.record.id}",
            created=self._exchange.created,
            model=self._service.name,
            system_fingerprint=self._service.fingerprint,
            choices=choices,
            usage=usage,
        )

    async def gather(self, exchange: Exchange) -> Completion:
        """The whole answer."""
        choices: dict[int, CompletionChoice] = {}
        while (told := await exchange.next()) is not None:
            new = self._choice(*told)
            choice = choices.setdefault(new.index, new)
            if choice is not new:
                choice.text += new.text
                choice.finish_reason, choice.stop_reason = new.finish_reason, new.stop_reason
                if new.logprobs is not None:
                    choice.logprobs.extend(new.logprobs)
        return self._completion([choices[index] for index in sorted(choices)], exchange.usage)

    async def events(self, first: tuple[int, Piece]) -> AsyncIterator[bytes]:
        """The events of a stream, after its first piece."""
        told = first
        while told is not None:
            choice = self._choice(*told)
            if choice.text or choice.finish_reason or (choice.logprobs and choice.logprobs.tokens):
                yield event(self._completion([choice]).model_dump_json())
            told = await self._exchange.next()
        if wants_usage(self._body):
            yield event(self._completion([], self._exchange.usage).model_dump_json())
