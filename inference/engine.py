"""The engine: many requests at once through one model, joining and leaving between steps.

One thread owns the devices. `submit`, `abort` and `state` are called from any thread and never wait for a step: they
leave word in an inbox, which the thread empties between steps. What a step brought is told to the request's listener.

    submit -> inbox -> Scheduler.plan (who) -> Programs.run (tokens) -> Choice.take (text, ends) -> listener
                    -> Encodes.step (a vector of each text) -> listener
"""

import itertools
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import replace

import jax
import numpy as np

from inference.adapter_books import Adapter, AdapterBooks
from inference.adapters import places_for, sizes_of
from inference.cache import Blocks
from inference.choice import Choice, Observer, choices_of
from inference.compilations import Compilations
from inference.encoder import CLASSES, Encoder, asked_pooling
from inference.encodes import Encodes, Whole, check_tokens
from inference.engine_options import EngineOptions
from inference.generate import check, reach_of
from inference.grammar import Grammars, Matcher
from inference.opening import Opened
from inference.priority import make_way
from inference.proposals import Proposals
from inference.reader import Reader
from inference.requests import Busy, Encoded, EncodeRequest, EngineState, Listener, Request
from inference.room import cache_tokens, check_room
from inference.scheduler import Batch, Row, Scheduler
from inference.speculation import accepted
from inference.step import InFlight, Programs
from model.rotary import alike_up_to

log = logging.getLogger("isomesh.inference")

IDLE_SECONDS = 0.25  # between two beats of a loop that has nothing to do
FAULTS = 3  # steps that fail one after the other until the engine counts as broken


