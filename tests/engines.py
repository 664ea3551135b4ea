"""Engines of small models, mixes of requests for them, and what `generate` makes of the same prompts."""

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from config.schema import Config, finish
from data.tokenizer import ByteTokenizer
from inference.config import SampleConfig
from inference.engine import Engine
from inference.engine_options import EngineOptions
from inference.generate import generate
from inference.opening import Opened
from inference.requests import Piece, Request, Sampling
from model.config import ModelConfig, RopeScaling
from model.transformer import describe
from parallel.mesh import AXES, make_mesh

TOKENIZER = ByteTokenizer()
BASE = ModelConfig(
    layers=2, width=32, heads=4, kv_heads=2, head_dim=8, ffn=48, vocab_size=TOKENIZER.vocab_size, vocab_multiple=16
)
MODELS = {
    "grouped": BASE,
    "learned-biases": replace(
        BASE, positions="learned", max_positions=80, kv_heads=4, norm="layer", bias="all", activation="gelu"
    ),
    "windows-local-rope": replace(
        BASE, layers=4, window=5, window_pattern="LG", kv_heads=1, rope_theta_local=50.0, scan_layers=False
    ),
    "softcaps-untied": replace(
        BASE,
        qk_norm=True, attention_softcap=5.0, logit_softcap=8.0, norm_position="both", embedding_scale=True,
        activation="geglu", tied_embeddings=False,
    ),
    "scaled-rope": replace(BASE, rope_scaling=RopeScaling(kind="llama3", factor=4.0, original_length=16)),
    "dynamic-rope": replace(BASE, rope_scaling=RopeScaling(kind="dynamic", factor=4.0, original_length=24)),
    "long-rope": replace(
        BASE,
        rope_scaling=RopeScaling("longrope", 4.0, 24, short_factors=(1, 1.1, 1.2, 1.3), long_factors=(1, 2, 3, 4)),
    ),
    "experts": replace(BASE, experts=4, ffn=24, shared_experts=1),
}  # fmt: skip
REACH = 80  # tokens of the longest sequence
NEW = 24  # tokens of the longest text
ROWS = 8  # prompts of one call of the reference
TIE = 1e-5  # of logits about 1 in float32, where rounding moves them as little as usual
ROUNDING = 1e-7  # relative, of a float32


@cache
def opened(model: str, mesh: tuple[tuple[str, int], ...] = ()) -> Opened:
    """A model whose weights are large enough that its text does not end up in one repeated token."""
    sizes = dict.fromkeys(AXES, 1) | dict(mesh)
    devices = int(np.prod(list(sizes.values())))
    config = finish(Config(model=MODELS[model], train=replace(Config().train, seq_len=REACH)))
    mesh = make_mesh(sizes, jax.devices()[:devices])
    with jax.set_mesh(mesh):
        description = describe(config.model)
        large = lambda: jax.tree.map(lambda p: 3 * p if p.ndim > 1 else p, description.init(jax.random.key(0)))
        params = jax.jit(large, out_shardings=description.shardings(mesh))()
    return Opened(Path("model"), config, TOKENIZER, mesh, description, params, jnp.dtype(jnp.float32), None, "digest")


def references(opened: Opened, prompts: list[tuple[int, ...]]) -> list[list[int]]:
    """The greedy tokens of each prompt by `generate`, in calls of one shape: NEW, or those before the first tie.

    Where the two likeliest tokens are a rounding error apart, either is right, and what follows depends on it. How
    much rounding does is seen where parameters change by as much: at a few tokens a hundred times more than at others.
    """
    texts = []
    sample = SampleConfig(tokens=NEW, temperature=0.0)
    with jax.set_mesh(opened.mesh):
        for start in range(0, len(prompts), ROWS):
            part = [list(prompt) for prompt in prompts[start : start + ROWS]]
            part += [[1] * (REACH - NEW)] * (ROWS - len(part) % ROWS)  # of full length, so that all calls are alike
            part = (part + [[1] * (REACH - NEW)] * ROWS)[: 2 * ROWS]
            new = generate(opened.description, opened.params, part, sample)
            tokens_BT = np.zeros((len(part), REACH), np.int32)
            for row, (prompt, text) in enumerate(zip(part, new, strict=True)):
                tokens_BT[row, : len(prompt) + NEW] = prompt + text
            prompts_B1 = np.array([[len(prompt)] for prompt in part], np.int32)
            gaps_BT = np.asarray(_gaps(opened.description.bind(opened.params), tokens_BT, prompts_B1))
            for row, prompt in enumerate(prompts[start : start + ROWS]):
                close = gaps_BT[row, len(prompt) - 1 :][:NEW] < TIE
                texts.append(new[row][: close.argmax() if close.any() else NEW])
    return texts


@jax.jit
def _gaps(model, tokens_BT, prompts_B1):
    """How far the likeliest token after each one is before the second, less what rounding moves their logits by."""
    lengths_BT = jnp.maximum(prompts_B1, 1 + jnp.arange(tokens_BT.shape[1]))  # as `generate` reads and adds tokens
    logits = lambda model: model.logits(model(tokens_BT, lengths_BT=lengths_BT)[0])
    there_BTV, (leaves, structure) = logits(model), jax.tree.flatten(model)

    def moved_BT(seed):
        keys = jax.random.split(jax.random.key(seed), len(leaves))
        change = lambda p, key: p * (1 + ROUNDING * jax.random.normal(key, p.shape, p.dtype))
        exact = lambda p: not jnp.issubdtype(p.dtype, jnp.floating)  # codes of a quantised matrix
        changed = [p if exact(p) else change(p, key) for p, key in zip(leaves, keys, strict=True)]
        return jnp.abs(logits(jax.tree.unflatten(structure, changed)) - there_BTV).max(-1)

    top_BT2, _ = jax.lax.top_k(there_BTV, 2)
    return top_BT2[..., 0] - top_BT2[..., 1] - 2 * jnp.maximum(moved_BT(0), moved_BT(1))


