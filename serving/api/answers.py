"""What the endpoints answer: these classes are both the documented schema and what is sent."""

from typing import Literal

from pydantic import BaseModel, Field

Finish = Literal["stop", "length"]


class ErrorDetail(BaseModel):
    """A mistake or a fault."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    """The body of every answer that is not what was asked for."""

    error: ErrorDetail


class PromptDetails(BaseModel):
    """Of the tokens of the prompt."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens of all prompts and choices of a request; a prompt counts once, whatever n."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails | None = None

    @classmethod
    def of(cls, prompt: int, new: int, cached: int = 0) -> "Usage":
        """Usage of so many tokens."""
        details = PromptDetails(cached_tokens=cached)
        return cls(
            prompt_tokens=prompt, completion_tokens=new, total_tokens=prompt + new, prompt_tokens_details=details
        )


class Logprobs(BaseModel):
    """Token by token; null where nothing stands before the first token of a prompt."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] | None = None
    text_offset: list[int] = []

    def extend(self, more: "Logprobs") -> None:
        """Adds what came later."""
        for name in type(self).model_fields:
            if (mine := getattr(self, name)) is not None:
                mine.extend(getattr(more, name))


class CompletionChoice(BaseModel):
    """A text."""

    index: int
    text: str
    logprobs: Logprobs | None = None
    finish_reason: Finish | None = None
    stop_reason: str | int | None = None  # the stop string or token that ended it


class Completion(BaseModel):
    """Answer of /v1/completions; the events of a stream have the same shape."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TopToken(BaseModel):
    """A token that could have stood here."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatToken(TopToken):
    """A token of an answer."""

    top_logprobs: list[TopToken]


class ChatLogprobs(BaseModel):
    """Token by token."""

    content: list[ChatToken]
    refusal: None = None


class ChatMessage(BaseModel):
    """An answer."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """An answer, and how it ended."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Finish
    stop_reason: str | int | None = None


class Chat(BaseModel):
    """Answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(BaseModel):
    """What an event adds to an answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    """A choice of an event."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: Finish | None = None
    stop_reason: str | int | None = None


class ChatChunk(BaseModel):
    """An event of a streamed chat."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


class EmbeddingUsage(BaseModel):
    """Tokens that were read."""

    prompt_tokens: int
    total_tokens: int


class Embedding(BaseModel):
    """A vector, or its float32 little-endian bytes in base64."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class Embeddings(BaseModel):
    """Answer of /v1/embeddings."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class Classification(BaseModel):
    """What one input is: its likeliest label and the probabilities of all, or numbers where the model tells numbers."""

    index: int
    label: str | None = None
    labels: list[str] | None = Field(None, description="where a text may have several: those of at least 0.5")
    probs: list[float] = Field([], description="in the order of the model's labels")
    probabilities: dict[str, float] = Field({}, description="the same by label")
    num_classes: int
    values: dict[str, float] | None = Field(None, description="of a regression")


class Classifications(BaseModel):
    """Answer of /v1/classify."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Classification]
    usage: EmbeddingUsage


class File(BaseModel):
    """A file that is kept for its owner."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"


class Files(BaseModel):
    """Answer of GET /v1/files."""

    object: Literal["list"] = "list"
    data: list[File]
    has_more: bool
    first_id: str | None = None
    last_id: str | None = None


class DeletedFile(BaseModel):
    """Answer of DELETE /v1/files/{id}."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class BatchError(BaseModel):
    """Why a batch was not run, or not to its end."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None


class BatchErrors(BaseModel):
    """The first of them."""

    object: Literal["list"] = "list"
    data: list[BatchError]


class BatchCounts(BaseModel):
    """Lines of a batch."""

    total: int
    completed: int
    failed: int


class Batch(BaseModel):
    """A batch, as its owner sees it; times are seconds since 1970."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    errors: BatchErrors | None = None
    input_file_id: str
    completion_window: str
    status: Literal[
        "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
    ]
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: int
    in_progress_at: int | None = None
    expires_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: BatchCounts
    metadata: dict[str, str] | None = None


class ManyBatches(BaseModel):
    """Answer of GET /v1/batches."""

    object: Literal["list"] = "list"
    data: list[Batch]
    has_more: bool
    first_id: str | None = None
    last_id: str | None = None


class Model(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "isomesh"
    max_model_len: int
    root: str  # digest of its weights
    parent: str | None = None  # of an adapter: the model that it stands beside


class Models(BaseModel):
    """Answer of /v1/models."""

    object: Literal["list"] = "list"
    data: list[Model]


class Tokens(BaseModel):
    """Answer of /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Text(BaseModel):
    """Answer of /detokenize."""

    prompt: str


class TokenizerInfo(BaseModel):
    """Answer of /tokenizer_info: what a client needs to prepare text as this server does."""

    tokenizer_class: str
    vocab_size: int
    model_max_length: int
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None = None
    chat_template: str | None
    digest: str


class OneRequest(BaseModel):
    """A request that is under way."""

    id: str
    object: Literal["request"] = "request"
    created: float
    model: str
    client_request_id: str | None
    prompt_tokens: int
    new_tokens: int
    ended: bool


class Requests(BaseModel):
    """Answer of /v1/requests: one's own that are under way."""

    object: Literal["list"] = "list"
    data: list[OneRequest]


class Alive(BaseModel):
    """Answer of /livez and /readyz."""

    status: Literal["ok"] = "ok"


class Draining(BaseModel):
    """Answer of /drain."""

    draining: Literal[True] = True
    at_work: int = Field(description="requests whose answers are not complete")
