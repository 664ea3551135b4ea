"""Texts until they end: prompts of like length together, a few tokens at a time, so that a batch ends with its last."""

import contextlib
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from evaluation.scoring import Progress, Scorer
from evaluation.shapes import choose_shapes, padded
from inference.generate import decode, prefill
from inference.sampling import sample as draw
from model.kv_cache import make_cache
from parallel.sharding import shard, splits

STEPS = 16  # tokens between two looks at whether the texts have ended
TOKENS_TO_ONE_READ = 4  # tokens in the cache of a batch to one that is scored at once: a step reads all weights for it


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the default takes the likeliest one, whatever the seed."""

    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # 0 off
    top_p: float = 1.0  # 1 off
    seed: int = 0


def generate_until(
    scorer: Scorer,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    ended: Callable[[int, list[int]], bool],
    *,
    eos_id: int,
    sampling: Sampling = Sampling(),
    progress: Progress = lambda done, total: None,
) -> list[list[int]]:
    """New tokens for each prompt: up to `tokens`, those before `eos_id`, or some more than it takes to be `ended`.

    ended: called as (number of the prompt, its new tokens). A row depends on its prompt, its number and the seed alone.
    All processes of a mesh make the same call.
    """
    lengths, found, done = np.array([len(prompt) for prompt in prompts]), {}, 0
    room = -(-tokens // STEPS) * STEPS
    limits = replace(scorer.limits, batch_tokens=TOKENS_TO_ONE_READ * scorer.limits.batch_tokens, longest=1 << 30)
    for shape, members in choose_shapes(lengths + room, np.ones_like(lengths), limits, scorer.costs):
        T = padded(int(lengths[members].max()), scorer.limits)
        for batch in shape.batches(members):
            tokens_BT = np.zeros((shape.rows, T), np.int32)
            lengths_B = np.ones(shape.rows, np.int32)
            for row, number in enumerate(batch):
                tokens_BT[row, : lengths[number]] = prompts[number]
                lengths_B[row] = lengths[number]
            new = _continue(scorer, tokens_BT, lengths_B, batch, tokens, room, ended, eos_id, sampling)
            found |= dict(zip(batch.tolist(), new, strict=True))
            done += len(batch)
            progress(done, len(prompts))
    return [found[number] for number in range(len(prompts))]


def _continue(scorer, tokens_BT, lengths_B, numbers, tokens, room, ended, eos_id, sampling) -> list[list[int]]:
    """New tokens of the rows that stand for prompts, those of one batch."""
    model, dtype = scorer.description.bind(scorer.params), scorer.dtype
    seeds_B = np.array([zlib.crc32(np.asarray([n, sampling.seed], "<i8").tobytes()) for n in numbers], np.uint32)
    seeds_B = np.resize(seeds_B, len(lengths_B))
    options = {"dtype": dtype, "options": (sampling.temperature, sampling.top_k, sampling.top_p)}
    exact = jax.default_matmul_precision("float32") if dtype == jnp.float32 else contextlib.nullcontext()
    new, live = [[] for _ in numbers], set(range(len(numbers)))
    with exact:
        carry = _begin(model, tokens_BT, lengths_B, seeds_B, room=room, **options)
        for _ in range(0, tokens, STEPS):
            carry, out_BT = _advance(model, carry, seeds_B, **options)
            out_BT = np.asarray(out_BT).tolist()
            for row in sorted(live):
                ids = (new[row] + out_BT[row])[:tokens]
                stops = eos_id in ids
                new[row] = ids[: ids.index(eos_id)] if stops else ids
                if stops or ended(int(numbers[row]), new[row]):
                    live.discard(row)
            if not live:
                break
    return new


def _choose(logits_BV, seeds_B, positions_B, options):
    temperature, top_k, top_p = options
    keys = jax.vmap(lambda seed, position: jax.random.fold_in(jax.random.key(seed), position))(seeds_B, positions_B)
    return draw(logits_BV, keys, temperature=temperature, top_k=top_k, top_p=top_p)


@partial(jax.jit, static_argnames=("room", "dtype", "options"))
def _begin(model, tokens_BT, lengths_B, seeds_B, *, room: int, dtype, options):
    """The first new token of each row, its position, and a cache with room for so many."""
    B, T = tokens_BT.shape
    split = splits("tokens")
    cache = make_cache(model.config, B, -(-(T + room) // split) * split, dtype)
    cache = jax.tree.map(lambda x: shard(x, None, "batch", None, "kv_heads", "head_dim"), cache)
    logits_BV, cache = prefill(model, tokens_BT, lengths_B, cache, dtype)
    return _choose(logits_BV, seeds_B, lengths_B, options), lengths_B, cache


@partial(jax.jit, static_argnames=("dtype", "options"), donate_argnames="carry")
def _advance(model, carry, seeds_B, *, dtype, options):
    """STEPS tokens of each row, the carried one first; the carry after them."""

    def one(carry, _):
        tokens_B, positions_B, cache = carry
        logits_BV, cache = decode(model, tokens_B, positions_B, cache, dtype)
        return (_choose(logits_BV, seeds_B, positions_B + 1, options), positions_B + 1, cache), tokens_B

    carry, out_TB = jax.lax.scan(one, carry, length=STEPS)
    return carry, shard(out_TB.T, None, None)  # whole, so that every process can read them