class Engine:
    """Continuous batching over one model. `observer` may be set before `start`."""

    def __init__(
        self, opened: Opened, options: EngineOptions | None = None, draft: Opened | None = None,
        adapters: tuple[Adapter, ...] = (),
    ):  # fmt: skip
        """Compiles nothing yet. Raises ValueError for options, and for first adapters, that do not fit the model."""
        config, options = opened.config.model, options or EngineOptions()
        self.options, self.tokenizer, self.encoder = options, opened.tokenizer, not config.generates
        self.vocabulary, self.width = config.vocab_size, config.width
        self.classifies = config.head == CLASSES
        self.embeds = not self.classifies and (self.encoder or options.pooling != "none")
        trained = reach_of(config, opened.config.train.seq_len)
        self.reach = min(options.max_length or trained, trained)  # tokens of the longest sequence
        models = [opened] if draft is None else [opened, draft]
        self.cache_tokens = 0 if self.encoder else options.cache_tokens
        if self.cache_tokens is None:
            self.cache_tokens = cache_tokens(self.reach, models, options.cache_dtype)
        if not self.encoder and self.cache_tokens < self.reach:
            raise ValueError(
                f"cache_tokens={self.cache_tokens} hold no sequence of {self.reach} tokens: "
                f"raise it, or set max_length={self.cache_tokens} or less"
            )
        self._places = places_for(config, adapters, options)
        check_room(options, self.cache_tokens, models, sizes_of(self._places, models[0]))
        self.adapters = AdapterBooks.over(self._places)
        self._starts_with = [self.adapters.take(adapter) for adapter in adapters]
        self.observer = Observer()
        self._opened, self._programs, self._scheduler = opened, None, None
        rows, how = options.max_running, options.pooling
        self._encoder = Encoder(opened, rows, self.reach, how) if self.encoder else None
        self._pooling = asked_pooling(how, opened.path) if self.embeds and not self.encoder else None
        self._encodes: Encodes = Whole(self._encoder)
        self._encoded_last = False
        self._proposals = Proposals(options, opened, self.reach, draft)
        self._changed = threading.Condition()
        self._inbox: deque[Callable[[], None]] = deque()
        self._ids: dict[str, list[Choice]] = {}  # of requests that have not ended
        self._waiting = 0  # choices that are in the inbox
        self._draining = self._stopping = False
        self._ended = threading.Event()
        self._state = EngineState()
        self._totals, self._finished = Counter(), Counter()
        self._compilations = Compilations()
        self._grammars, self._making_grammars = None, threading.Lock()
        self._seeds = itertools.count(time.time_ns())
        self._thread: threading.Thread | None = None
        self._faults = 0
        self._seconds_a_choice = 1.0  # lately

    # ---- called from any thread ----

    def start(self) -> None:
        """Compiles all programs and starts the thread; returns when it is ready. Raises what went wrong."""
        warm, failed = threading.Event(), []

        def body():
            try:
                self._warm_up()
            except BaseException as error:
                failed.append(error)
                return
            finally:
                warm.set()
            self._loop()

        self._thread = threading.Thread(target=body, name="engine", daemon=True)
        self._thread.start()
        warm.wait()
        if failed:
            raise failed[0]

    def submit(self, request: Request | EncodeRequest, listener: Listener) -> None:
        """Takes a request. Raises ValueError for what cannot be answered, Busy where the queue is full or closed."""
        choices = self._choices(request, listener) if isinstance(request, Request) else []
        if not choices:
            if not (self.embeds or self.classifies):
                raise ValueError("this model generates text; it does not encode")
            check_tokens(request.tokens, self.reach, self.vocabulary)
        with self._changed:
            if request.id in self._ids:
                raise ValueError(f"request {request.id} is there already")
            if self._draining or self._stopping:
                raise Busy("the engine takes no new requests: it is stopping", retry_after=1.0)
            waiting = self._state.waiting + self._waiting
            if waiting + max(1, len(choices)) > self.options.max_waiting:
                wait = min(60.0, max(1.0, waiting * self._seconds_a_choice / self.options.max_running))
                raise Busy(f"{waiting} choices are waiting, and at most {self.options.max_waiting} may", wait)
            if choices:
                self.adapters.hold(request.adapter, [choice.sequence for choice in choices])
            self._ids[request.id] = choices
            self._waiting += max(1, len(choices))
            self._tell(lambda: self._enqueue(choices) if choices else self._enqueue_encode(request, listener))

    def abort(self, id: str) -> None:
        """Ends a request, whatever it does; nothing happens where there is none of this id."""
        self._tell(lambda: self._abort(id))

    def load_adapter(self, adapter: Adapter) -> None:
        """Returns when requests may name it. Raises ValueError where it does not fit, or no place is free."""
        self.adapters.load(adapter, self._tell, lambda *what: self._programs.fill(*what))

    def state(self) -> EngineState:
        """What the engine does now, at most one step old."""
        state, draining = self._state, self._draining or self._stopping
        return replace(state, waiting=state.waiting + self._waiting, draining=draining)

    def drain(self) -> None:
        """Takes no new requests from now on; those that are there go on."""
        self._draining = True

    def stop(self, seconds: float) -> bool:
        """Drains, waits so long for what runs, aborts the rest and ends the thread. True if nothing was aborted."""
        self.drain()
        end = time.monotonic() + seconds
        while self._ids and time.monotonic() < end and self._alive():
            self._ended.wait(min(0.05, max(0.0, end - time.monotonic())))
        left = list(self._ids)
        for id in left:
            self.abort(id)
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()
        if self._grammars is not None:
            self._grammars.close()
        return not left

    # ---- the engine thread ----

    def _warm_up(self) -> None:
        opened, options = self._opened, self.options
        blocks = -(-self.cache_tokens // options.block)
        self._compilations.listen()
        self._in_flight: deque[InFlight] = deque()
        self._read_at = 0.0  # when the last step was
        # the next step begins before the last one's tokens are read; simulated devices share cores and gain nothing
        simulated = opened.mesh.devices.flat[0].platform == "cpu" and opened.mesh.size > 1
        self._lookahead = 0 if simulated else 1
        if self._encoder is not None:
            self._scheduler = Scheduler(Blocks(0, options.block, False), 0, options.chunk)
            self._encoder.compile()
            self._encoder.run([EncodeRequest("", (0,))])
            self._compilations.begin()
            self._publish(ready=True)
            return
        self._programs = Programs(
            opened, options.max_running, blocks, options.block, self.reach, options.chunk, options.cache_dtype,
            drafted=0 if options.speculation == "none" else options.drafted, places=self._places,
        )  # fmt: skip
        self._proposals.warm_up(blocks)
        self._opened = replace(opened, params={})  # they lie in the programs now
        self._scheduler = Scheduler(
            Blocks(blocks, options.block, options.prefix_sharing), options.max_running, options.chunk,
            read_rows=self._programs.batch_rows, alike=alike_up_to(opened.config.model),
        )  # fmt: skip
        self._programs.compile()
        for place in self._starts_with:
            self.adapters.fill(place, self._programs.fill)
        if self._pooling is not None:
            self._encodes = Reader(self._programs, self._scheduler.blocks, self._pooling)
            self._encodes.compile()
        self._compilations.begin()
        self._publish(ready=True)

    def _loop(self) -> None:
        """Turns until `stop`: the inbox, then a step, then the results of the oldest step that has begun."""
        try:
            while not self._stopping:
                self._empty_inbox()
                begun, ended = self._begin_step(), False
                while self._in_flight and (not begun or len(self._in_flight) > self._lookahead):
                    self._end_step(self._in_flight.popleft())
                    ended = True
                self._publish(ready=self._faults < FAULTS)
                if not begun and not ended:
                    self._wait()
            self._empty_inbox()
        except BaseException:
            log.exception("the engine's thread ended")
            for choice in [c for choices in list(self._ids.values()) for c in choices]:
                self._finish(choice, "error", error="the engine has failed")
            for request, listener in self._encodes.all():
                self._answer(request.id, listener, "error", Encoded(error="the engine has failed"))
            raise
        finally:
            self._publish(ready=False)
            self._draining = True

    def _tell(self, word: Callable[[], None]) -> None:
        with self._changed:
            self._inbox.append(word)
            self._changed.notify()

    def _wait(self) -> None:
        with self._changed:
            if not self._inbox and not self._stopping:
                self._changed.wait(IDLE_SECONDS)

    def _empty_inbox(self) -> None:
        while True:
            with self._changed:
                if not self._inbox:
                    return
                word = self._inbox.popleft()
            word()

    def _enqueue(self, choices: list[Choice]) -> None:
        for choice in choices:
            self._scheduler.add(choice.sequence)
            self._totals["prompt_tokens"] += choice.index == 0 and choice.sequence.prompt
        self._publish(ready=self._state.ready, taken=len(choices))
        self._observe("queued", choices[0].request.id)

    def _abort(self, id: str) -> None:
        for choice in list(self._ids.get(id, ())):
            self._finish(choice, "aborted")
        if (listener := self._encodes.remove(id)) is not None:
            self._answer(id, listener, "aborted", Encoded(error="aborted"))

    def _begin_step(self) -> bool:
        """Starts the next step, if there is one; True if it did. Those for vectors take turns with the others."""
        if not self._encoded_last and self._encode():
            self._encoded_last = True
            return True
        self._totals["preemptions"] += make_way(self._scheduler, self.options.max_running)
        self._proposals.propose(self._scheduler)
        batch = self._scheduler.plan()
        if batch is None:
            return self._encoded_last and self._encode()
        self._encoded_last = False
        self._totals["preemptions"] += len(batch.preempted)
        if batch.begun or batch.preempted:
            self._publish(ready=self._state.ready)  # who runs waits no more: else others were refused for it
        began = time.monotonic()
        try:
            for sequence in batch.begun:
                self._began(sequence.owner)
            if not batch.rows:
                return True
            masks = {}
            for index, row in enumerate(batch.rows):
                if row.draws and (mask := row.sequence.owner.mask()) is not None:
                    masks[index] = mask
            result = self._programs.run(batch.rows, masks, scores=batch.kind == "score")
            self._proposals.follow(batch)
        except Exception as error:
            self._fault(batch, error)
            return True
        self._in_flight.append(InFlight(batch, result, began))
        return True

    def _encode(self) -> bool:
        """A step for vectors, from its texts to their answers; False where there is none, or no room for it yet."""
        began = time.monotonic()
        step = self._encodes.step()
        if step is None:
            return False
        for request in step.begun:
            self._observe("began", request.id, 0)
        if step.error is None:
            self._faults = 0
            self._totals["steps"] += 1
            self._observe("stepped", "encode", time.monotonic() - began, step.tokens)
        else:
            log.error("a step of %d sequences failed", len(step.answered), exc_info=step.error)
            self._faults += 1
            self._lose_cache()
        for one in step.answered:
            self._answer(one.request.id, one.listener, one.finish, one.answer)
        return True

    def _answer(self, id: str, listener: Listener, finish: str, answer: Encoded) -> None:
        """The end of a request for a vector."""
        with self._changed:
            self._ids.pop(id, None)
        self._finished[finish] += 1
        self._publish(ready=self._state.ready)
        try:
            listener(answer)
        except Exception:
            log.exception("the listener of request %s", id)
        self._observe("finished", id, finish)

    def _enqueue_encode(self, request: EncodeRequest, listener: Listener) -> None:
        self._encodes.add(request, listener)
        self._totals["prompt_tokens"] += len(request.tokens)
        self._publish(ready=self._state.ready, taken=1)
        self._observe("queued", request.id)

    def _began(self, choice: Choice) -> None:
        sequence = choice.sequence
        self._programs.occupy(sequence.slot, choice.slot_values(self._programs.width))
        if choice.begin():
            self._totals["cached_prompt_tokens"] += choice.index == 0 and sequence.cached
            self._observe("began", choice.request.id, sequence.cached)

    def _end_step(self, step: InFlight) -> None:
        """Reads what a step drew and hands it out."""
        batch = step.batch
        try:
            result = jax.tree.map(np.asarray, step.result)
        except Exception as error:
            self._fault(batch, error)
            return
        self._faults = 0
        tokens = 0
        places = 1 + self.options.drafted if any(row.drafted for row in batch.rows) else 1  # that a row draws at
        for index, row in enumerate(batch.rows):
            choice = row.sequence.owner
            if not row.valid:
                continue
            if batch.kind == "score":
                choice.score(row, result, index)
            elif row.draws:
                tokens += self._take_all(choice, row, result, index * places)
        self._totals["steps"] += 1
        read = sum(row.count for row in batch.rows) if batch.kind != "decode" else tokens
        began, self._read_at = max(step.began, self._read_at), time.monotonic()  # it waited for the step before it
        self._observe("stepped", batch.kind, self._read_at - began, read)

    def _take_all(self, choice: Choice, row: Row, drawn, first: int) -> int:
        """What a row drew, from the place `first` on, with the proposals that were right; the number of tokens."""
        tokens = accepted(row.drafted, drawn.tokens_B[first : first + 1 + len(row.drafted)].tolist())
        self._totals["drafted_tokens"] += len(row.drafted)
        self._totals["accepted_tokens"] += len(tokens) - 1
        self._scheduler.drew(row, tokens[:1])
        self._take(choice, drawn, first)
        for place, token in enumerate(tokens[1:], first + 1):
            if row.sequence.ended:
                break
            self._scheduler.grew(row.sequence, token)
            self._take(choice, drawn, place)
        return len(tokens)

    def _take(self, choice: Choice, drawn, index: int) -> None:
        token = int(drawn.tokens_B[index])
        try:
            piece = choice.take(token, drawn, index)
        except Exception as error:
            log.exception("the text of request %s", choice.request.id)
            self._finish(choice, "error", error=f"{type(error).__name__}: {error}")
            return
        self._totals["generated_tokens"] += len(piece.tokens)
        if len(choice.sequence.tokens) - choice.sequence.prompt == 1:  # those known: the next step has begun already
            self._observe("first_token", choice.request.id)
        if piece.finish is not None:
            self._finish(choice, piece.finish, piece)
        elif piece.text or piece.tokens or piece.prompt_logprobs is not None:
            self._hear(choice, piece)

    # ---- endings ----

    def _finish(self, choice: Choice, finish: str, piece=None, error: str | None = None) -> None:
        """The end of a choice: its blocks and its slot are free, its listener is told."""
        self._scheduler.end(choice.sequence)
        others = self._ids.get(choice.request.id, [])
        if choice not in others:
            return
        piece = choice.end(finish, error=error) if piece is None else piece
        self._finished[finish] += 1
        self._publish(ready=self._state.ready)
        self._hear(choice, piece)
        self._observe("finished", choice.request.id, finish)
        with self._changed:
            others.remove(choice)
            self.adapters.release(choice.sequence.place)
            if not others:
                del self._ids[choice.request.id]
        lasted = time.monotonic() - choice.came
        self._seconds_a_choice += 0.1 * (lasted - self._seconds_a_choice)

    def _fault(self, batch: Batch, error: Exception) -> None:
        """A step failed: the requests in it end, those beside it compute again what the cache has lost."""
        log.error("a step of %d rows failed", len(batch.rows), exc_info=error)
        self._faults += 1
        for owner in [row.sequence.owner for row in batch.rows] or [s.owner for s in batch.begun]:
            self._finish(owner, "error", error=f"a step of the model failed: {type(error).__name__}")
        self._lose_cache()

    def _lose_cache(self) -> None:
        """The arrays of the cache may be gone: they are made anew, and all that still runs computes again."""
        if self._programs is None:
            return
        self._in_flight.clear()
        for sequence in list(self._scheduler.running):
            self._scheduler.preempt(sequence)
        self._scheduler.blocks.forget()
        self._programs.empty()
        self._proposals.empty()
        if isinstance(self._encodes, Reader):
            self._encodes.restart()

    def _hear(self, choice: Choice, piece) -> None:
        """Tells a listener; one that raises loses its request and nothing else."""
        try:
            choice.listener(piece)
        except Exception:
            log.exception("the listener of request %s", choice.request.id)
            if piece.finish is None:
                choice.listener = lambda piece: None
                self._finish(choice, "aborted")

    def _observe(self, event: str, *arguments) -> None:
        try:
            getattr(self.observer, event)(*arguments)
        except Exception:
            log.exception("the observer of the engine")

    # ---- requests ----

    def _choices(self, request: Request, listener: Listener) -> list[Choice]:
        """The choices of a request. Raises ValueError for what cannot be answered."""
        check(self._opened.config.model, [list(request.prompt)], 0)
        if not 1 <= request.n <= (most := min(self.options.max_running, self.options.max_waiting)):
            raise ValueError(f"n={request.n} must be 1 to {most}")
        if (tokens := len(request.prompt)) >= self.reach:
            raise ValueError(f"a prompt of {tokens} tokens leaves no room in the {self.reach} that the model reaches")
        seed = next(self._seeds) if request.sampling.seed is None else request.sampling.seed
        request = replace(request, sampling=replace(request.sampling, seed=seed))
        matcher = self._matcher(request)
        waits = matcher is not None or self.options.speculation != "none"
        return choices_of(request, listener, self.tokenizer, matcher, self.reach, waits=waits)

    def _matcher(self, request: Request) -> Matcher | None:
        """Follows the grammar of a request, if it has one."""
        grammar, ends = request.sampling.grammar, request.sampling.stop_ids
        if grammar is None:
            return None
        with self._making_grammars:
            if self._grammars is None:
                self._grammars = Grammars(self.tokenizer, self.vocabulary)
        return self._grammars.matcher(grammar, ends)

    def _alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _publish(self, ready: bool, taken: int = 0) -> None:
        """A new snapshot; `taken` choices have come from the inbox into the queue."""
        scheduler, totals, encodes = self._scheduler, self._totals, self._encodes
        blocks = scheduler.blocks
        with self._changed:
            self._waiting -= taken
            self._state = EngineState(
                ready=ready, beat=time.monotonic(),
                waiting=len(scheduler.waiting) + len(encodes), running=len(scheduler.running) + encodes.running,
                blocks=blocks.count, blocks_used=blocks.count - blocks.available, blocks_cached=blocks.cached,
                compiles=self._compilations.count, finished=dict(self._finished), **totals,
                adapters=self.adapters.states(scheduler.waiting, scheduler.running),
            )  # fmt: skip
