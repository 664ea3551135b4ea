"""POST /tokenize and /detokenize, GET /tokenizer_info: as vLLM has them, for clients that count or cut tokens."""

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from serving.access.gate import Caller, needs
from serving.api.answers import Text, TokenizerInfo, Tokens
from serving.api.bodies import DetokenizeBody, TokenizeBody
from serving.api.messages import read_messages
from serving.api.routes import READS, SENDS, ends, service_for, service_of
from serving.api.sending import answer
from serving.body import body_of
from serving.errors import ApiError

router = APIRouter()


@router.post("/tokenize", response_model=Tokens, responses=ends(*SENDS))
async def tokenize(
    request: Request,
    caller: Caller = Depends(needs("tokens")),  # noqa: B008
    body: TokenizeBody = Depends(body_of(TokenizeBody)),  # noqa: B008
):
    """The tokens of a prompt, however long, or of a chat, as the model would read them. A text has no special ones."""
    service = service_for(request, body)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "give one of prompt and messages", param="prompt", code="invalid_value")
    if body.messages is not None:
        ids = await read_messages(service, body.messages, generation_prompt=body.add_generation_prompt is not False)
    else:
        ids = await service.in_thread(len(body.prompt), lambda: service.tokenizer.encode(body.prompt).tolist())
        if body.add_special_tokens is not False:
            ids = [*service.begin, *ids, *service.end]

    def told() -> Response:
        strings = [service.spelling.text(token) for token in ids] if body.return_token_strs else None
        about = {"count": len(ids), "max_model_len": service.engine.reach}
        return answer(Tokens.model_construct(**about, tokens=ids, token_strs=strings))  # millions are not checked again

    return await service.in_thread(len(ids), told)


@router.post("/detokenize", response_model=Text, responses=ends(*SENDS))
async def detokenize(
    request: Request,
    caller: Caller = Depends(needs("tokens")),  # noqa: B008
    body: DetokenizeBody = Depends(body_of(DetokenizeBody)),  # noqa: B008
):
    """The text of tokens; special and unknown ones have none."""
    service = service_for(request, body)
    text = await service.in_thread(len(body.tokens), lambda: service.tokenizer.decode(body.tokens))
    return answer(Text(prompt=text))


@router.get("/tokenizer_info", response_model=TokenizerInfo, responses=ends(*READS))
async def tokenizer_info(request: Request, caller: Caller = Depends(needs("tokens"))):  # noqa: B008
    """What a client needs to prepare texts as this server does."""
    service = service_of(request)
    tokenizer, spelling = service.tokenizer, service.spelling
    chat = service.chat
    return answer(
        TokenizerInfo(
            tokenizer_class=type(tokenizer).__name__,
            vocab_size=tokenizer.vocab_size,
            model_max_length=service.engine.reach,
            bos_token=spelling.name_of(service.begin[0]) if service.begin else None,
            eos_token=spelling.name_of(tokenizer.eos_id),
            chat_template=None if chat is None else chat.source,
            digest=tokenizer.digest,
        )
    )
