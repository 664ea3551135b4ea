"""What stands in for the engine and the gate in tests of the server: both keep the interface exactly."""

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data.chat import ChatTemplate
from data.tokenizer import ByteTokenizer, JsonTokenizer, Tokenizer, train_bpe
from inference.adapter_books import AdapterBooks
from inference.engine_options import EngineOptions
from inference.requests import Busy, Encoded, EncodeRequest, EngineState, Listener, Piece, Request, TokenLogprob
from serving.access.gate import Identity
from serving.app import create_app
from serving.batches.opening import add_batches
from serving.errors import ApiError
from serving.lifecycle import Server, bound, configured
from serving.service import Service

WIDTH = 8  # entries of a vector
Script = Callable[[Request, int], Sequence[Piece]]


class Counting:
    """The default script: a letter a token, as many as are asked for; log-probabilities go down by 1 from -0.5."""

    def __init__(self, tokenizer: Tokenizer):
        self._letters = [(letter, int(tokenizer.encode(letter)[0])) for letter in "abcdefghijklmnopqrstuvwxyz"]

    def __call__(self, request: Request, index: int) -> list[Piece]:
        """The pieces of a choice, which begins with its own letter."""
        sampling, pieces, before = request.sampling, [], None
        if sampling.prompt_logprobs is not None:
            told = [self._logprob(token, sampling.prompt_logprobs) for token in request.prompt[1:]]
            before = (None, *told)
        for number in range(sampling.max_tokens):
            letter, token = self._letters[(number + index) % 26]
            told = () if sampling.logprobs is None else (self._logprob(token, sampling.logprobs),)
            finish = "length" if number + 1 == sampling.max_tokens else None
            first = {"prompt_logprobs": before} if not (number or index) else {}
            pieces.append(Piece(index, letter, (token,), told, finish, **first))
        return pieces or [Piece(index, finish="length", prompt_logprobs=None if index else before)]

    def _logprob(self, token: int, top: int) -> TokenLogprob:
        others = [other for _, other in self._letters if other != token]
        best = ((other, -0.5 - number) for number, other in enumerate([token, *others][:top]))
        return TokenLogprob(token, -0.5, tuple(best))


def saying(text: str) -> Script:
    """A script that says a text, a character a step, and stops by itself."""

    def script(request: Request, index: int) -> list[Piece]:
        pieces = [Piece(index, letter, tuple(letter.encode())) for letter in text]
        return [*pieces, Piece(index, finish="stop")]

    return script


@dataclass
class _Running:
    request: Request | EncodeRequest
    listener: Listener
    left: list[list[Piece]] = field(default_factory=list)  # of each choice
    queued: bool = False  # the observer knows
    begun: set[int] = field(default_factory=set)  # choices that have a first token


