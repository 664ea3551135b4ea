"""Small models for the tests of this folder: built once a config, with weights that hide nothing."""

from dataclasses import dataclass
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.config import ModelConfig
from model.transformer import Description, describe

SIZES = {"layers": 2, "width": 16, "heads": 4, "kv_heads": 2, "head_dim": 8, "ffn": 24, "vocab_size": 40}


@dataclass(frozen=True)
class Model:
    """A description with parameters; biases and norm scales are not at their 0 and 1, where mistakes would not show."""

    description: Description
    params: dict

    def logits(self, params: dict, tokens_BT: jax.Array, **options) -> jax.Array:
        """Float32 logits_BTV without padding."""
        model = self.description.bind(params)
        x_BTD, *_ = model(tokens_BT, **options)
        return model.logits(x_BTD)[..., : self.description.config.vocab_size]


def _draw(path, leaf) -> np.ndarray:
    noise = np.random.default_rng(list(jax.tree_util.keystr(path).encode())).standard_normal(leaf.shape, np.float32)
    name = path[-1].key
    if name in ("scale", "bias", "balance_bias"):
        return 0.2 * noise + np.float32(name == "scale")
    return noise * np.float32(0.5 if path[0].key in ("tokens", "head", "positions") else 0.3)


@cache
def _build(config: ModelConfig) -> Model:
    description = describe(config)
    return Model(description, jax.tree_util.tree_map_with_path(_draw, description.shapes))


@pytest.fixture(scope="session")
def build():
    """build(**fields): the Model of a small ModelConfig with these fields."""
    return lambda **fields: _build(ModelConfig(**SIZES | fields))


@pytest.fixture(autouse=True, scope="module")
def _fast_compile():
    """Tiny programs run once: compiling them is most of the time, and three times faster with less optimisation."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def tokens_BT() -> jax.Array:
    """Two sequences of 12 tokens, no token twice in a sequence."""
    permutations = [np.random.default_rng(seed).permutation(SIZES["vocab_size"])[:12] for seed in (1, 2)]
    return jnp.asarray(np.stack(permutations), jnp.int32)
