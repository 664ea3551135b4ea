"""Text from a model: `prefill` reads prompts into a cache, `decode` adds a token, `generate` compiles the loop of both.

All are pure functions. They run wherever the parameters lie: on one device, or sharded over the mesh in context.
"""

import contextlib
import logging
import sys
import zlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from inference.config import SampleConfig
from inference.detokenizer import after_prompt
from inference.sampling import sample as draw
from model.config import ModelConfig
from model.kv_cache import LayerCache, make_cache
from model.transformer import Description, Transformer
from parallel.sharding import shard, splits

logger = logging.getLogger("isomesh.inference")

SMALLEST_BUCKET = 16  # tokens that a batch of prompts is padded to at least: shorter ones share a compiled program


def prefill(
    model: Transformer, tokens_BT: jax.Array, lengths_B: jax.Array, cache: LayerCache, dtype=jnp.float32
) -> tuple[jax.Array, LayerCache]:
    """Reads right-padded prompts: float32 logits_BV after the last token of each, and the cache that holds them.

    What padding leaves in the cache lies behind a row's last token, where the causal mask hides it until `decode`
    overwrites it.
    """
    x_BTD, cache, _ = model(tokens_BT, lengths_BT=lengths_B[:, None], cache=cache, dtype=dtype)
    last_B1D = jnp.take_along_axis(x_BTD, (lengths_B - 1)[:, None, None], axis=1)
    return model.logits(last_B1D)[:, 0], cache


def decode(
    model: Transformer, tokens_B: jax.Array, positions_B: jax.Array, cache: LayerCache, dtype=jnp.float32
) -> tuple[jax.Array, LayerCache]:
    """Reads one more token a row, at its position: float32 logits_BV of the next one, and the cache."""
    positions_B1 = positions_B[:, None]
    x_B1D, cache, _ = model(
        tokens_B[:, None], positions_BT=positions_B1, lengths_BT=positions_B1 + 1, cache=cache, dtype=dtype
    )
    return model.logits(x_B1D)[:, 0], cache


def generate(
    description: Description,
    params: dict,
    prompts: Sequence[Sequence[int]],
    sample: SampleConfig,
    *,
    eos_id: int | None = None,
    stop_ids: Sequence[int] = (),
    dtype=jnp.float32,
    programs: Mapping | None = None,
) -> list[list[int]]:
    """Up to `sample.tokens` new tokens for each prompt; a row that draws `eos_id` or one of `stop_ids` ends before it.

    `sample.prompts` is not looked at. A row depends on its prompt and the seed alone, not on the rest of the batch; a
    prompt that is given twice is continued in two ways. An empty prompt starts at `eos_id`. All processes of a mesh
    make the same call and get the same answer. `programs` are those of `compiled_for`, if any.
    Raises ValueError where the model cannot generate, or not from these prompts, or not so much.
    """
    prompts = [list(prompt) or ([] if eos_id is None else [eos_id]) for prompt in prompts]
    check(description.config, prompts, sample.tokens)
    if not prompts or sample.tokens == 0:
        return [[] for _ in prompts]
    stops = [*([] if eos_id is None else [eos_id]), *stop_ids]
    request = _Request.of(description.config, prompts, sample, stops, dtype)
    out_BT, counts_B = request.answer(description.bind(params), programs or {})
    rows_and_counts = zip(np.asarray(out_BT).tolist(), np.asarray(counts_B).tolist(), strict=True)
    return [row[:count] for row, count in rows_and_counts][: len(prompts)]


