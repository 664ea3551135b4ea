"""From the fields of a body to the settings of the engine."""

import json
from collections.abc import Sequence

from inference.grammar import written
from inference.requests import Sampling
from serving.api.bodies import LONGEST_GRAMMAR, Drawing
from serving.errors import ApiError
from serving.service import Service

KINDS = {"json": "json_schema", "grammar": "lark"}  # as clients call them -> as inference.grammar does


def sampling_of(
    service: Service,
    body: Drawing,
    max_tokens: int,
    *,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    stop_ids: Sequence[int] = (),
) -> Sampling:
    """The settings of a request. Raises ApiError 400 for what cannot be."""
    given = lambda name, default: default if (value := getattr(body, name)) is None else value
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    try:
        return Sampling(
            max_tokens=max_tokens,
            temperature=float(given("temperature", 1.0)),
            top_k=max(0, given("top_k", 0)),  # -1 is vLLM's "off"
            top_p=float(given("top_p", 1.0)),
            min_p=float(given("min_p", 0.0)),
            repetition_penalty=float(given("repetition_penalty", 1.0)),
            presence_penalty=float(given("presence_penalty", 0.0)),
            frequency_penalty=float(given("frequency_penalty", 0.0)),
            logit_bias=_bias(service, body.logit_bias or {}),
            seed=body.seed,
            stop=tuple(text for text in stop if text),  # clients send "" for none
            stop_ids=(*stop_ids, *_ends(service, given("stop_token_ids", ()))),
            ignore_eos=bool(body.ignore_eos),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            grammar=grammar_of(body),
        )
    except ValueError as error:
        raise ApiError(400, str(error), code="invalid_value") from None


def _ends(service: Service, given: Sequence[int]) -> Sequence[int]:
    if strange := next((token for token in given if token >= service.engine.vocabulary), None):
        message = f"stop_token_ids: {strange} is no token; they are 0 to {service.engine.vocabulary - 1}"
        raise ApiError(400, message, param="stop_token_ids", code="invalid_value")
    return given


def _bias(service: Service, given: dict[str, float]) -> dict[int, float]:
    found = {}
    for token, bias in given.items():
        if not (token.isascii() and token.isdigit() and len(token) < 12 and int(token) < service.engine.vocabulary):
            message = f"logit_bias: {token[:20]!r} is no token; they are 0 to {service.engine.vocabulary - 1}"
            raise ApiError(400, message, param="logit_bias", code="invalid_value")
        if not -100 <= bias <= 100:
            raise ApiError(400, f"logit_bias: {bias} must be -100 to 100", param="logit_bias", code="invalid_value")
        found[int(token)] = float(bias)
    return found


def grammar_of(body: Drawing) -> str | None:
    """What the text must match, as `inference.grammar` makes it; None for anything. Raises ApiError 400."""
    asked = {field: made for field, made in _constraints(body) if made is not None}
    if not asked:
        return None
    if len(asked) > 1:
        raise ApiError(400, f"give one of {', '.join(asked)}", param=[*asked][1], code="invalid_value")
    ((field, (kind, source)),) = asked.items()
    try:
        return written(KINDS.get(kind, kind), source)
    except ValueError as error:
        raise ApiError(400, f"{field}: {error}", param=field, code="invalid_grammar") from None


def _constraints(body: Drawing):
    """(field, (kind, source) or None) of every way to ask for a constraint."""
    form, structured = body.response_format, body.structured_outputs
    if form is not None:
        yield "response_format", _of_format(form)
    for field, holder, names in (
        ("structured_outputs", structured, ("json_", "regex", "choice", "grammar")),
        ("guided", body, ("guided_json", "guided_regex", "guided_choice", "guided_grammar")),
    ):
        for name in names if holder is not None else ():
            value, kind = getattr(holder, name), name.removeprefix("guided_").rstrip("_")
            shown = name if field == "guided" else f"{field}.{kind}"
            yield shown, None if value is None else (kind, _source(shown, value))


def _of_format(form) -> tuple[str, str] | None:
    param = "response_format"
    if form.type == "text":
        return None
    if form.type == "json_object":
        return "json_object", ""
    if form.type == "regex":
        if form.regex is None:
            raise ApiError(400, "response_format of type regex needs the field regex", param=param)
        return "regex", form.regex
    if form.json_schema is None or form.json_schema.schema_ is None:
        raise ApiError(400, "response_format of type json_schema needs json_schema.schema", param=param)
    return "json_schema", _source(param, form.json_schema.schema_)


def _source(field: str, value) -> str:
    """A schema or a list of choices as text, within bounds."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if len(text) > LONGEST_GRAMMAR:
        message = f"{field} has {len(text)} characters; at most {LONGEST_GRAMMAR} are read"
        raise ApiError(400, message, param=field, code="invalid_value")
    return text
