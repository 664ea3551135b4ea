"""What clients may send. Fields and bounds are those of the OpenAI API; what it lacks is called as vLLM calls it.

A field that nobody knows is refused, as OpenAI does: a misspelled `max_token` must not go unnoticed. Fields that change
nothing here (`user`, `metadata`, ...) are taken; those that would change the answer and cannot (`tools`, ...) are named
in `UNSUPPORTED` and refused with a reason.
"""

from typing import Annotated, Any, Literal

from pydantic import Field

from inference.requests import MOST_BIASED, MOST_STOPS, MOST_TOP
from serving.body import Body
from serving.errors import ApiError

MOST_CHOICES = 128  # prompts x choices of a request
MOST_MESSAGES = 1024
MOST_INPUTS = 256  # texts of a request for embeddings
LONGEST_STOP = 256  # characters
LONGEST_GRAMMAR = 64 << 10  # characters of a pattern
MOST_IDS = 1 << 20  # tokens of a prompt, before it is known what the model reads
# field -> why it cannot be; null, or what says "no" anyway, is taken
UNSUPPORTED = {
    "tools": "tools are not supported: this server neither offers nor parses calls",
    "tool_choice": "tools are not supported",
    "parallel_tool_calls": "tools are not supported",
    "functions": "functions are not supported",
    "function_call": "functions are not supported",
    "audio": "answers are text",
    "modalities": "answers are text",
    "prediction": "predicted outputs are not supported",
    "web_search_options": "this server does not search",
    "suffix": "the model writes behind a prompt, not into a gap: suffix is not supported",
}
NEUTRAL = (None, [], {}, "none", "", ["text"], False)

Name = Annotated[str, Field(max_length=256)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
Ids = Annotated[list[TokenId], Field(max_length=MOST_IDS, fail_fast=True)]  # a million mistakes are not all told
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]


class StreamOptions(Body):
    """How a stream is told."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class JsonSchema(Body):
    """A schema that an answer has to fit."""

    name: str | None = Field(None, max_length=64)
    description: str | None = Field(None, max_length=4096)
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """What an answer has to be: `regex` is this server's own."""

    type: Literal["text", "json_object", "json_schema", "regex"]
    json_schema: JsonSchema | None = None
    regex: str | None = Field(None, max_length=LONGEST_GRAMMAR)


class StructuredOutputs(Body):
    """The same, as vLLM has it: exactly one of these."""

    json_: dict[str, Any] | str | None = Field(None, alias="json", description="a JSON schema, or one as a string")
    regex: str | None = Field(None, max_length=LONGEST_GRAMMAR)
    choice: list[Annotated[str, Field(min_length=1, max_length=4096)]] | None = Field(None, max_length=256)
    grammar: str | None = Field(None, max_length=LONGEST_GRAMMAR)


class Drawing(Body):
    """How text is drawn: shared by chats and completions."""

    model: Name | None = None
    max_tokens: int | None = Field(None, ge=0, le=MOST_IDS)
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = Field(None, max_length=MOST_BIASED)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stop: (
        Annotated[str, Field(max_length=LONGEST_STOP)]
        | Annotated[list[Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]], Field(max_length=MOST_STOPS)]
        | None
    ) = Field(None, description=f"a string, or a list of at most {MOST_STOPS}, each of 1 to {LONGEST_STOP} characters")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, max_length=256)
    # of vLLM
    top_k: int | None = Field(None, ge=-1, le=1 << 30)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = Field(None, description="a JSON schema, or one as a string")
    guided_regex: str | None = Field(None, max_length=LONGEST_GRAMMAR)
    guided_choice: list[Annotated[str, Field(min_length=1, max_length=4096)]] | None = Field(None, max_length=256)
    guided_grammar: str | None = Field(None, max_length=LONGEST_GRAMMAR)


