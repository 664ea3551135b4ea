"""The compiled programs of an engine: a few shapes, compiled ahead, and the arrays that they keep on the devices.

A step takes B rows of at most T tokens, one row a sequence. It writes their keys and values into the blocks of the
cache, and draws the token after each row's last. Everything that a step is told comes as one int32 array, so that one
transfer starts it. The arrays that stay are donated: the cache is changed in place.
"""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from finetune.adapters.switched import Places, beside, fill, make_room, of_layer, put, with_rows
from inference.drawing import EVERY_TOKEN, Drawn, Slots, draw, empty_slots, logprobs, note, occupy, slot_values
from inference.generate import exact_matmuls
from inference.opening import Opened
from inference.requests import Sampling
from inference.scheduler import Batch, Row
from model.block_cache import BlockCache, make_pool
from model.unstacked import run, unstack
from parallel.sharding import replicated, shard, splits

# Columns of a row before its tokens and its blocks.
SLOT, START, COUNT, DRAWS, NEXT, PROMPT, PLACE, HEADER = range(8)
NEWEST = -1  # instead of a token: the one that the slot drew last
SMALLEST_READ = 16  # tokens that a part of a prompt is padded to at least
LONG_READ = 96  # tokens of a part from which on there are sizes halfway between powers of two


def part_sizes(chunk: int) -> list[int]:
    """What parts of prompts are padded to, in tokens: powers of two, `chunk`, and for long parts sizes halfway, since
    all weights are multiplied with each token of padding.
    """
    sizes, power = [chunk], SMALLEST_READ
    while power < chunk:
        halfway = power * 3 // 2
        sizes += [power] + [halfway] * (LONG_READ <= halfway < chunk)
        power *= 2
    return sorted(sizes)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Kept:
    """What stays on the devices between steps."""

    pools: tuple  # of each layer
    last_R: jax.Array  # the token that each slot drew last
    slots: Slots


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scores:
    """Of each token of a part of a prompt: the log-probability of the token after it, and the likeliest ones."""

    logprobs_BT: jax.Array
    top_ids_BTK: jax.Array
    top_logprobs_BTK: jax.Array


@dataclass(frozen=True)
class InFlight:
    """A step that has begun."""

    batch: Batch
    result: Drawn | Scores  # on its way
    began: float  # time.monotonic()


@dataclass(frozen=True)
class Shape:
    """Of a program: rows, tokens of each; whether the tokens' log-probabilities are wanted instead of a draw, or a
    draw after each token, of which all but the first are proposals.
    """

    rows: int
    tokens: int
    scores: bool = False
    drafts: bool = False


