"""Adapters beside whole parts of a block: a small net after each half of it, and a prefix for attention."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from flax import nnx

from compress.forms import QuantisedProjection
from finetune.adapters.matrices import ADAPTER, Thin, is_coded
from model.attention_rule import TokenInfo
from model.forms import Form
from model.layers import Attention, activate
from model.moe import MixtureOfExperts, RouterSums
from model.projection import Projection, param
from model.specs import ParameterSpec, Specs
from parallel.sharding import cast_and_gather, shard

# ---------------------------------------------------------------------------------------------------------- bottleneck


@dataclass(frozen=True)
class Bottleneck:
    """A part with x + up(activation(down(x))) of its output x: the last matrix of a half, or all its experts.

    As in Houlsby et al. (arXiv 1902.00751), figure 2: up begins as zero, so that nothing is changed.
    """

    size: int
    activation: str
    base: Form | None = None

    def specs(self, specs: Specs) -> Specs:
        """The part's parameters, and the branch `adapter`."""
        like = specs["weight"] if "weight" in specs else specs["down"]["weight"]
        stacked = like.axes[0] == "layers"
        layers = (like.shape[0], "layers") if stacked else None
        own = self.base.specs(specs) if self.base else specs
        width = like.shape[-1]
        _, into, out = like.key.split(3)
        down = ParameterSpec((width, self.size), ("width", "rank"), into, std=width**-0.5, contracted=(0,))
        up = ParameterSpec((self.size, width), ("rank", "width"), out, contracted=(0,))
        place = lambda spec: spec.stacked(layers[0]) if layers else spec
        bias = lambda spec, size: place(replace(spec, shape=(size,), axes=("norm",), std=0.0, contracted=()))
        adapter = {
            "down": {"weight": place(down), "bias": bias(down, self.size)},
            "up": {"weight": place(up), "bias": bias(up, width)},
        }
        return {**own, ADAPTER: adapter}

    def module(self, part: nnx.Module, specs: Specs) -> nnx.Module:
        """The part with the net behind it."""
        if isinstance(part, MixtureOfExperts):
            return ExpertsWithNet(part, specs, self)
        return (QuantisedWithNet if is_coded(self.base) else ProjectionWithNet)(part, specs, self)


class Net(nnx.Module):
    """Two matrices and what stands between them."""

    def __init__(self, specs: Specs, activation: str):
        self.down, self.up, self.activation = Thin(specs["down"]), Thin(specs["up"]), activation

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """What is added to x_BTD, of the tokens that this device holds between blocks."""
        x_BTD = shard(x_BTD, "batch", "residual", "width")
        h_BTR = shard(self.down(x_BTD), "batch", "residual", "rank")
        return x_BTD + self.up(activate(self.activation, h_BTR, None))


class ProjectionWithNet(Projection):
    """The last matrix of a half of a block, with a net behind it."""

    def __init__(self, part: Projection, specs: Specs, form: Bottleneck):
        super().__init__(specs, part.matmul_dtype, frozen_bias=part.frozen_bias)
        self.adapter = Net(specs[ADAPTER], form.activation)

    def __call__(self, x: jax.Array) -> jax.Array:
        """y_BTD."""
        return self.adapter(super().__call__(x))


class QuantisedWithNet(QuantisedProjection):
    """The same of a quantised matrix."""

    def __init__(self, part: Projection, specs: Specs, form: Bottleneck):
        super().__init__(part, specs)
        self.adapter = Net(specs[ADAPTER], form.activation)

    def __call__(self, x: jax.Array) -> jax.Array:
        """y_BTD."""
        return self.adapter(super().__call__(x))


class ExpertsWithNet(MixtureOfExperts):
    """Experts with one net behind all of them."""

    def __init__(self, part: MixtureOfExperts, specs: Specs, form: Bottleneck):
        super().__init__(part.config, specs)
        self.adapter = Net(specs[ADAPTER], form.activation)

    def __call__(self, x_BTD: jax.Array, info: TokenInfo) -> tuple[jax.Array, RouterSums]:
        """As those of the model."""
        y_BTD, sums = super().__call__(x_BTD, info)
        return self.adapter(y_BTD), sums


# -------------------------------------------------------------------------------------------------------------- prefix


@dataclass(frozen=True)
class Prefix:
    """Attention that also sees keys and values which are parameters, in a softmax of their own.

    What they give is multiplied by tanh of a gate for each head, which begins as zero (LLaMA-Adapter, arXiv 2303.16199,
    equations 6 to 9, with keys and values themselves in place of prompts that are projected). As they stand apart from
    the tokens' softmax, no cache holds them, and however attention crosses a mesh, they are added behind it.
    """

    length: int

    def specs(self, specs: Specs) -> Specs:
        """Attention's parameters, and the branch `adapter`."""
        query, key = specs["query"]["weight"], specs["key"]["weight"]
        rows, heads, (kv_heads, size) = key.shape[0], query.shape[-2], key.shape[-2:]
        stacked = key.axes[0] == "layers"
        place = lambda spec: spec.stacked(rows) if stacked else spec
        _, of_keys, of_values = key.key.split(3)
        shape, axes = (self.length, kv_heads, size), ("rank", "kv_heads", "head_dim")
        drawn = lambda random: place(ParameterSpec(shape, axes, random, std=size**-0.5))
        gate = place(ParameterSpec((heads,), ("heads",), of_keys))
        return {**specs, ADAPTER: {"keys": drawn(of_keys), "values": drawn(of_values), "gate": gate}}

    def module(self, part: Attention, specs: Specs) -> nnx.Module:
        """Attention with the prefix."""
        return PrefixedAttention(part, specs)


class PrefixTokens(nnx.Module):
    """The keys, values and gates of a Prefix."""

    def __init__(self, specs: Specs):
        self.keys, self.values, self.gate = (param(specs[name]) for name in ("keys", "values", "gate"))

    def __call__(self, q_BTNH: jax.Array) -> jax.Array:
        """What is added to what each head has gathered, out_BTNH."""
        N, dtype = q_BTNH.shape[2], q_BTNH.dtype
        # a copy for each query head: there are few, and so no mesh asks for more
        every = lambda p: jnp.repeat(cast_and_gather(p, dtype), N // p.shape[-2], axis=1)
        k_PNH, v_PNH = (shard(every(p), None, "heads", "head_dim") for p in (self.keys, self.values))
        scores = jnp.einsum("BTNH,PNH->BTNP", q_BTNH, k_PNH, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores * q_BTNH.shape[-1] ** -0.5, axis=-1).astype(dtype)
        gate_N = jnp.tanh(cast_and_gather(self.gate, jnp.float32)).astype(dtype)
        out_BTNH = jnp.einsum("BTNP,PNH->BTNH", weights, v_PNH) * gate_N[:, None]
        return shard(out_BTNH, "batch", "tokens", "heads", "head_dim")


class PrefixedAttention(Attention):
    """Attention with a prefix."""

    def __init__(self, part: Attention, specs: Specs):
        super().__init__(part.config, specs)
        self.adapter = PrefixTokens(specs[ADAPTER])

    def join(self, out_BTNH: jax.Array, q_BTNH: jax.Array) -> jax.Array:
        """As that of Attention, of what the heads have gathered from the prefix, too."""
        return super().join(out_BTNH + self.adapter(q_BTNH), q_BTNH)
