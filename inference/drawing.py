"""The next tokens of many requests at once, each drawn in its own way, by one compiled program.

What a request asks for lies in its slot, as data: nothing compiles when requests come and go. What costs a pass over
the vocabulary is done only where a row of the batch asks for it.

The order is that of `transformers`: logit bias, penalties, grammar; then temperature, top-k, top-p, min-p. What a row
draws depends on its own logits, slot and position alone.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from inference.requests import MOST_BIASED, MOST_TOP, Sampling
from model.heads import NO_TOKEN
from parallel.sharding import shard

EVERY_TOKEN = 0xFFFFFFFF  # a word of a mask that allows all of its 32 tokens
BLOCK = 256  # tokens that a draw chooses from, once it has chosen their block


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Asks:
    """How the tokens of R requests are drawn. Every default changes nothing."""

    temperature_R: jax.Array | float = 0.0  # 0: greedy
    top_k_R: jax.Array | int = 0
    top_p_R: jax.Array | float = 1.0
    min_p_R: jax.Array | float = 0.0
    repetition_R: jax.Array | float = 1.0
    presence_R: jax.Array | float = 0.0
    frequency_R: jax.Array | float = 0.0
    biased_R: jax.Array | bool = False  # has a logit bias
    logprobs_R: jax.Array | bool = False  # wants log-probabilities


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Slots:
    """What the requests in R slots ask for, and the tokens they have seen. Of one request: without the first dim."""

    asks: Asks
    key_R2: jax.Array  # uint32, of its random numbers
    bias_ids_RK: jax.Array  # int32; the vocabulary's width where there is none
    bias_RK: jax.Array
    seen_RV: jax.Array  # int32: twice the times that a token is in the new text, and 1 more if it is in the prompt


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Drawn:
    """A token a row; log-probabilities (natural, temperature 1, nothing added) are 0 unless a row asks for them."""

    tokens_B: jax.Array
    logprobs_B: jax.Array
    top_ids_BK: jax.Array  # the likeliest MOST_TOP tokens, best first
    top_logprobs_BK: jax.Array


def slot_values(
    sampling: Sampling, vocabulary: int, *, choice: int = 0, prompt: Sequence[int] = (), new: Sequence[int] = ()
) -> Slots:
    """What a slot holds for one choice of a request, as numpy arrays.

    vocabulary: width of the logits, with padding. new: tokens drawn before, of a request that was interrupted. The
    request has a seed: whoever takes one without draws it, and keeps it for all tokens.
    """
    asks = Asks(
        temperature_R=np.float32(sampling.temperature),
        top_k_R=np.int32(min(sampling.top_k, vocabulary)),
        top_p_R=np.float32(sampling.top_p),
        min_p_R=np.float32(sampling.min_p),
        repetition_R=np.float32(sampling.repetition_penalty),
        presence_R=np.float32(sampling.presence_penalty),
        frequency_R=np.float32(sampling.frequency_penalty),
        biased_R=np.bool_(bool(sampling.logit_bias)),
        logprobs_R=np.bool_(sampling.logprobs is not None),
    )
    digest = hashlib.blake2b(f"{sampling.seed} {choice}".encode(), digest_size=8).digest()
    ids_K, bias_K = np.full(MOST_BIASED, vocabulary, np.int32), np.zeros(MOST_BIASED, np.float32)
    ids_K[: len(sampling.logit_bias)] = list(sampling.logit_bias)
    bias_K[: len(sampling.logit_bias)] = list(sampling.logit_bias.values())
    seen_V = 2 * np.bincount(np.asarray(new, np.int64), minlength=vocabulary).astype(np.int32)
    seen_V[np.asarray(prompt, np.int64)] += 1
    return Slots(asks, np.frombuffer(digest, np.uint32), ids_K, bias_K, seen_V)


@partial(jax.jit, static_argnames=("slots", "vocabulary"))
def empty_slots(slots: int, vocabulary: int) -> Slots:
    """Slots of greedy requests without anything. vocabulary: width of the logits, with padding."""
    one = slot_values(Sampling(temperature=0), vocabulary)
    return _pinned(jax.tree.map(lambda x: jnp.broadcast_to(x, (slots, *np.shape(x))), one))


def occupy(slots: Slots, slot: jax.Array, values: Slots) -> Slots:
    """The slots with what `slot_values` made in one of them; donate the slots to have it done in place."""
    return _pinned(jax.tree.map(lambda all_R, one: all_R.at[slot].set(one), slots, values))


def note(slots: Slots, slot_of_row_B: jax.Array, tokens_B: jax.Array, live_B: jax.Array) -> Slots:
    """The slots after live rows have drawn these tokens."""
    slot_B = jnp.where(live_B, slot_of_row_B, len(slots.seen_RV))
    seen_RV = slots.seen_RV.at[slot_B, tokens_B].add(2, mode="drop")
    return _pinned(replace(slots, seen_RV=seen_RV))


def draw(
    slots: Slots,
    slot_of_row_B: jax.Array,
    logits_BV: jax.Array,
    positions_B: jax.Array,
    allowed_BW: jax.Array | None = None,
) -> Drawn:
    """Draws the token of each row that stands at this position of its sequence.

    Rows that nothing runs in have a slot beyond the last one: they are greedy. logits_BV are float32. allowed_BW are
    uint32 words, bit t % 32 of word t // 32 for token t; rows without a grammar have EVERY_TOKEN in each.
    Greedy rows take the first of the largest logits, bitwise. Padding of the vocabulary is never drawn, nor does its
    width change what is.
    """
    asks = asks_of(slots, slot_of_row_B)
    adjusted_BV = adjusted(slots, slot_of_row_B, logits_BV, allowed_BW)

    def sampled(tokens_B):
        key_B2 = slots.key_R2.at[slot_of_row_B].get(mode="fill", fill_value=0)
        random_B = _random(narrowed(adjusted_BV, asks), key_B2, positions_B)
        return jnp.where(asks.temperature_R > 0, random_B, tokens_B)

    tokens_B = _if_any(asks.temperature_R > 0, sampled, jnp.argmax(adjusted_BV, axis=-1).astype(jnp.int32))
    score = partial(logprobs, logits_BV)
    silent = lambda tokens_B: jax.tree.map(jnp.zeros_like, jax.eval_shape(score, tokens_B))
    return Drawn(tokens_B, *jax.lax.cond(asks.logprobs_R.any(), score, silent, tokens_B))


def logprobs(logits_BV: jax.Array, tokens_B: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Natural log-probabilities of these tokens (B,), and of the likeliest MOST_TOP: ids and theirs (B, K)."""
    total_B = jax.nn.logsumexp(logits_BV, axis=-1)
    of_tokens_B1 = jnp.take_along_axis(logits_BV, tokens_B[:, None], axis=-1)
    top_BK, ids_BK = jax.lax.top_k(logits_BV, min(MOST_TOP, logits_BV.shape[1]))
    return of_tokens_B1[:, 0] - total_B, ids_BK, top_BK - total_B[:, None]