class EngineDouble:
    """Keeps the interface of `inference.engine.Engine`; answers from a script, in a thread of its own, step by step."""

    def __init__(
        self, script: Script | None = None, *, tokenizer: Tokenizer | None = None, seconds: float = 0.0,
        reach: int = 512, encoder: bool = False, embeds: bool | None = None,
        max_running: int = 8, max_waiting: int = 256,
    ):  # fmt: skip
        self.tokenizer = tokenizer or ByteTokenizer()
        self.counting = Counting(self.tokenizer)
        self.script, self.seconds = script or self.counting, seconds  # of a step; 0: as fast as can be
        self.reach, self.encoder, self.vocabulary = reach, encoder, self.tokenizer.vocab_size
        self.embeds, self.width = encoder if embeds is None else embeds, WIDTH
        self.options = EngineOptions()
        self.adapters = AdapterBooks()
        self.max_running, self.max_waiting = max_running, max_waiting
        self.submitted: list[Request | EncodeRequest] = []
        self.aborted: list[str] = []
        self.observer = None
        self._lock = threading.Condition()
        self._waiting: list[_Running] = []
        self._running: dict[str, _Running] = {}
        self._aborting: set[str] = set()
        self._state = {"ready": False, "draining": False, "beat": 0.0, "generated_tokens": 0, "steps": 0}
        self._finished: dict[str, int] = {}
        self._ending = False
        self.paused = threading.Event()  # set: the step loop stands still, like a hung device
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    def start(self) -> None:
        """Starts the thread; ready on return."""
        self._state["ready"], self._state["beat"] = True, time.monotonic()
        self._thread.start()

    def submit(self, request: Request | EncodeRequest, listener: Listener) -> None:
        """As the engine."""
        if isinstance(request, Request):
            if self.encoder:
                raise ValueError("this model is an encoder")
            if not request.prompt:
                raise ValueError("an empty prompt")
            if request.n > self.max_running:
                raise ValueError(f"n={request.n} choices are more than the {self.max_running} that run at once")
        with self._lock:
            if self._state["draining"]:
                raise Busy("the engine is draining", 1.0)
            if len(self._waiting) >= self.max_waiting:
                raise Busy(f"{self.max_waiting} requests are waiting", 2.0)
            self.submitted.append(request)
            self._waiting.append(_Running(request, listener))
            self._lock.notify_all()

    def abort(self, id: str) -> None:
        """As the engine."""
        with self._lock:
            self.aborted.append(id)
            self._aborting.add(id)
            self._lock.notify_all()

    def state(self) -> EngineState:
        """As the engine."""
        with self._lock:
            counts = {"waiting": len(self._waiting), "running": len(self._running), "blocks": 64}
            return EngineState(**self._state, **counts, blocks_used=len(self._running), finished=dict(self._finished))

    def drain(self) -> None:
        """As the engine."""
        with self._lock:
            self._state["draining"] = True

    def stop(self, seconds: float = 0.0) -> bool:
        """As the engine."""
        self.drain()
        end = time.monotonic() + seconds
        while self._busy() and time.monotonic() < end:
            time.sleep(0.005)
        whole = not self._busy()
        with self._lock:
            self._aborting |= {one.request.id for one in (*self._waiting, *self._running.values())}
            self._ending = True
            self._lock.notify_all()
        self._thread.join(5)
        return whole

    def _busy(self) -> bool:
        with self._lock:
            return bool(self._waiting or self._running)

    def _loop(self) -> None:
        while True:
            with self._lock:
                while not (self._waiting or self._running or self._aborting or self._ending):
                    self._state["beat"] = time.monotonic()
                    self._lock.wait(0.05)
                self._admit()
                self._end_aborted()
                if self._ending and not (self._waiting or self._running):
                    return
                steps = list(self._running.values())
            while self.paused.is_set() and not self._ending:
                time.sleep(0.01)
            self._state["beat"] = time.monotonic()
            self._state["steps"] += 1
            began, decoding = time.monotonic(), sum(len(one.begun) for one in steps)
            for one in steps:
                self._step(one)
            if self.seconds:
                time.sleep(self.seconds)
            self._observe("stepped", "decode" if decoding else "read", time.monotonic() - began, decoding)

    def _observe(self, event: str, *about) -> None:
        if self.observer is not None:
            getattr(self.observer, event)(*about)

    def _admit(self) -> None:
        for one in self._waiting:
            if not one.queued:
                one.queued = True
                self._observe("queued", one.request.id)
        while self._waiting and len(self._running) < self.max_running:
            one = self._waiting.pop(0)
            if isinstance(one.request, Request):
                one.left = [list(self.script(one.request, index)) for index in range(one.request.n)]
            self._running[one.request.id] = one
            self._observe("began", one.request.id, 0)

    def _end_aborted(self) -> None:
        for id in self._aborting:
            one = self._running.pop(id, None) or next((w for w in self._waiting if w.request.id == id), None)
            if one in self._waiting:
                self._waiting.remove(one)
            for index, left in enumerate(one.left if one is not None else ()):
                if left:
                    self._finish(one, Piece(index, finish="aborted"))
            if one is not None and isinstance(one.request, EncodeRequest):
                one.listener(Encoded(error="aborted"))
            elif one is not None and not one.left:
                for index in range(one.request.n):
                    self._finish(one, Piece(index, finish="aborted"))
        self._aborting.clear()

    def _finish(self, one: _Running, piece: Piece) -> None:
        self._finished[piece.finish] = self._finished.get(piece.finish, 0) + 1
        one.listener(piece)
        self._observe("finished", one.request.id, piece.finish)

    def _step(self, one: _Running) -> None:
        if isinstance(one.request, EncodeRequest):
            tokens = one.request.tokens
            one.listener(Encoded(tuple(float(token) / 256 for token in (tokens * WIDTH)[:WIDTH])))
        for left in one.left:
            if left:
                piece = left.pop(0)
                if piece.tokens and piece.index not in one.begun:
                    one.begun.add(piece.index)
                    self._observe("first_token", one.request.id)
                self._state["generated_tokens"] += len(piece.tokens)
                self._finish(one, piece) if piece.finish else one.listener(piece)
        if not any(one.left):
            with self._lock:
                self._running.pop(one.request.id, None)


