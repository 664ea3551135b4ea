"""One choice of a request while it is made: its tokens become text, and its end is found."""

import time
from collections.abc import Sequence as Tokens

import numpy as np

from data.tokenizer import Tokenizer
from inference.drawing import Drawn, Slots, slot_values
from inference.grammar import Matcher
from inference.priority import put_behind
from inference.requests import Listener, Piece, Request, TokenLogprob
from inference.scheduler import Row, Sequence
from inference.speculation import NgramProposer, may_speculate
from inference.step import Scores
from inference.text import Text


class Observer:
    """What an engine reports for metrics and traces, in its thread: methods must not wait."""

    def queued(self, id: str) -> None:
        """A request came into the queue."""

    def began(self, id: str, cached_tokens: int) -> None:
        """A choice of it runs for the first time; so many tokens of its prompt were in the cache."""

    def first_token(self, id: str) -> None:
        """A choice of it has its first token."""

    def stepped(self, kind: str, seconds: float, tokens: int) -> None:
        """A step (read | score | decode) ended: tokens of prompts that it read, or tokens that it drew."""

    def finished(self, id: str, finish: str) -> None:
        """A choice of it ended."""


class Choice:
    """A sequence of the scheduler with the request that it belongs to."""

    def __init__(
        self, request: Request, index: int, listener: Listener, sequence: Sequence, tokenizer: Tokenizer,
        matcher: Matcher | None = None,
    ):  # fmt: skip
        self.request, self.index, self.listener, self.sequence = request, index, listener, sequence
        sequence.owner = self
        sampling = request.sampling
        self.came = time.monotonic()
        self._text = Text(tokenizer, request.prompt, sampling)
        self._ends = set(sampling.stop_ids)
        self._matcher, self._mask = matcher, None if matcher is None else matcher.mask()
        self._eos = None if sampling.ignore_eos and matcher is None else tokenizer.eos_id
        self.look_up = NgramProposer() if may_speculate(sampling) else None  # None: nothing is proposed
        self._cached: int | None = None  # tokens found in the cache when it began
        self._told = False  # whether there was a first piece
        self._scores: list[TokenLogprob | None] = [None]

    def slot_values(self, vocabulary: int) -> Slots:
        """How its tokens are drawn, with those that there are; vocabulary: width of the logits."""
        sequence = self.sequence
        new = sequence.tokens[sequence.prompt :]
        return slot_values(self.request.sampling, vocabulary, choice=self.index, prompt=self.request.prompt, new=new)

    def begin(self) -> bool:
        """Notes that it runs; True if for the first time."""
        first = self._cached is None
        if first:
            self._cached = self.sequence.cached
        if self.sequence.scored:
            self._scores = [None]
        return first

    def mask(self) -> np.ndarray | None:
        """Words of the tokens that a grammar allows next; None without a grammar."""
        return self._mask

    def score(self, row: Row, scores: Scores, index: int) -> None:
        """Takes the log-probabilities of the tokens after those of a row."""
        prompt, wanted = self.request.prompt, self.request.sampling.prompt_logprobs
        for t in range(row.count):
            top = _top(scores.top_ids_BTK[index, t], scores.top_logprobs_BTK[index, t], wanted)
            token = prompt[row.start + t + 1]
            self._scores.append(TokenLogprob(token, float(scores.logprobs_BT[index, t]), top))
        self.sequence.scored = row.start + row.count < len(prompt) - 1

    def take(self, token: int, drawn: Drawn, index: int) -> Piece:
        """What a further token, already in the sequence, brings."""
        sampling, sequence = self.request.sampling, self.sequence
        if sampling.max_tokens == 0:
            return self.end("length")
        logprobs = ()
        if (wanted := sampling.logprobs) is not None:
            top = _top(drawn.top_ids_BK[index], drawn.top_logprobs_BK[index], wanted)
            logprobs = (TokenLogprob(token, float(drawn.logprobs_B[index]), top),)
        if token == self._eos or token in self._ends:
            # who scores a prompt counts on one token behind it, and cuts that off
            scored = {} if sampling.prompt_logprobs is None else {"logprobs": logprobs}
            return self.end("stop", stopped_by=token if token in self._ends else None, **scored)
        if self._matcher is not None and not self._matcher.advance(token):
            raise ValueError("the token that was drawn does not fit the grammar")
        text, stopped_by = self._text.push([token])
        what = {"tokens": (token,), "logprobs": logprobs}
        if stopped_by is not None:
            return self._piece(text, finish="stop", stopped_by=stopped_by, **what)
        if self._matcher is not None and self._matcher.finished:
            return self.end("stop", before=text, **what)
        if len(sequence.tokens) >= sequence.most:
            return self.end("length", before=text, **what)
        self._mask = None if self._matcher is None else self._matcher.mask()
        return self._piece(text, **what)

    def end(self, finish: str, *, before: str = "", stopped_by: int | str | None = None, **what) -> Piece:
        """The last piece, with what was held back of the text; a stop string may be complete only now."""
        rest, stop = self._text.finish()
        if stop is not None and finish in ("stop", "length"):
            finish, stopped_by = "stop", stop
        return self._piece(before + rest, finish=finish, stopped_by=stopped_by, **what)

    def _piece(self, text: str, **what) -> Piece:
        if not self._told:
            self._told = True
            what["cached_tokens"] = self._cached or 0
            if self.request.sampling.prompt_logprobs is not None and self.index == 0:
                what["prompt_logprobs"] = tuple(self._scores)
        return Piece(self.index, text, **what)


def _top(ids: Tokens[int], logprobs: Tokens[float], count: int) -> tuple[tuple[int, float], ...]:
    return tuple((int(i), float(p)) for i, p in zip(ids[:count], logprobs[:count], strict=True))


def choices_of(
    request: Request, listener: Listener, tokenizer: Tokenizer, matcher: Matcher | None, reach: int, *, waits: bool
) -> list[Choice]:
    """The n choices of a request, of at most `reach` tokens each; the others begin when the first has its prompt.

    `waits`: each token has to be known before the next is drawn.
    """
    tokens, scored = len(request.prompt), request.sampling.prompt_logprobs is not None
    most = min(tokens + max(1, request.sampling.max_tokens), reach)
    choices: list[Choice] = []
    for index in range(request.n):
        first = index == 0
        sequence = Sequence(
            list(request.prompt), most, shares=not (scored and first), scored=scored and first and tokens > 1,
            after=None if first else choices[0].sequence, waits=waits,
        )  # fmt: skip
        if request.low:
            put_behind(sequence)
        choices.append(Choice(request, index, listener, sequence, tokenizer, matcher and matcher.copy()))
    return choices