# ---- the steps of a draw -----------------------------------------------------------------------------------------


def _pinned(slots: Slots) -> Slots:
    """Counts lie as logits do, the rest is whole on every device."""
    whole = jax.tree.map(lambda x: shard(x, *[None] * x.ndim), replace(slots, seen_RV=None))
    return replace(whole, seen_RV=shard(slots.seen_RV, None, "vocab"))


def _if_any(rows_B: jax.Array, change: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """`change` of x where a row asks for it: it must leave the other rows as they are."""
    return jax.lax.cond(rows_B.any(), change, lambda x: x, x)


def asks_of(slots: Slots, slot_of_row_B: jax.Array) -> Asks:
    """How each row is drawn."""
    fill = lambda x_R, off: x_R.at[slot_of_row_B].get(mode="fill", fill_value=off)
    return jax.tree.map(fill, slots.asks, Asks())


def adjusted(slots: Slots, slot_of_row_B: jax.Array, logits_BV: jax.Array, allowed_BW: jax.Array | None) -> jax.Array:
    """Logits with bias and penalties; -inf for what a grammar does not allow."""
    asks = asks_of(slots, slot_of_row_B)
    of_row = lambda x_RK, off: x_RK.at[slot_of_row_B].get(mode="fill", fill_value=off)

    def biased(x_BV):
        ids_BK, bias_BK = of_row(slots.bias_ids_RK, x_BV.shape[1]), of_row(slots.bias_RK, 0)
        return x_BV.at[jnp.arange(len(x_BV))[:, None], ids_BK].add(bias_BK, mode="drop")

    def penalised(x_BV):
        seen_BV = of_row(slots.seen_RV, 0)
        times_BV, repetition_B1 = seen_BV // 2, asks.repetition_R[:, None]
        repeated_BV = jnp.where(x_BV > 0, x_BV / repetition_B1, x_BV * repetition_B1)
        x_BV = jnp.where(seen_BV > 0, repeated_BV, x_BV)
        return x_BV - asks.presence_R[:, None] * (times_BV > 0) - asks.frequency_R[:, None] * times_BV

    def constrained(x_BV):
        token_V = jnp.arange(x_BV.shape[1])
        bits_BV = allowed_BW[:, token_V // 32] >> (token_V % 32).astype(jnp.uint32)
        return jnp.where((bits_BV & 1) == 1, x_BV, -jnp.inf)

    x_BV = _if_any(asks.biased_R, biased, logits_BV)
    penalties_B = (asks.repetition_R != 1) | (asks.presence_R != 0) | (asks.frequency_R != 0)
    x_BV = _if_any(penalties_B, penalised, x_BV)
    if allowed_BW is None:
        return x_BV
    return _if_any((allowed_BW != np.uint32(EVERY_TOKEN)).any(-1), constrained, x_BV)


def narrowed(x_BV: jax.Array, asks: Asks) -> jax.Array:
    """Logits over the temperature, the largest of each row 0; -inf for what is not to be drawn.

    top_k: of equal logits at its border all stay. top_p: the fewest likeliest tokens whose probability reaches p
    (nucleus sampling, arXiv 1904.09751), of those that top_k left. min_p: arXiv 2407.01082.
    """
    column = lambda x_B: x_B[:, None]
    temperature_B = jnp.where(asks.temperature_R > 0, asks.temperature_R, 1)
    # from the row's maximum, so that a small temperature overflows to -inf only
    scaled_BV = (x_BV - x_BV.max(-1, keepdims=True)) / column(temperature_B)
    scaled_BV = jnp.where(x_BV > NO_TOKEN, scaled_BV, -jnp.inf)

    def cut(scaled_BV, weights_BV, target_B, on_B):
        threshold_B = jnp.where(on_B, _reaching(scaled_BV, weights_BV, target_B), -jnp.inf)
        return jnp.where(scaled_BV >= column(threshold_B), scaled_BV, -jnp.inf)

    def top_k(scaled_BV):
        return cut(scaled_BV, jnp.ones_like(scaled_BV), asks.top_k_R.astype(jnp.float32), asks.top_k_R > 0)

    def top_p(scaled_BV):
        weights_BV = jnp.exp(scaled_BV)
        return cut(scaled_BV, weights_BV, asks.top_p_R * weights_BV.sum(-1), asks.top_p_R < 1)

    scaled_BV = _if_any(asks.top_k_R > 0, top_k, scaled_BV)
    scaled_BV = _if_any(asks.top_p_R < 1, top_p, scaled_BV)
    return jnp.where(scaled_BV >= column(jnp.log(asks.min_p_R)), scaled_BV, -jnp.inf)


def _reaching(x_BV: jax.Array, weights_BV: jax.Array, target_B: jax.Array) -> jax.Array:
    """The largest t of each row so that the weights of x >= t sum up to the target. x is at most 0, weights are not
    negative. -inf where all together do not.

    A search over the bits of t: 31 passes over the vocabulary, where sorting 49,152 tokens on a CPU takes as long as
    500 of them, and no exchange of logits between devices.
    """
    lowest = np.int32(-0x7F800001)  # of -inf, where floats are numbered in their order

    def float_of(number_B):
        return jax.lax.bitcast_convert_type(jnp.where(number_B < 0, number_B ^ 0x7FFFFFFF, number_B), jnp.float32)

    def halve(_, range_B):
        low_B, high_B = range_B
        middle_B = low_B + (high_B - low_B + 1) // 2
        reached_B = jnp.where(x_BV >= float_of(middle_B)[:, None], weights_BV, 0).sum(-1) >= target_B
        return jnp.where(reached_B, middle_B, low_B), jnp.where(reached_B, high_B, middle_B - 1)

    B = len(x_BV)
    return float_of(jax.lax.fori_loop(0, 31, halve, (jnp.full(B, lowest), jnp.zeros(B, jnp.int32)))[0])


def _random(scaled_BV: jax.Array, key_B2: jax.Array, positions_B: jax.Array) -> jax.Array:
    """Draws by these unnormalised log-probabilities: a block of tokens by its sum, then one of its tokens.

    Both draws add noise to each log-probability and take the largest (the Gumbel trick), so that noise stays with an
    id, and a near tie far from the draw cannot change it. Random numbers for every token would cost more than logits.
    """
    B, V = scaled_BV.shape
    scaled_BV = jnp.pad(scaled_BV, ((0, 0), (0, -V % BLOCK)), constant_values=-jnp.inf)
    blocks_BnK = scaled_BV.reshape(B, -1, BLOCK)
    keys_B = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(key_B2, impl="threefry2x32"), positions_B)
    noise = lambda purpose, width: jax.vmap(lambda k: jax.random.gumbel(jax.random.fold_in(k, purpose), width))(keys_B)
    block_B = jnp.argmax(jnp.log(jnp.exp(blocks_BnK).sum(-1)) + noise(0, blocks_BnK.shape[1:2]), axis=-1)
    of_block_BK = jnp.take_along_axis(blocks_BnK, block_B[:, None, None], axis=1)[:, 0]
    return (block_B * BLOCK + jnp.argmax(of_block_BK + noise(1, (BLOCK,)), axis=-1)).astype(jnp.int32)
