"""What an engine has memory for: how many tokens its cache holds where nobody said it, and whether its sizes fit."""

import math
from collections.abc import Mapping
from functools import partial

import jax

from inference.encoder import SHORTEST
from inference.engine_options import EngineOptions
from inference.opening import Opened
from model.block_cache import make_pool
from parallel.sharding import splits
from runtime.memory import free_bytes

MOST_TOKENS = 65536  # unless one sequence is longer
SHARE = 0.5  # of the memory that is free once the weights are there; programs need the rest


def bytes_a_token(opened: Opened, cache_dtype: str) -> float:
    """Of the keys and values of all layers, on each device; `cache_dtype` as in EngineOptions."""
    config = opened.config.model
    with jax.set_mesh(opened.mesh):
        pool = jax.eval_shape(partial(make_pool, config, 1, cache_dtype or opened.dtype))
        parts = splits("kv_heads")
    return 2 * config.layers * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pool)) / parts


def room_for(reach: int, token: float, free: float) -> int:
    """Tokens, for four sequences of `reach` or the most that there is memory for; `token` and `free` in bytes.

    Raises ValueError where not even one such sequence has room.
    """
    wanted = min(4 * reach, max(MOST_TOKENS, reach))
    fit = math.floor(SHARE * free / token) if math.isfinite(free) else wanted
    if fit < reach:
        raise ValueError(
            f"a cache for one sequence takes {reach} tokens x {token / 2**10:.1f} KiB = {reach * token / 2**30:.2f} "
            f"GiB, and half of the free memory is {SHARE * free / 2**30:.2f} GiB: set max_length={max(2, fit)} or less,"
            " or say cache_tokens, if you know that it fits"
        )
    return min(wanted, fit)


def cache_tokens(reach: int, models: list[Opened], cache_dtype: str) -> int:
    """For these models, whose caches have the same blocks, with the memory that is free now. Raises ValueError."""
    return room_for(reach, sum(bytes_a_token(model, cache_dtype) for model in models), free_bytes())


def check_room(
    options: EngineOptions, cache_tokens: int, models: list[Opened], others: Mapping[str, tuple[int, float]]
) -> None:
    """Raises ValueError for a size that alone takes more than the memory that is free.

    models: the served one, then a smaller one that proposes, if there is one. What they hold already is not free. What
    is counted here is the least: programs take more. others: further sizes, by option: how many, and bytes of each.
    """
    config = models[0].config.model
    activation = models[0].dtype.itemsize * config.width / models[0].mesh.size  # of a token, split as far as can be
    # option -> how many, and bytes of each on a device
    sizes = {"max_running": (options.max_running, SHORTEST * activation)}
    if config.generates:
        seen = 4 * sum(model.config.model.vocab_size for model in models)  # counts of the tokens in a text
        sizes["max_running"] = options.max_running, float(seen)
        sizes["chunk"] = options.chunk, activation
        sizes["cache_tokens"] = cache_tokens, sum(bytes_a_token(model, options.cache_dtype) for model in models)
    free = free_bytes()
    for name, (number, each) in {**sizes, **others}.items():
        if number * each > free:
            told = f"takes {number * each / 2**30:.3g} GiB at least, and {free / 2**30:.3g} GiB are free"
            raise ValueError(f"{name}={number} {told}: set it to {math.floor(free / each)} or less")