@dataclass
class Programs:
    """Runs the steps of one model. Everything but `compile` is for the one thread that owns the arrays."""

    opened: Opened
    slots: int
    blocks: int
    block: int
    length: int  # tokens of the longest sequence
    chunk: int
    cache_dtype: str = ""  # int8, or "" for that of activations
    drafted: int = 0  # proposals that a step checks in a row
    places: Places | None = None  # of adapters
    compiled: dict = field(default_factory=dict)

    def __post_init__(self):
        opened = self.opened
        self.table = -(-self.length // self.block)
        with jax.set_mesh(opened.mesh):
            self.outside, self.block_modules, self.layers = unstack(
                opened.description, opened.params, opened.mesh, opened.dtype
            )
            if self.places is not None:
                room = self.places, opened.config.model, self.block_modules, self.layers
                self.block_modules, self.layers = make_room(*room, opened.mesh, opened.dtype)
            self.batch_rows, self.even = splits("batch"), splits("residual")
        self.width = opened.description.shapes["tokens"]["weight"].shape[0]  # of the vocabulary, padded
        if "head" in opened.description.shapes:
            self.width = opened.description.shapes["head"]["weight"].shape[0]
        self.words = -(-self.width // 32)
        self._make = jax.jit(self._emptied)  # one function, compiled once: nothing compiles after a fault
        self.empty()

    # ---- the arrays ----

    def empty(self) -> None:
        """An empty cache and slots that nobody holds."""
        self.kept = None
        with jax.set_mesh(self.opened.mesh):
            self.kept = self._make()
        self.placed = jax.tree.map(lambda x: x.sharding, self.kept)

    def _emptied(self) -> Kept:
        config, entries = self.opened.config.model, self.blocks * self.block
        dtype = self.cache_dtype or self.opened.dtype
        pools = tuple(tuple(make_pool(config, entries, dtype) for _ in "kv") for _ in range(config.layers))
        last_R = shard(jnp.zeros(self.slots, jnp.int32), None)
        return Kept(pools, last_R, empty_slots(self.slots, self.width))

    def occupy(self, slot: int, values: Slots) -> None:
        """Says how a slot draws from now on; `values` are those of inference.drawing.slot_values."""
        slots = self.compiled["occupy"](self.kept.slots, np.int32(slot), values)
        self.kept = replace(self.kept, slots=slots)

    def fill(self, place: int, values: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        """Puts an adapter into a place, from 1 on; `values` are those of inference.adapter_books.Adapter."""
        for index, layer in enumerate(self.layers):
            own = of_layer(self.places, self.opened.config.model, values, index)
            self.layers[index] = put(layer, self.compiled["fill"](layer, np.int32(place), own))

    def with_adapters(self, layers: list[dict], place_B: jax.Array) -> list[dict]:
        """The layers as `run` takes them, where row b has the adapter of place `place_B[b]`, int32 (B,); 0: none."""
        return [with_rows(self.places, layer, place_B) for layer in layers] if self.places is not None else layers

    # ---- the programs ----

    def shapes(self) -> list[Shape]:
        """All shapes of steps, a short list: powers of two of rows that decode, and `part_sizes` of prompts."""
        rows = [self.batch_rows]
        while rows[-1] < self.slots:
            rows.append(rows[-1] * 2)
        tokens = sorted({self.even_tokens(size) for size in part_sizes(self.chunk)})
        decode = [Shape(r, 1) for r in rows]
        if self.drafted:
            decode += [Shape(r, 1 + self.drafted, drafts=True) for r in rows]
        return [*decode, *(Shape(self.batch_rows, t) for t in tokens), Shape(self.batch_rows, tokens[-1], True)]

    def compile(self) -> None:
        """Compiles every program, several at a time."""
        mesh, opened = self.opened.mesh, self.opened
        with jax.set_mesh(mesh), exact_matmuls(opened.dtype), ThreadPoolExecutor(os.cpu_count()) as pool:
            values = slot_values(Sampling(), self.width, prompt=[0])
            jitted = jax.jit(occupy, donate_argnums=0, out_shardings=self.placed.slots)
            self.compiled["occupy"] = jitted.lower(self.kept.slots, np.int32(0), values).compile()
            if self.places is not None:
                lies = jax.tree.map(lambda x: x.sharding, beside(self.places, self.layers[0]))
                filled = jax.jit(partial(fill, self.places, self.block_modules), out_shardings=lies)
                empty = of_layer(self.places, opened.config.model, {}, 0)
                self.compiled["fill"] = filled.lower(self.layers[0], np.int32(1), empty).compile()
            self.everything = {}
            for shape in self.shapes():
                everything = np.full((shape.rows, self.words), EVERY_TOKEN, np.uint32)
                everything = self.everything[shape.rows] = jax.device_put(everything, replicated(mesh))
                step = jax.jit(
                    partial(self._step, shape), donate_argnums=2, out_shardings=(self.placed, replicated(mesh))
                )
                rows = np.zeros((shape.rows, HEADER + shape.tokens + self.table), np.int32)
                arguments = self.outside, self.layers, self.kept, rows, everything
                self.compiled[shape] = pool.submit(step.lower(*arguments).compile)
            self.compiled |= {shape: self.compiled[shape].result() for shape in self.shapes()}

    def _step(self, shape: Shape, outside, layers, kept: Kept, rows_BX, allowed_BW):
        description, T = self.opened.description, shape.tokens
        slot_B, start_B, count_B, draws_B, next_B, prompt_B, place_B = (rows_BX[:, column] for column in range(HEADER))
        tokens_BT, table_BM = rows_BX[:, HEADER : HEADER + T], rows_BX[:, HEADER + T :]
        newest_B = kept.last_R.at[slot_B].get(mode="fill", fill_value=0)
        tokens_BT = jnp.where(tokens_BT == NEWEST, newest_B[:, None], tokens_BT)
        t = jnp.arange(T, dtype=jnp.int32)
        there_BT = t < count_B[:, None]
        positions_BT = jnp.where(there_BT, start_B[:, None] + t, self.table * self.block)
        places_BT = jnp.where(there_BT, positions_BT, start_B[:, None])
        # as when a prompt is read at once and each token after it by itself, however the steps are cut
        lengths_BT = jnp.maximum(prompt_B[:, None], places_BT + 1)
        layers = self.with_adapters(layers, place_B)
        caches = [BlockCache(*pool, table_BM, self.block) for pool in kept.pools]
        model = description.bind(outside)
        x_BTD, caches = run(
            model, self.block_modules, layers, tokens_BT, positions_BT, places_BT, lengths_BT, caches, self.opened.dtype
        )
        pools = tuple((cache.keys, cache.values) for cache in caches)
        if shape.scores:
            after_BT = jnp.where(t == count_B[:, None] - 1, next_B[:, None], jnp.roll(tokens_BT, -1, axis=1))
            scored = logprobs(model.logits(x_BTD).reshape(-1, self.width), after_BT.reshape(-1))
            return replace(kept, pools=pools), Scores(*(x.reshape(-1, T, *x.shape[1:]) for x in scored))
        if shape.drafts:
            return self._checked(model, replace(kept, pools=pools), x_BTD, tokens_BT, rows_BX, allowed_BW)
        last_B1D = jnp.take_along_axis(x_BTD, jnp.maximum(count_B - 1, 0)[:, None, None], axis=1)
        drawn = draw(kept.slots, slot_B, model.logits(last_B1D)[:, 0], start_B + count_B, allowed_BW)
        draws_B = draws_B > 0
        last_R = kept.last_R.at[jnp.where(draws_B, slot_B, self.slots)].set(drawn.tokens_B, mode="drop")
        return Kept(pools, last_R, note(kept.slots, slot_B, drawn.tokens_B, draws_B)), drawn

    def _checked(self, model, kept: Kept, x_BTD, tokens_BT, rows_BX, allowed_BW):
        """A draw after every token. Those count that come after the row's first token and right proposals."""
        (B, T), R = tokens_BT.shape, self.slots
        slot_B, start_B, count_B, draws_B, *_ = (rows_BX[:, column] for column in range(HEADER))
        flat = lambda x_BT: x_BT.reshape(B * T)
        t = jnp.arange(T, dtype=jnp.int32)
        slot_BT = jnp.where(t < count_B[:, None], slot_B[:, None], R)
        # a mask is of the first draw; rows with a grammar have no proposals
        everything = jnp.full_like(allowed_BW, EVERY_TOKEN)[:, None].repeat(T - 1, 1)
        allowed_BTW = jnp.concatenate([allowed_BW[:, None], everything], axis=1)
        drawn = draw(
            kept.slots, flat(slot_BT), model.logits(x_BTD).reshape(B * T, -1), flat(start_B[:, None] + t + 1),
            allowed_BTW.reshape(B * T, -1),
        )  # fmt: skip
        drawn_BT = drawn.tokens_B.reshape(B, T)
        right_BT = (drawn_BT[:, :-1] == tokens_BT[:, 1:]) & (t[1:] < count_B[:, None])
        right_B = jnp.cumprod(right_BT, axis=1).sum(1)
        newest_B = jnp.take_along_axis(drawn_BT, right_B[:, None], axis=1)[:, 0]
        last_R = kept.last_R.at[jnp.where(draws_B > 0, slot_B, R)].set(newest_B, mode="drop")
        live_BT = (t <= right_B[:, None]) & (draws_B[:, None] > 0)
        slots = note(kept.slots, flat(slot_BT), drawn.tokens_B, flat(live_BT))
        return replace(kept, last_R=last_R, slots=slots), drawn

    def even_tokens(self, tokens: int) -> int:
        """So many tokens, or the next number that the mesh divides."""
        return -(-tokens // self.even) * self.even

    @property
    def longest_read(self) -> int:
        """Tokens of a prompt that one step reads at most."""
        return self.even_tokens(self.chunk)

    # ---- a step ----

    def run(self, rows: Sequence[Row], masks: dict[int, np.ndarray], *, scores: bool = False) -> Drawn | Scores:
        """Starts a step; what it returns is there when it is read. `masks` are of rows with a grammar, by index."""
        longest, drafts = max(row.count for row in rows), self.drafted > 0 and any(row.drafted for row in rows)
        shape = min(
            (s for s in self.compiled if isinstance(s, Shape) and s.rows >= len(rows) and s.tokens >= longest
             and s.scores == scores and s.drafts == drafts),
            key=lambda s: (s.tokens, s.rows),
        )  # fmt: skip
        T = shape.tokens
        packed = np.zeros((shape.rows, HEADER + T + self.table), np.int32)
        packed[:, SLOT] = self.slots
        for index, row in enumerate(rows):
            sequence = row.sequence
            known = [*sequence.tokens[row.start : row.start + row.count - len(row.drafted)], *row.drafted]
            header = sequence.slot, row.start, row.count, row.draws, 0, sequence.prompt, sequence.place
            packed[index, :HEADER] = header
            packed[index, HEADER : HEADER + row.count] = known or [NEWEST]
            if scores:
                packed[index, NEXT] = sequence.tokens[row.start + row.count]
            packed[index, HEADER + T : HEADER + T + len(sequence.blocks)] = sequence.blocks
        allowed = self.everything[shape.rows]
        if masks:
            allowed = np.full(allowed.shape, EVERY_TOKEN, np.uint32)
            for index, mask in masks.items():
                allowed[index, : len(mask)] = mask
        self.kept, result = self.compiled[shape](self.outside, self.layers, self.kept, packed, allowed)
        return result