@dataclass
class OpenAdmission:
    """What was asked for, and how it was settled."""

    model: str
    prompt_tokens: int
    new_tokens: int
    settled: list[tuple[int, int, int]] = field(default_factory=list)

    async def settle(self, status: int, prompt_tokens: int = 0, new_tokens: int = 0) -> None:
        """Notes it."""
        self.settled.append((status, prompt_tokens, new_tokens))


class OpenGate:
    """A gate that lets everyone in: as the tenant that the header x-tenant names. Remembers what it was asked."""

    def __init__(self):
        self.admissions: list[OpenAdmission] = []
        self.allowed: list[str] = []
        self.gone: set[str] = set()  # whose credentials do not work any more

    async def identify(self, request) -> Identity:
        """Anybody."""
        tenant = request.headers.get("x-tenant", "everyone")
        return Identity(name=tenant, role="admin", tenant=tenant)

    def keep(self, identity: Identity) -> dict:
        """Their name."""
        return {"name": identity.name}

    async def again(self, kept) -> Identity:
        """Anybody, unless they are gone."""
        if kept["name"] in self.gone:
            raise ApiError(401, "gone")
        return Identity(name=kept["name"], role="admin", tenant=kept["name"])

    async def allow(self, identity: Identity, permission: str, request) -> None:
        """Anything."""
        self.allowed.append(permission)

    async def admit(self, identity, request, *, permission, model, prompt_tokens, new_tokens) -> OpenAdmission:
        """As much as anybody wants."""
        self.admissions.append(OpenAdmission(model, prompt_tokens, new_tokens))
        return self.admissions[-1]

    async def add(self, identity, action: str, request, **told) -> None:
        """There is no audit."""


def served(engine: EngineDouble, gate: OpenGate | None = None, chat: ChatTemplate | None = None, **more):
    """The application over a double, which is started. `app.state.service` and `app.state.gate` lead to the rest."""
    engine.start()
    return create_app(Service(engine, "double", "d0" * 32, chat, **more), gate or OpenGate())


def keeping(folder: Path, engine: EngineDouble, gate: OpenGate | None = None, **more):
    """The same with files and batches."""
    app = served(engine, gate, **more)
    add_batches(folder, app.state.service, app.state.gate)
    return app


@contextlib.contextmanager
def listening(app, grace: float = 5.0) -> Iterator[str]:
    """The application at a port of its own, in a thread of this process; gives its address."""
    listener, up, loops = bound("127.0.0.1", 0), threading.Event(), []
    server = Server(configured(app), app.state.service.lifecycle, grace, up.set)

    def run() -> None:
        async def serve() -> None:
            loops.append(asyncio.get_running_loop())
            await server.serve([listener])

        with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:  # as uvicorn's own `run`
            runner.run(serve())

    thread = threading.Thread(target=run, name="server", daemon=True)
    thread.start()
    assert up.wait(10)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        loops[0].call_soon_threadsafe(server.begin_end)
        thread.join(20)
        assert not thread.is_alive()


def chat_template() -> ChatTemplate:
    """A small tokenizer with turns of chats, and its template."""
    marks = ["<|im_start|>", "<|im_end|>"]
    spec = json.loads(train_bpe(["the mesh of a run is not what its loss sees"] * 4, 300).as_json())
    known = len(spec["model"]["vocab"])
    plain = {"special": True, **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)}
    spec["added_tokens"] += [{"id": known + i, "content": mark, **plain} for i, mark in enumerate(marks)]
    tokenizer = JsonTokenizer(json.dumps(spec), "small")
    source = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    source += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    return ChatTemplate(source, tokenizer, {"eos_token": "<|im_end|>"}, [tokenizer.specials["<|im_end|>"]])


def until(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    """Waits for something to become so; whether it did."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.002)
    return condition()
