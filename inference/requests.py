"""What the engine is asked for and what it answers. No JAX here: servers and tests are built on these types alone."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

# How a choice ended. "aborted": its client went away or the engine is stopping; "error": a fault, told in `error`.
FINISHES = ("stop", "length", "aborted", "error")
MOST_TOP = 20  # alternatives whose log-probabilities can be asked for at each token
MOST_BIASED = 1024  # tokens of one logit bias
MOST_STOPS = 16  # stop strings of one request


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one request are drawn, and when it ends. Raises ValueError for what cannot be."""

    max_tokens: int = 16
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # only the k likeliest tokens; 0 off
    top_p: float = 1.0  # only the likeliest tokens that make up this probability; 1 off
    min_p: float = 0.0  # only tokens at least so likely as this share of the likeliest; 0 off
    repetition_penalty: float = 1.0  # divides positive logits of tokens seen in prompt or text; 1 off (1909.05858)
    presence_penalty: float = 0.0  # subtracted once from the logits of tokens in the new text
    frequency_penalty: float = 0.0  # subtracted for each time that a token is in the new text
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # token -> added to its logit
    seed: int | None = None  # the same seed gives the same text, whatever else runs; None: any
    stop: tuple[str, ...] = ()  # strings that end the text, and are not part of it
    stop_ids: tuple[int, ...] = ()  # tokens that end the text, besides the end of the document
    ignore_eos: bool = False
    logprobs: int | None = None  # None: none; else of each token and so many likeliest ones
    prompt_logprobs: int | None = None  # the same for the tokens of the prompt
    grammar: str | None = None  # what the text must match, as inference.grammar makes it

    def __post_init__(self):
        for name in ("temperature", "top_k", "max_tokens"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p} must be 0 to 1")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty={self.repetition_penalty} must be above 0")
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise ValueError(f"{name}={getattr(self, name)} must be -2 to 2")
        if len(self.logit_bias) > MOST_BIASED or not all(-100 <= bias <= 100 for bias in self.logit_bias.values()):
            raise ValueError(f"logit_bias takes at most {MOST_BIASED} tokens, each with -100 to 100")
        if len(self.stop) > MOST_STOPS or not all(self.stop):
            raise ValueError(f"stop takes at most {MOST_STOPS} strings, none of them empty")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) <= MOST_TOP:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 to {MOST_TOP}")


@dataclass(frozen=True)
class Request:
    """Text to be continued: `n` choices from the tokens of a prompt, which are not empty."""

    id: str  # no other request that is waiting or running has it
    prompt: tuple[int, ...]
    sampling: Sampling = Sampling()
    n: int = 1
    adapter: str = ""  # its name, of those beside the model; "": none
    low: bool = False  # it gives way to those that are not: they begin first, and take its place where there is none


@dataclass(frozen=True)
class EncodeRequest:
    """A sequence that is read whole: its embedding, or the logits of its labels."""

    id: str
    tokens: tuple[int, ...]
    types: tuple[int, ...] = ()  # of each token, where the model has types: its last at most; () all 0
    low: bool = False  # as in Request


@dataclass(frozen=True)
class TokenLogprob:
    """A token with its natural log-probability (temperature 1, no penalties), and the likeliest ones, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """What one step brought to one choice of a request. The texts of a choice's pieces, joined, are its text."""

    index: int  # of the choice, 0 to n - 1
    text: str = ""  # whole characters; what may yet become a stop string is held back
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()  # one a token, if asked for; with prompt_logprobs also of one that ends it
    finish: str | None = None  # one of FINISHES with the last piece of the choice
    stopped_by: str | int | None = None  # the stop string or token that ended it
    error: str | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None  # with a request's first piece, if asked for
    cached_tokens: int = 0  # with the first piece: tokens of the prompt that were not computed again


@dataclass(frozen=True)
class Encoded:
    """The answer to an EncodeRequest: a vector, or logits of labels; or an error."""

    vector: tuple[float, ...] = ()
    error: str | None = None


Listener = Callable[[Piece | Encoded], None]  # called in the engine's thread, in order; it must not wait


class Busy(Exception):
    """The queue is full or the engine is draining: ask again after so many seconds."""

    def __init__(self, message: str, retry_after: float):
        super().__init__(message)
        self.retry_after = retry_after


@dataclass(frozen=True)
class AdapterState:
    """Choices of one adapter."""

    waiting: int
    running: int
    ended: int  # since it was loaded


@dataclass(frozen=True)
class EngineState:
    """A snapshot, cheap enough to be taken many times a second. Totals count since the start."""

    ready: bool = False  # warm, and the step loop is alive
    draining: bool = False
    beat: float = 0.0  # time.monotonic() of the last turn of the step loop
    waiting: int = 0  # choices that have not begun or were preempted
    running: int = 0
    blocks: int = 0  # of the cache
    blocks_used: int = 0  # by running sequences
    blocks_cached: int = 0  # free, but still holding a prefix that may be used again
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0  # of these, found in the cache
    generated_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
    compiles: int = 0  # after the warm-up: to be 0
    drafted_tokens: int = 0  # proposed by speculation
    accepted_tokens: int = 0
    finished: Mapping[str, int] = field(default_factory=dict)  # finish -> choices
    adapters: Mapping[str, AdapterState] = field(default_factory=dict)  # by name