class CompletionBody(Drawing):
    """POST /v1/completions."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MOST_CHOICES, fail_fast=True)]
        | Annotated[Ids, Field(min_length=1)]
        | Annotated[
            list[Annotated[Ids, Field(min_length=1)]], Field(min_length=1, max_length=MOST_CHOICES, fail_fast=True)
        ]
    ) = Field(description=f"a string, a list of token ids, or a list of 1 to {MOST_CHOICES} of either")
    best_of: int | None = Field(None, ge=1, le=MOST_CHOICES)
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MOST_TOP)
    suffix: Any = None
    add_special_tokens: bool | None = None  # of vLLM: whether a text gets what the model wants before it (true)


class Part(Body):
    """A part of a message: text is all that is read."""

    type: str = Field(max_length=64)
    text: str | None = None


class Message(Body):
    """A message of a chat."""

    role: str = Field(max_length=64)
    content: str | Annotated[list[Part], Field(max_length=256)] | None = Field(
        None, description="a string or a list of parts like {type: text, text: ...}"
    )
    name: Name | None = None
    refusal: str | None = None
    tool_calls: Any = None
    tool_call_id: Any = None
    function_call: Any = None
    audio: Any = None


class ChatBody(Drawing):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=MOST_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=0, le=MOST_IDS)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_TOP)
    # these change nothing here
    metadata: Metadata | None = None
    store: bool | None = None
    service_tier: str | None = Field(None, max_length=64)
    safety_identifier: str | None = Field(None, max_length=256)
    prompt_cache_key: str | None = Field(None, max_length=256)
    # these cannot be
    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: Any = None
    functions: Any = None
    function_call: Any = None
    audio: Any = None
    modalities: Any = None
    prediction: Any = None
    web_search_options: Any = None


class EmbeddingBody(Body):
    """POST /v1/embeddings."""

    model: Name | None = None
    input: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MOST_INPUTS, fail_fast=True)]
        | Annotated[Ids, Field(min_length=1)]
        | Annotated[
            list[Annotated[Ids, Field(min_length=1)]], Field(min_length=1, max_length=MOST_INPUTS, fail_fast=True)
        ]
    ) = Field(description=f"a string, a list of token ids, or a list of 1 to {MOST_INPUTS} of either")
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1, le=1 << 20)
    user: str | None = Field(None, max_length=256)


class TextPair(Body):
    """Two texts that are judged together, as a model that was trained on pairs reads them."""

    text: str
    pair: str


class ClassifyBody(Body):
    """POST /v1/classify."""

    model: Name | None = None
    input: (
        str
        | TextPair
        | Annotated[list[str], Field(min_length=1, max_length=MOST_INPUTS, fail_fast=True)]
        | Annotated[list[TextPair], Field(min_length=1, max_length=MOST_INPUTS, fail_fast=True)]
        | Annotated[Ids, Field(min_length=1)]
        | Annotated[
            list[Annotated[Ids, Field(min_length=1)]], Field(min_length=1, max_length=MOST_INPUTS, fail_fast=True)
        ]
    ) = Field(
        description=f"a string, a pair like {{text: ..., pair: ...}}, a list of token ids, "
        f"or a list of 1 to {MOST_INPUTS} of one kind"
    )
    user: str | None = Field(None, max_length=256)


class BatchBody(Body):
    """POST /v1/batches."""

    input_file_id: str = Field(max_length=64)
    endpoint: str = Field(max_length=64)
    completion_window: Literal["24h"]
    metadata: Metadata | None = None


class TokenizeBody(Body):
    """POST /tokenize: a prompt, or the messages of a chat."""

    model: Name | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1, max_length=MOST_MESSAGES)
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: Name | None = None
    tokens: Ids


class LoadAdapterBody(Body):
    """POST /v1/load_lora_adapter."""

    lora_name: Annotated[str, Field(min_length=1, max_length=128)]
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]  # a run's directory, or a folder of peft


class UnloadAdapterBody(Body):
    """POST /v1/unload_lora_adapter."""

    lora_name: Annotated[str, Field(min_length=1, max_length=128)]


def refuse_unsupported(body: Body) -> None:
    """Raises ApiError 400 for a field that asks for what this server does not do."""
    for name in UNSUPPORTED.keys() & type(body).model_fields.keys():
        if getattr(body, name) not in NEUTRAL:
            raise ApiError(400, UNSUPPORTED[name], param=name, code="unsupported_parameter")
