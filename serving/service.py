"""What the endpoints share: the engine, how its model is called, its tokenizer and chat template, and what runs."""

import asyncio
import contextlib
import copy
import hashlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar
from weakref import WeakValueDictionary

from data.chat import ChatTemplate
from data.tokenizer import Tokenizer
from inference.adapter_books import Adapter, AdapterBooks
from inference.engine_options import EngineOptions
from inference.requests import EncodeRequest, EngineState, Listener, Request
from serving.access.gate import Identity
from serving.errors import ApiError
from serving.lifecycle import Lifecycle
from serving.running import Running
from serving.spelling import Spelling
from serving.watch import Told

if TYPE_CHECKING:
    from serving.batches.opening import Batches

INLINE_CHARACTERS = 4096  # texts up to this are tokenized where they are: a thread would cost more
BEAT_SECONDS = 10.0  # a step loop that has been still for longer is not ready

T = TypeVar("T")


class Engine(Protocol):
    """What the server asks of an engine; `inference.engine` has one."""

    tokenizer: Tokenizer
    reach: int  # tokens of the longest sequence
    encoder: bool  # it writes no text
    embeds: bool  # it gives vectors
    width: int  # entries of a vector
    vocabulary: int
    options: EngineOptions  # how it is cut
    adapters: AdapterBooks  # those beside its model

    def submit(self, request: Request | EncodeRequest, listener: Listener) -> None:
        """ValueError for what the model cannot do, Busy where there is no room."""

    def abort(self, id: str) -> None:
        """Ends a request within a step."""

    def state(self) -> EngineState:
        """A snapshot."""

    def drain(self) -> None:
        """Takes nothing new."""

    def stop(self, seconds: float) -> bool:
        """Ends what runs, after so many seconds."""


@dataclass(frozen=True)
class Labels:
    """The classes of a model: kind is one (of them), several (any number of them) or regression (numbers)."""

    names: tuple[str, ...]
    kind: str = "one"


@dataclass
class Service:
    """A model behind an address. To be made before the event loop runs or in it."""

    engine: Engine
    name: str  # of the model, as clients call it
    digest: str  # of its weights
    chat: ChatTemplate | None = None
    begin: Sequence[int] = ()  # tokens that the model wants before every text
    end: Sequence[int] = ()  # an encoder's, behind every text
    frame: tuple[Sequence[int], Sequence[int]] | None = None  # around a text that is read whole; None: begin and end
    labels: Labels | None = None  # of a head of classes
    batches: "Batches | None" = None  # files and batches, where they are kept
    created: int = field(default_factory=lambda: int(time.time()))
    beat_seconds: float = BEAT_SECONDS
    told: list[Told] = field(default_factory=list)  # called with the record of every request when it is over
    load: Callable[[str, Path], None] | None = None  # an adapter by its name and folder, if that may be while it serves
    adapter: str = ""  # of `under`: which one
    parent: str | None = None  # of `under`: the model that it stands beside

    def __post_init__(self):
        self.lifecycle = Lifecycle(self.engine)
        self.running = Running()
        self.longest_token = int(self.engine.tokenizer.token_bytes.max())  # bytes
        self.spelling = Spelling(self.engine.tokenizer)
        # few: a text is tokenized on one core, and what waits here must not take the interpreter from the event loop
        self.threads = ThreadPoolExecutor(2, thread_name_prefix="tokenize")
        self._grammar_threads = ThreadPoolExecutor(2, thread_name_prefix="grammar")
        self._compiling: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # by tenant

    @property
    def tokenizer(self) -> Tokenizer:
        """Of the model."""
        return self.engine.tokenizer

    @property
    def around(self) -> tuple[Sequence[int], Sequence[int]]:
        """Tokens before and behind a text that is read whole."""
        return (self.begin, self.end) if self.frame is None else self.frame

    @property
    def fingerprint(self) -> str:
        """`system_fingerprint` of answers: the same for the same weights."""
        return f"fp_{self.digest[:32]}"

    def under(self, model: str | None) -> "Service":
        """This service as that of its model, or of an adapter beside it, by its name. Raises ApiError 404."""
        if model is None or model == self.name:
            return self
        if found := next((adapter for adapter in self.engine.adapters.open() if adapter.name == model), None):
            return self._with(found)
        more = "; /v1/models has its adapters" if self.engine.adapters.count else ""
        message = f"the model {model[:100]!r} is not here; there is {self.name!r}{more}"
        raise ApiError(404, message, param="model", code="model_not_found")

    def all(self) -> list["Service"]:
        """The service as that of its model, and of each adapter."""
        return [self, *map(self._with, self.engine.adapters.open())]

    def _with(self, adapter: Adapter) -> "Service":
        """Shares everything but what clients call it by."""
        made = copy.copy(self)
        made.name, made.adapter, made.parent, made.created = adapter.name, adapter.name, self.name, adapter.created
        made.digest = hashlib.sha256(f"{self.digest} {adapter.digest}".encode()).hexdigest()
        return made

    def require_decoder(self) -> None:
        """Raises ApiError where the model writes no text."""
        if self.engine.encoder:
            there = "/v1/embeddings" if self.labels is None else "/v1/classify"
            raise ApiError(400, f"{self.name} writes no text, as an encoder: it answers {there}", param="model")

    def require_base(self) -> None:
        """Raises ApiError where this is an adapter's service: texts are encoded by the base alone."""
        if self.adapter:
            told = f"the adapter {self.name!r} only writes text: {self.parent!r} answers here"
            raise ApiError(400, told, param="model", code="invalid_value")

    def sees(self, identity: Identity) -> bool:
        """Whether somebody may know of the model."""
        return any(fnmatchcase(self.name, pattern) for pattern in identity.models)

    @property
    def ready(self) -> str | None:
        """None if the next request would be served; else why not."""
        state = self.engine.state()
        if self.lifecycle.draining or state.draining:
            return "draining"
        if not state.ready:
            return "the model is not warm"
        silent = time.monotonic() - state.beat
        return f"the step loop stands still for {silent:.0f} s" if silent > self.beat_seconds else None

    async def in_thread(self, size: int, work: Callable[[], T]) -> T:
        """The result of work on a text of so many characters; in a thread unless it is short."""
        if size <= INLINE_CHARACTERS:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self.threads, work)

    @contextlib.asynccontextmanager
    async def compiling(self, tenant: str, work: Callable[[], T]) -> AsyncIterator[Future[T]]:
        """Begins work that compiles a grammar, in a thread; inside, the tenant's next one waits.

        A bad grammar takes seconds, and all are tried in one process: who sends many delays nobody but themselves.
        """
        async with self._compiling.setdefault(tenant, asyncio.Lock()):
            yield self._grammar_threads.submit(work)
