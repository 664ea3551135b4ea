"""Vectors of texts from a model that also writes: each is read through the engine's own cache, a part of it in a step.

The steps alternate with those of the scheduler, so that a long text delays nobody by more than a chunk. The blocks of a
text are taken from the cache before it is read and given back behind its last token; nobody else ever reads them.

    queue -> blocks -> part after part: each row's sum, last, first or largest vector -> one vector, on the host
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from inference.cache import Blocks
from inference.encoder import Pooling
from inference.encodes import EncodeQueue, EncodeStep, done, failed
from inference.generate import exact_matmuls
from inference.requests import EncodeRequest, Listener
from inference.step import Programs
from model.block_cache import BlockCache
from model.unstacked import run
from parallel.sharding import replicated

SHORT = 64  # tokens: of texts up to this, several are read in a step
# Columns of a row before its tokens and its blocks.
START, COUNT, LENGTH, HEADER = range(4)
JOINS = {"mean": np.add, "max": np.maximum, "first": lambda first, _: first, "last": lambda _, last: last}


@dataclass
class Text:
    """A text that is being read."""

    request: EncodeRequest
    listener: Listener
    blocks: list[int] = field(default_factory=list)
    read: int = 0  # tokens
    vector: np.ndarray | None = None  # float32 (D,) of what is read

    @property
    def left(self) -> int:
        """Tokens that are to be read."""
        return len(self.request.tokens) - self.read


class Reader:
    """Implements inference.encodes.Encodes over the programs and the books of an engine."""

    def __init__(self, programs: Programs, blocks: Blocks, pooling: Pooling):
        self._programs, self._blocks, self._pooling = programs, blocks, pooling
        self._queue, self._texts = EncodeQueue(), []
        chunk, rows = programs.longest_read, programs.batch_rows
        short = min(programs.even_tokens(SHORT), chunk)
        # (rows, tokens): one text in parts; a short one alone; as many short ones as make a part
        self.shapes = sorted({(rows, chunk), (rows, short), (rows * max(1, chunk // short), short)})
        self._compiled: dict[tuple[int, int], jax.stages.Compiled] = {}

    def compile(self) -> None:
        """Compiles every shape."""
        programs = self._programs
        opened = programs.opened
        placed = programs.placed.pools, replicated(opened.mesh)
        with jax.set_mesh(opened.mesh), exact_matmuls(opened.dtype):
            for rows, tokens in self.shapes:
                step = jax.jit(partial(self._step, tokens), donate_argnums=2, out_shardings=placed)
                packed = np.zeros((rows, HEADER + tokens + programs.table), np.int32)
                arguments = programs.outside, programs.layers, programs.kept.pools, packed
                self._compiled[rows, tokens] = step.lower(*arguments).compile()

    def _step(self, T: int, outside, layers, pools, rows_BX):
        """The pools with these tokens written; float32 (B, D) of the tokens of each row."""
        programs = self._programs
        opened = programs.opened
        start_B, count_B, length_B = (rows_BX[:, column] for column in range(HEADER))
        tokens_BT, table_BM = rows_BX[:, HEADER : HEADER + T], rows_BX[:, HEADER + T :]
        t = jnp.arange(T, dtype=jnp.int32)
        there_BT = t < count_B[:, None]
        positions_BT = jnp.where(there_BT, start_B[:, None] + t, programs.table * programs.block)
        places_BT = jnp.where(there_BT, positions_BT, start_B[:, None])
        lengths_BT = jnp.maximum(length_B[:, None], places_BT + 1)
        caches = [BlockCache(*pool, table_BM, programs.block) for pool in pools]
        layers = programs.with_adapters(layers, jnp.zeros_like(start_B))
        model, parts = opened.description.bind(outside), (programs.block_modules, layers)
        placed = positions_BT, places_BT, lengths_BT
        x_BTD, caches = run(model, *parts, tokens_BT, *placed, caches, opened.dtype)
        x_BTD, there_BT1 = x_BTD.astype(jnp.float32), there_BT[..., None]
        if self._pooling.how == "mean":
            x_BD = jnp.where(there_BT1, x_BTD, 0).sum(1)
        elif self._pooling.how == "max":
            x_BD = jnp.where(there_BT1, x_BTD, -jnp.inf).max(1)
        else:
            at_B = jnp.maximum(count_B - 1, 0) if self._pooling.how == "last" else jnp.zeros_like(count_B)
            x_BD = jnp.take_along_axis(x_BTD, at_B[:, None, None], axis=1)[:, 0]
        return tuple((cache.keys, cache.values) for cache in caches), x_BD

    # ---- Encodes ----

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def running(self) -> int:
        """Texts that are being read."""
        return len(self._texts)

    def add(self, request: EncodeRequest, listener: Listener) -> None:
        """As Encodes."""
        self._queue.add(request, listener)

    def remove(self, id: str) -> Listener | None:
        """As Encodes."""
        text = next((text for text in self._texts if text.request.id == id), None)
        if text is None:
            return self._queue.remove(id)
        self._end(text)
        return text.listener

    def all(self) -> Iterator[tuple[EncodeRequest, Listener]]:
        """As Encodes."""
        while self._texts:
            text = self._texts[0]
            self._end(text)
            yield text.request, text.listener
        while self._queue:
            yield self._queue.pop()

    def restart(self) -> None:
        """What is in the cache is lost: every text is read again."""
        for text in self._texts:
            text.read, text.vector = 0, None

    def step(self) -> EncodeStep | None:
        """A part of the first text, or of as many as are nearly read; None where no text has its blocks."""
        begun = self._begin()
        ready = [text for text in self._texts if self._has_blocks(text)]
        if not ready:
            return None
        rows, tokens = self._shape(ready)
        texts = [text for text in ready if tokens == self._longest or text.left <= tokens][:rows]
        counts = [min(text.left, tokens) for text in texts]
        try:
            vectors = self._run(texts, counts, rows, tokens)
        except Exception as error:
            answered = tuple(failed((text.request, text.listener), error) for text in texts)
            for text in texts:
                self._end(text)
            return EncodeStep(begun, answered, 0, error)
        answered = []
        for text, count, vector in zip(texts, counts, vectors, strict=False):
            text.vector = vector if text.vector is None else JOINS[self._pooling.how](text.vector, vector)
            text.read += count
            if not text.left:
                self._end(text)
                answered.append(done((text.request, text.listener), self._whole(text)))
        return EncodeStep(begun, tuple(answered), sum(counts))

    # ---- a step ----

    @property
    def _longest(self) -> int:
        return max(tokens for _, tokens in self.shapes)

    @property
    def _most(self) -> int:
        return max(rows for rows, _ in self.shapes)

    def _begin(self) -> tuple[EncodeRequest, ...]:
        """Takes texts from the queue, as many as a step reads, while each has the blocks that it needs."""
        begun = []
        while self._queue and len(self._texts) < self._most and all(map(self._has_blocks, self._texts)):
            self._texts.append(Text(*self._queue.pop()))
            begun.append(self._texts[-1].request)
        return tuple(begun)

    def _has_blocks(self, text: Text) -> bool:
        """Whether a text has its blocks; it keeps those that there are, so that it will have all at last."""
        needed = self._blocks.blocks_for(len(text.request.tokens)) - len(text.blocks)
        if needed > 0:
            text.blocks += self._blocks.take(min(needed, self._blocks.available))
        return len(text.blocks) >= self._blocks.blocks_for(len(text.request.tokens))

    def _shape(self, ready: list[Text]) -> tuple[int, int]:
        """The smallest shape that reads what is left of the first text, with as many others as fit."""
        tokens = min((t for _, t in self.shapes if t >= ready[0].left), default=self._longest)
        beside = sum(text.left <= tokens for text in ready)
        fits = [rows for rows, t in self.shapes if t == tokens]
        return min((rows for rows in fits if rows >= beside), default=max(fits)), tokens

    def _run(self, texts: list[Text], counts: list[int], rows: int, tokens: int) -> np.ndarray:
        programs = self._programs
        packed = np.zeros((rows, HEADER + tokens + programs.table), np.int32)
        for row, (text, count) in enumerate(zip(texts, counts, strict=True)):
            packed[row, :HEADER] = text.read, count, len(text.request.tokens)
            packed[row, HEADER : HEADER + count] = text.request.tokens[text.read : text.read + count]
            packed[row, HEADER + tokens : HEADER + tokens + len(text.blocks)] = text.blocks
        arguments = programs.outside, programs.layers, programs.kept.pools, packed
        pools, x_BD = self._compiled[rows, tokens](*arguments)
        programs.kept = replace(programs.kept, pools=pools)
        return np.asarray(x_BD)

    def _whole(self, text: Text) -> np.ndarray:
        """The vector of a text that is read."""
        vector = text.vector / len(text.request.tokens) if self._pooling.how == "mean" else text.vector
        return vector / max(np.linalg.norm(vector), 1e-12) if self._pooling.unit else vector

    def _end(self, text: Text) -> None:
        self._texts.remove(text)
        self._blocks.release(text.blocks)
