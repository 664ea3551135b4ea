"""Prompts as tokens: bounded before they are tokenized, and never by the event loop where they are long."""

from collections.abc import Sequence
from dataclasses import dataclass

from serving.api.bodies import MOST_CHOICES
from serving.errors import ApiError
from serving.service import Service


@dataclass(frozen=True)
class Prompt:
    """What the model reads, and its text as the client knows it; None for token ids."""

    ids: tuple[int, ...]
    text: str | None = None


def bound(service: Service, texts: Sequence[str], param: str) -> None:
    """Raises ApiError 400 for a text that cannot fit whatever its tokens are."""
    most = service.engine.reach * service.longest_token
    if texts and (longest := max(map(len, texts))) > most:
        message = f"{param} has {longest} characters: more than the {service.engine.reach} tokens that {service.name} "
        raise ApiError(400, message + "reads can hold", param=param, code="context_length_exceeded")


async def read_prompts(
    service: Service, given: str | list, param: str, *, before: Sequence[int] = (), behind: Sequence[int] = ()
) -> list[Prompt]:
    """The prompts of a body: a text, texts, token ids, or lists of token ids; texts stand between these tokens."""
    if isinstance(given, str):
        given = [given]
    if isinstance(given[0], int):
        given = [given]
    if not isinstance(given[0], str):
        return [Prompt(tuple(ids)) for ids in given]
    bound(service, given, param)
    tokenizer = service.tokenizer
    encoded = await service.in_thread(sum(map(len, given)), lambda: tokenizer.encode_batch(given))
    # an empty text is the beginning of a document
    empty = () if before or behind else (tokenizer.eos_id,)
    return [Prompt((*before, *ids.tolist(), *behind) or empty, text) for ids, text in zip(encoded, given, strict=True)]


def bound_choices(prompts: int, n: int) -> None:
    """Raises ApiError 400 for too many choices in all."""
    if prompts * n > MOST_CHOICES:
        message = f"{prompts} prompts x {n} choices = {prompts * n} are more than {MOST_CHOICES}"
        raise ApiError(400, message, param="n", code="invalid_value")
