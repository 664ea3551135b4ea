"""The parts of a block: norms, attention with its projections, the feed-forward half, dropout."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from model import parametrization
from model.attention import attention
from model.attention_rule import TokenInfo
from model.config import ModelConfig
from model.kv_cache import Cache
from model.normalise import normalise
from model.platforms import choices
from model.projection import Projection, param
from model.rotary import angles_of_layer, rotate
from model.specs import Specs
from parallel.sharding import cast_and_gather, shard


class Norm(nnx.Module):
    """RMS or layer norm over the dims of its scale, computed in float32; `kind` is the config's if it is not said."""

    def __init__(self, config: ModelConfig, specs: Specs, kind: str | None = None):
        self.kind, self.eps, self.plus_one = kind or config.norm, config.norm_eps, config.norm_plus_one
        self.scale = param(specs["scale"])
        self.bias = param(specs["bias"]) if "bias" in specs else None

    @jax.named_scope("norm")
    def __call__(self, x: jax.Array) -> jax.Array:
        """Any (..., *dims of the scale) to the same shape and dtype."""
        scale, bias = (
            cast_and_gather(self.scale, jnp.float32),
            None if self.bias is None else cast_and_gather(self.bias, jnp.float32),
        )
        scale = 1 + scale if self.plus_one else scale
        vectors = x.reshape(*x.shape[: x.ndim - scale.ndim], -1)  # of heads normalised together one vector
        return normalise(vectors, scale.reshape(-1), bias, self.kind, self.eps).reshape(x.shape)


def times(x: jax.Array, multiplier: float) -> jax.Array:
    """x times a constant, in x's dtype."""
    return x if multiplier == 1 else x * jnp.asarray(multiplier, x.dtype)


NONLINEARITIES = {
    "swiglu": jax.nn.silu,
    "geglu": jax.nn.gelu,
    "geglu_exact": partial(jax.nn.gelu, approximate=False),
    "reglu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "gelu_exact": partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "silu": jax.nn.silu,
}


def activate(kind: str, up: jax.Array, gate: jax.Array | None) -> jax.Array:
    """A feed-forward block's hidden vector, in the shape and dtype of `up`; `gate` is None where the kind has none.

    It is computed in float32, and again for gradients rather than kept.
    """
    return jax.checkpoint(partial(_activate, kind), prevent_cse=choices().recompute_apart)(up, gate)


def _activate(kind: str, up: jax.Array, gate: jax.Array | None) -> jax.Array:
    x = up.astype(jnp.float32)
    if gate is not None:
        gate = gate.astype(jnp.float32)
        y = x * NONLINEARITIES[kind](gate)
    else:
        y = NONLINEARITIES[kind](x)
    return y.astype(up.dtype)


class Attention(nnx.Module):
    """Multi-head, grouped-query or multi-query attention over x_BTD."""

    def __init__(self, config: ModelConfig, specs: Specs):
        c = self.config = config
        # without anything after it, a key bias adds the same to all scores of a query, which softmax does not see: its
        # gradient is rounding noise, which an optimizer that normalises would follow, differently on every mesh
        idle_bias = c.positions != "rotary" and not c.qk_norm and not c.attention_softcap
        self.query = Projection(specs["query"], c.matmul_dtype)
        self.key = Projection(specs["key"], c.matmul_dtype, frozen_bias=idle_bias)
        self.value = Projection(specs["value"], c.matmul_dtype)
        self.out = Projection(specs["out"], c.matmul_dtype)
        self.query_norm = Norm(c, specs["query_norm"], "rms") if c.qk_norm else None
        self.key_norm = Norm(c, specs["key_norm"], "rms") if c.qk_norm else None

    def __call__(
        self, x_BTD: jax.Array, info: TokenInfo, window: jax.Array | None, cache: Cache | None = None
    ) -> tuple[jax.Array, Cache | None]:
        """y_BTD, and the cache with this call's keys and values written at their positions."""
        c = self.config
        q_BTNH = shard(self.query(x_BTD), "batch", "tokens", "heads", "head_dim")
        k_BSKH = shard(self.key(x_BTD), "batch", "tokens", "kv_heads", "head_dim")
        v_BSKH = shard(self.value(x_BTD), "batch", "tokens", "kv_heads", "head_dim")
        if c.qk_norm:
            q_BTNH, k_BSKH = self.query_norm(q_BTNH), self.key_norm(k_BSKH)
        if info.angles is not None:
            angles = angles_of_layer(info, window)
            q_BTNH, k_BSKH = rotate(q_BTNH, angles), rotate(k_BSKH, angles)
        how = {"causal": c.causal, "window": window, "scale": parametrization.attention_scale(c)}
        how |= {"softcap": c.attention_softcap, "windows": c.windows()}
        if cache is None:
            out_BTNH = attention(q_BTNH, k_BSKH, v_BSKH, info, info, kernel=c.attention_kernel, **how)
        else:
            cache = cache.write(info.positions_BT, k_BSKH, v_BSKH)
            out_BTNH = cache.attend(q_BTNH, info, **how)
        return self.join(out_BTNH, q_BTNH), cache

    def join(self, out_BTNH: jax.Array, q_BTNH: jax.Array) -> jax.Array:
        """y_BTD of what the heads have gathered for their queries."""
        return self.out(shard(out_BTNH, "batch", "tokens", "heads", "head_dim"))


class FeedForward(nnx.Module):
    """An activation between two matrices, or between three where it is gated."""

    def __init__(self, config: ModelConfig, specs: Specs):
        self.activation, dtype = config.activation, config.matmul_dtype
        self.gate = Projection(specs["gate"], dtype) if "gate" in specs else None
        self.up, self.down = Projection(specs["up"], dtype), Projection(specs["down"], dtype)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """x_BTD to y_BTD."""
        gate_BTF = None if self.gate is None else shard(self.gate(x_BTD), "batch", "tokens", "ffn")
        up_BTF = shard(self.up(x_BTD), "batch", "tokens", "ffn")
        return self.down(activate(self.activation, up_BTF, gate_BTF))


# ----------------------------------------------------------------------------------------------------------- dropout


@jax.named_scope("dropout")
def dropout(
    x_BTD: jax.Array, rate: float, keys_B: jax.Array | None, site: int | jax.Array, positions_BT: jax.Array
) -> jax.Array:
    """Zeroes a share `rate` of the entries and scales up the rest; the identity without keys.

    There is one key a sequence, so that a token's mask depends on the sequence, its position in it, the step and the
    site alone: not on the mesh, nor on the order of the tokens, nor on how the batch was cut into microbatches.
    """
    if keys_B is None or rate == 0:
        return x_BTD

    def keep(key, position):
        return jax.random.bernoulli(jax.random.fold_in(key, position), 1 - rate, x_BTD.shape[2:])

    keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, site)
    positions_BT = jnp.broadcast_to(positions_BT, x_BTD.shape[:2])
    mask_BTD = jax.vmap(jax.vmap(keep, (None, 0)))(keys_B, positions_BT)
    mask_BTD = shard(mask_BTD, "batch", "residual", "width")
    return jnp.where(mask_BTD, x_BTD / (1 - rate), 0).astype(x_BTD.dtype)