@dataclass(frozen=True)
class _Request:
    """What `_generate` is called with, behind the model."""

    arrays: tuple
    static: dict

    @classmethod
    def of(cls, config: ModelConfig, prompts: list[list[int]], sample: SampleConfig, stops: list[int], dtype):
        """Prompts that are no longer empty, in as many rows as the mesh divides."""
        rows = -(-len(prompts) // splits("batch")) * splits("batch")
        prompts_BT = np.zeros((rows, _bucket(config, max(map(len, prompts)))), np.int32)
        lengths_B = np.ones(rows, np.int32)
        for row, prompt in enumerate(prompts):
            prompts_BT[row, : len(prompt)] = prompt
            lengths_B[row] = len(prompt)
        seeds_B2, seed = _row_seeds(prompts, rows), np.uint32(sample.seed % 2**32)
        live_B, end = np.arange(rows) < len(prompts), np.asarray(stops or [-1], np.int32)
        drawing = {"temperature": sample.temperature, "top_k": sample.top_k, "top_p": sample.top_p}
        static = {"tokens": sample.tokens, "dtype": jnp.dtype(dtype), **drawing}
        return cls((prompts_BT, lengths_B, live_B, seeds_B2, seed, end), static)

    @property
    def program(self) -> tuple:
        """What tells the program that answers it from others."""
        return self.arrays[0].shape, self.arrays[-1].shape, *self.static.values()

    def answer(self, model: Transformer, programs: Mapping) -> tuple[jax.Array, jax.Array]:
        """New tokens and how many of each row count, by one of the programs or one that is compiled now."""
        if (compiled := programs.get(self.program)) is not None:
            return compiled(model, *self.arrays)
        with exact_matmuls(self.static["dtype"]):
            return _generate(model, *self.arrays, **self.static)

    def compile(self, model: Transformer) -> jax.stages.Compiled:
        """Its program, for a model of shapes with shardings."""
        with exact_matmuls(self.static["dtype"]):
            return _generate.lower(model, *self.arrays, **self.static).compile()


def _by_reach(config: ModelConfig, tokenizer, sample: SampleConfig) -> tuple[list[list[int]], dict[int, list[int]]]:
    """The tokens of each of `sample.prompts`, and which rows have room for how many new tokens, if for any: rows that
    reach equally far are generated together.
    """
    ids, rows_by_tokens = (
        [tokenizer.encode(p).tolist() or [tokenizer.eos_id] for p in sample.prompts],
        defaultdict(list),
    )
    for row, prompt in enumerate(ids):
        if (room := room_behind(config, prompt)) > 0:
            rows_by_tokens[min(sample.tokens, room)].append(row)
    return ids, rows_by_tokens


def compiled_for(description: Description, params: dict, tokenizer, sample: SampleConfig, dtype) -> dict:
    """The programs that `continuations` asks for. `params` may be shapes with shardings. Raises ValueError as that."""
    ids, rows_by_tokens = _by_reach(description.config, tokenizer, sample)
    found = {}
    for tokens, rows in rows_by_tokens.items():
        prompts = [ids[row] for row in rows]
        check(description.config, prompts, tokens)
        request = _Request.of(description.config, prompts, replace(sample, tokens=tokens), [tokenizer.eos_id], dtype)
        found[request.program] = request.compile(description.bind(params))
    return found


def continuations(
    description: Description, params: dict, tokenizer, sample: SampleConfig, dtype, programs: Mapping | None = None
) -> list[tuple[str, str]]:
    """Each of `sample.prompts` with what the model makes of it, as far as its learned positions reach.

    A prompt that leaves no room there is told in a warning and left out. `programs` are those of `compiled_for`, if
    any. Raises ValueError as `generate`.
    """
    ids, rows_by_tokens = _by_reach(description.config, tokenizer, sample)
    for row in set(range(len(ids))).difference(*rows_by_tokens.values()):
        logger.warning(
            "no sample of the prompt %.40r: its %d tokens leave no room in model.max_positions=%d",
            sample.prompts[row], len(ids[row]), description.config.max_positions,
        )  # fmt: skip
    new = {}
    for tokens, rows in rows_by_tokens.items():
        request, prompts = replace(sample, tokens=tokens), [ids[row] for row in rows]
        how = {"eos_id": tokenizer.eos_id, "dtype": dtype, "programs": programs}
        new |= dict(zip(rows, generate(description, params, prompts, request, **how), strict=True))
    asked = [(row, sample.prompts[row]) for row in sorted(new)]
    return [(prompt, after_prompt(tokenizer, prompt, ids[row], new[row])) for row, prompt in asked]


def trained_reach(config: ModelConfig, seq_len: int) -> int:
    """Tokens that rotary positions reach, of a model trained on sequences of `seq_len`: more where they were scaled."""
    scaling = config.rope_scaling
    return seq_len if scaling.kind == "none" else max(seq_len, int(scaling.factor * scaling.original_length))


def reach_of(config: ModelConfig, seq_len: int) -> int:
    """Tokens of the longest sequence that a model was made for, which was trained on sequences of `seq_len`."""
    return config.max_positions if config.positions == "learned" else trained_reach(config, seq_len)


def exact_matmuls(dtype) -> contextlib.AbstractContextManager:
    """An accelerator rounds float32 matmuls to fewer bits unless it is told that float32 means float32."""
    return jax.default_matmul_precision("float32") if dtype == jnp.float32 else contextlib.nullcontext()


def beyond_training(config: ModelConfig, seq_len: int, prompts: Sequence[Sequence[int]], tokens: int) -> str | None:
    """What to tell where rotary positions go beyond the sequences of `seq_len` tokens that a model was trained on."""
    reach, longest = trained_reach(config, seq_len), max(map(len, prompts), default=0)
    if config.positions != "rotary" or longest + tokens <= reach:
        return None
    return (
        f"{longest} prompt tokens + {tokens} new ones = {longest + tokens} go beyond the {reach} that the model was "
        f"trained on: expect worse text there"
    )


def room_behind(config: ModelConfig, prompt: Sequence[int]) -> int:
    """New tokens that learned positions leave room for behind a prompt; a very large number for other positions."""
    return config.max_positions - len(prompt) if config.positions == "learned" else sys.maxsize


def check(config: ModelConfig, prompts: Sequence[Sequence[int]], tokens: int) -> None:
    """Raises the ValueError of a request that the model cannot serve."""
    if not config.causal:
        raise ValueError("model.causal=false: an encoder does not generate text")
    if not all(prompts):
        raise ValueError("an empty prompt needs an end-of-document token to start from")
    if strange := [token for prompt in prompts for token in prompt if not 0 <= token < config.vocab_size]:
        raise ValueError(f"token {strange[0]} of a prompt is outside of the vocabulary, 0 to {config.vocab_size - 1}")
    longest = max(map(len, prompts), default=0)
    if config.positions == "learned" and longest + tokens > config.max_positions:
        raise ValueError(
            f"{longest} prompt tokens + {tokens} new ones = {longest + tokens} are more than the model's "
            f"{config.max_positions} learned positions; ask for {max(0, config.max_positions - longest)} at most"
        )


def _bucket(config: ModelConfig, length: int) -> int:
    """The padded length of prompts: a power of two that the mesh divides, within the learned positions."""
    size = max(SMALLEST_BUCKET, 1 << (length - 1).bit_length())
    size = -(-size // splits("residual")) * splits("residual")
    return min(size, config.max_positions) if config.positions == "learned" else size


def _row_seeds(prompts: list[list[int]], rows: int) -> np.ndarray:
    """uint32 (B, 2): what tells a row's random numbers from another's, its prompt and how often that came before."""
    seeds_B2, seen = np.zeros((rows, 2), np.uint32), Counter()
    for row, prompt in enumerate(prompts):
        digest = zlib.crc32(np.asarray(prompt, "<i4").tobytes())
        seeds_B2[row] = digest, seen[digest]
        seen[digest] += 1
    return seeds_B2


@partial(jax.jit, static_argnames=("tokens", "dtype", "temperature", "top_k", "top_p"))
def _generate(
    model: Transformer, prompts_BT, lengths_B, live_B, seeds_B2, seed, stops,
    *, tokens: int, dtype, temperature: float, top_k: int, top_p: float,
):  # fmt: skip
    """The whole loop, one program: new tokens (B, tokens) and how many of each row count."""
    B, T = prompts_BT.shape
    rows = jax.vmap(lambda pair: jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), pair[0]), pair[1]))
    keys_B = rows(seeds_B2)

    def choose(logits_BV, positions_B):
        keys = jax.vmap(jax.random.fold_in)(keys_B, positions_B)
        return draw(logits_BV, keys, temperature=temperature, top_k=top_k, top_p=top_p)

    def note(out_BT, counts_B, live_B, tokens_B, step):
        live_B = live_B & (tokens_B[:, None] != stops).all(1)
        return out_BT.at[:, step].set(tokens_B), counts_B + live_B, live_B

    def unfinished(carry):
        step, _, _, _, (_, _, live_B) = carry
        return (step < tokens) & live_B.any()

    def advance(carry):
        step, tokens_B, positions_B, cache, noted = carry
        logits_BV, cache = decode(model, tokens_B, positions_B, cache, dtype)
        tokens_B = choose(logits_BV, positions_B + 1)
        return step + 1, tokens_B, positions_B + 1, cache, note(*noted, tokens_B, step)

    cache = make_cache(model.config, B, T + tokens, dtype)
    cache = jax.tree.map(lambda x: shard(x, None, "batch", None, "kv_heads", "head_dim"), cache)
    logits_BV, cache = prefill(model, prompts_BT, lengths_B, cache, dtype)
    tokens_B = choose(logits_BV, lengths_B)
    noted = note(jnp.zeros((B, tokens), jnp.int32), jnp.zeros(B, jnp.int32), live_B, tokens_B, 0)
    *_, (out_BT, counts_B, _) = jax.lax.while_loop(unfinished, advance, (1, tokens_B, lengths_B, cache, noted))
    return shard(out_BT, None, None), shard(counts_B, None)  # whole, so that every process can read them