class Heard:
    """A listener: the pieces of each choice of a request, and an event for the end of the last."""

    def __init__(self, n: int = 1, then=None):
        self.pieces: list[list[Piece]] = [[] for _ in range(n)]
        self.done, self._left, self._then = threading.Event(), n, then

    def __call__(self, piece: Piece) -> None:
        self.pieces[piece.index].append(piece)
        if self._then is not None:
            self._then(piece)
        if piece.finish is not None:
            self._left -= 1
            if not self._left:
                self.done.set()

    def tokens(self, index: int = 0) -> list[int]:
        """Of one choice."""
        return [token for piece in self.pieces[index] for token in piece.tokens]

    def text(self, index: int = 0) -> str:
        """Of one choice."""
        return "".join(piece.text for piece in self.pieces[index])

    def finish(self, index: int = 0) -> str:
        """How one choice ended; it has no piece after that."""
        assert [piece.finish is not None for piece in self.pieces[index]].index(True) == len(self.pieces[index]) - 1
        return self.pieces[index][-1].finish


def ask(engine: Engine, id: str, prompt, n: int = 1, seconds: float = 120, **sampling) -> Heard:
    """Sends a request and waits for its end."""
    heard = Heard(n)
    engine.submit(Request(id, tuple(prompt), Sampling(**{"temperature": 0.0, "ignore_eos": True} | sampling), n), heard)
    assert heard.done.wait(seconds), f"{id} did not end"
    return heard


@dataclass(frozen=True)
class Asked:
    """A request of a mix: when it comes, and after how many tokens its client goes away."""

    request: Request
    after: int  # tokens that the others have drawn before it comes
    leaves: int | None


def mix(seed: int, count: int = 8) -> list[Asked]:
    """Requests with prompts that begin alike or not, of all lengths, that join and leave at any time."""
    rng = np.random.default_rng(seed)
    beginnings = [tuple(rng.integers(0, 256, int(rng.integers(4, 40))).tolist()) for _ in range(3)]
    asked = []
    for index in range(count):
        begin = beginnings[rng.integers(3)] if rng.random() < 0.6 else ()
        end = tuple(rng.integers(0, 256, int(rng.integers(1, REACH - NEW - len(begin)))).tolist())
        end = end[: int(rng.integers(1, 12))] if rng.random() < 0.5 else end
        sampling = Sampling(max_tokens=int(rng.integers(1, NEW + 1)), temperature=0.0, ignore_eos=True)
        n = int(rng.integers(1, 4)) if rng.random() < 0.3 else 1
        leaves = int(rng.integers(0, 10)) if rng.random() < 0.2 else None
        asked.append(Asked(Request(f"{seed}-{index}", (*begin, *end), sampling, n), int(rng.integers(0, 40)), leaves))
    return asked


def run_mix(engine: Engine, asked: list[Asked], seconds: float = 300) -> dict[str, Heard]:
    """Plays a mix: requests are sent from the engine's own thread, at the tokens that they wait for."""
    drawn, coming = 0, sorted(asked, key=lambda a: a.after)
    heard: dict[str, Heard] = {}

    def send(one: Asked) -> None:
        def then(piece: Piece) -> None:
            nonlocal drawn
            drawn += len(piece.tokens)
            if one.leaves is not None and len(heard[one.request.id].tokens()) >= one.leaves:
                engine.abort(one.request.id)
            while coming and (coming[0].after <= drawn or piece.finish):
                send(coming.pop(0))

        heard[one.request.id] = Heard(one.request.n, then)
        engine.submit(one.request, heard[one.request.id])

    end = time.monotonic() + seconds
    send(coming.pop(0))
    for one in asked:
        while one.request.id not in heard and time.monotonic() < end:
            time.sleep(0.01)
        assert heard[one.request.id].done.wait(seconds), f"{one.request.id} did not end"
    return heard


def assert_as_generated(opened: Opened, asked: list[Asked], heard: Mapping[str, Heard]) -> None:
    """Every choice has the tokens of `generate`, or, if its client went away, the first of them."""
    expected = references(opened, [one.request.prompt for one in asked])
    for one, text in zip(asked, expected, strict=True):
        answer, most = heard[one.request.id], one.request.sampling.max_tokens
        for index in range(one.request.n):
            tokens, finish = answer.tokens(index), answer.finish(index)
            assert finish == "length" or (finish == "aborted" and one.leaves is not None), one.request.id
            assert tokens[: len(text)] == text[: len(tokens)], (one.request.id, index)
            assert len(tokens) == most or finish == "aborted"


def started(model: str, mesh: tuple[tuple[str, int], ...] = (), **options) -> Engine:
    """An engine that runs, with a cache so small that sequences are preempted."""
    options = {"max_running": 4, "block": 4, "chunk": 16, "cache_tokens": 2 * REACH} | options
    engine = Engine(opened(model, mesh), EngineOptions(**options))
    engine.start()
    return engine
