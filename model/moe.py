"""Mixture of experts: a router that chooses experts for each token, the experts, and what a step must know of both."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from model.attention_rule import TokenInfo
from model.config import ModelConfig
from model.layers import FeedForward, activate
from model.projection import Projection, param
from model.specs import Specs
from parallel.experts import dispatch
from parallel.sharding import cast_and_gather, shard


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RouterSums:
    """Sums over tokens: batches add up exactly, however they were cut.

    The auxiliary losses are of the tokens that count in the loss. Everything else is of all tokens: every one takes a
    place with an expert, whether its own prediction is trained or not.
    """

    objective: jax.Array  # auxiliary losses times their coefficients, to be divided by what nll is divided by
    load_E: jax.Array  # int32: assignments to each expert, those dropped included
    dropped: jax.Array  # int32: assignments beyond an expert's capacity
    entropy: jax.Array  # of the scores, normalised, nats
    tokens: jax.Array  # int32

    @classmethod
    def zero(cls, layers: int, experts: int) -> "RouterSums":
        """The neutral element of +, for each layer."""
        real, whole = (jnp.zeros(layers, dtype) for dtype in (jnp.float32, jnp.int32))
        return cls(real, jnp.zeros((layers, experts), jnp.int32), whole, real, whole)


def best(values: jax.Array, count: int) -> jax.Array:
    """Indices of the `count` largest along the last dim, int32 (..., count); of equals, the first.

    The partitioner gathers all tokens for lax.top_k, but not for a maximum.
    """
    found = []
    for _ in range(count):
        found.append(jnp.argmax(values, axis=-1))
        values = jnp.where(found[-1][..., None] == jnp.arange(values.shape[-1]), -jnp.inf, values)
    return jnp.stack(found, axis=-1)


class Router(nnx.Module):
    """Scores every expert for a token, in float32, and chooses the best; of equals, the first."""

    def __init__(self, config: ModelConfig, specs: Specs):
        self.config, self.weight = config, param(specs["weight"])
        self.balance_bias = param(specs["balance_bias"]) if "balance_bias" in specs else None

    @jax.named_scope("router")
    def scores(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Logits and scores, float32 (B, T, E)."""
        weight = cast_and_gather(self.weight, jnp.float32)
        logits_BTE = jnp.einsum("BTD,DE->BTE", x_BTD.astype(jnp.float32), weight, precision="highest")
        logits_BTE = shard(logits_BTE, "batch", "residual", None)
        softmax = self.config.router_scores == "softmax"
        return logits_BTE, jax.nn.softmax(logits_BTE) if softmax else jax.nn.sigmoid(logits_BTE)

    @jax.named_scope("router")
    def choose(self, scores_BTE: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The experts of each token, int32 (B, T, J), best first, and their weights, float32.

        A balance bias, and groups of which only the best are open, decide who is chosen, not with what weight
        (DeepSeek-V3, arXiv 2412.19437, equations 13 to 16 and section 2.1.2).
        """
        c = self.config
        ranked_BTE = jax.lax.stop_gradient(scores_BTE)
        if self.balance_bias is not None:
            ranked_BTE = ranked_BTE + jax.lax.stop_gradient(cast_and_gather(self.balance_bias, jnp.float32))
        if c.router_groups > 1:
            grouped = ranked_BTE.reshape(*ranked_BTE.shape[:2], c.router_groups, -1)
            best_two = jnp.take_along_axis(grouped, best(grouped, min(2, grouped.shape[-1])), axis=-1).sum(-1)
            open_groups = best(best_two, c.router_groups_per_token)
            is_open = (open_groups[..., None] == jnp.arange(c.router_groups)).any(-2)
            ranked_BTE = jnp.where(is_open[..., None], grouped, -jnp.inf).reshape(ranked_BTE.shape)
        experts_BTJ = best(ranked_BTE, c.experts_per_token)
        weights_BTJ = jnp.take_along_axis(scores_BTE, experts_BTJ, axis=-1)
        if c.router_normalize and c.experts_per_token == 1:  # exactly: its gradient is then zero, and not noise
            weights_BTJ = jnp.ones_like(weights_BTJ)
        elif c.router_normalize:
            weights_BTJ = weights_BTJ / (weights_BTJ.sum(-1, keepdims=True) + 1e-20)
        return experts_BTJ, weights_BTJ * c.router_scale


def within_capacity(chosen_BTE: jax.Array, positions_BT: jax.Array, capacity: int) -> jax.Array:
    """Which assignments an expert takes: the first `capacity` of a sequence, by the tokens' positions.

    Bool (B, T, E). Computed on whole sequences, so that it does not depend on how tokens are stored or split.
    """
    order_BT = jnp.argsort(positions_BT, axis=1)[..., None]
    place_BT = jnp.argsort(order_BT, axis=1)  # the inverse permutation
    whole_BTE = shard(chosen_BTE.astype(jnp.int32), "batch", None, None)
    count_BTE = jnp.cumsum(jnp.take_along_axis(whole_BTE, order_BT, axis=1), axis=1)
    return chosen_BTE & (jnp.take_along_axis(count_BTE, place_BT, axis=1) <= capacity)


def capacity_of(config: ModelConfig, seq_len: int) -> int | None:
    """The most tokens of a sequence that an expert takes; None: all of them."""
    c = config
    return math.ceil(c.expert_capacity * seq_len * c.experts_per_token / c.experts) if c.expert_capacity else None


class MixtureOfExperts(nnx.Module):
    """Feed-forward experts, stacked, of which each token goes to a few; and shared ones, as one, for every token."""

    def __init__(self, config: ModelConfig, specs: Specs):
        c = self.config = config
        self.router = Router(c, specs["router"])
        self.gate = Projection(specs["gate"]) if "gate" in specs else None
        self.up, self.down = Projection(specs["up"]), Projection(specs["down"])
        self.shared = FeedForward(c, specs["shared"]) if "shared" in specs else None

    def __call__(self, x_BTD: jax.Array, info: TokenInfo) -> tuple[jax.Array, RouterSums]:
        """x_BTD, as it lies between blocks, to y_BTD, and the router's sums."""
        c, T = self.config, x_BTD.shape[1]
        logits_BTE, scores_BTE = self.router.scores(x_BTD)
        experts_BTJ, weights_BTJ = self.router.choose(scores_BTE)
        chosen_BTE = (experts_BTJ[..., None] == jnp.arange(c.experts)).any(-2)
        capacity = capacity_of(c, T)
        dropped = jnp.zeros((), jnp.int32)
        if capacity is not None and capacity < T:
            kept_BTE = within_capacity(chosen_BTE, info.positions_BT, capacity)
            dropped = (chosen_BTE & ~kept_BTE).sum(dtype=jnp.int32)
            kept_BTJ = jnp.take_along_axis(kept_BTE, experts_BTJ, axis=-1)
            experts_BTJ = jnp.where(kept_BTJ, experts_BTJ, c.experts)

        def expert(matmul, rows, up, down, gate=None):
            hidden = activate(c.activation, matmul(rows, up), None if gate is None else matmul(rows, gate))
            return matmul(hidden, down)

        stacks = [m for m in (self.up, self.down, self.gate) if m is not None]
        y_BTD = dispatch(
            x_BTD,
            shard(experts_BTJ, "batch", "tokens", None),
            shard(weights_BTJ, "batch", "tokens", None),
            [m.matrix(x_BTD.dtype) for m in stacks],
            [m.axes for m in stacks],
            expert,
            capacity=capacity,
        )
        if self.shared is not None:
            y_BTD = y_BTD + shard(self.shared(shard(x_BTD, "batch", "tokens", "width")), "batch", "residual", "width")
        return y_BTD, self._sums(logits_BTE, scores_BTE, chosen_BTE, dropped, info)

    @jax.named_scope("router")
    def _sums(self, logits_BTE, scores_BTE, chosen_BTE, dropped, info: TokenInfo) -> RouterSums:
        """The auxiliary losses are sums over sequences and tokens, so that they do not depend on how a batch is cut.

        Balance, for each sequence (arXiv 2412.19437, equations 17 to 20, with the experts really chosen): the share of
        assignments that each expert has times its mean score, summed, times E; 1 if all are even. Weighted by the
        sequence's tokens. Tokens that the loss leaves out are left out here too, as if they were not there. Router
        z-loss (arXiv 2202.08906, equation 5), for each token: the squared log-normaliser.
        """
        c = self.config
        B, T, E = scores_BTE.shape
        share_BTE = scores_BTE if c.router_scores == "softmax" else scores_BTE / scores_BTE.sum(-1, keepdims=True)
        load_BE = chosen_BTE.sum(1, dtype=jnp.int32)
        z_BT = jax.nn.logsumexp(logits_BTE, axis=-1) ** 2
        evenness = E / (c.experts_per_token * T)
        if info.mask_BT is None:
            balance = evenness * jnp.sum(load_BE * share_BTE.sum(1))
        else:
            z_BT = z_BT * info.mask_BT
            mask_BT1 = info.mask_BT[..., None]
            products_BE = (chosen_BTE * mask_BT1).sum(1) * (share_BTE * mask_BT1).sum(1)
            fewer_B = T / jnp.maximum(info.counted_B, 1)  # exactly 1 where all tokens count
            balance = evenness * jnp.sum(products_BE * fewer_B[:, None])
        z = jnp.sum(z_BT)
        share_BTE = jax.lax.stop_gradient(share_BTE)
        entropy = -jnp.sum(share_BTE * jnp.log(jnp.maximum(share_BTE, 1e-30)))
        objective = c.balance_loss * balance + c.router_z_loss * z
        return RouterSums(objective, load_BE.sum(0), dropped, entropy, jnp.full((), B * T, jnp.int32))
