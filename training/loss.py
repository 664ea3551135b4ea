"""Cross-entropy in chunks of the vocabulary, so that the float32 logits of all tokens never exist at once."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp

from model.heads import VocabularyRows, vocabulary_parts
from model.moe import RouterSums
from parallel.manual import alike
from parallel.sharding import max_over_stages, splits, sum_over_stages


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LossSums:
    """Sums over tokens that count, so that microbatches and hosts add up exactly."""

    nll: jax.Array  # negative log likelihood, nats
    z: jax.Array  # squared log-normaliser, before its coefficient
    correct: jax.Array  # tokens whose most likely prediction is right
    router: RouterSums | None = None  # by layer, of a model with experts

    def __add__(self, other: "LossSums") -> "LossSums":
        return jax.tree.map(jnp.add, self, other)

    @classmethod
    def zero(cls, router: RouterSums | None = None) -> "LossSums":
        """The neutral element of +."""
        return cls(*(jnp.zeros((), jnp.float32) for _ in range(3)), router)

    def objective(self, z_loss: float) -> jax.Array:
        """What is minimised, summed over tokens: nll + z_loss z + the routers' auxiliary losses, a float32 scalar."""
        auxiliary = 0.0 if self.router is None else self.router.objective.sum()
        return self.nll + z_loss * self.z + auxiliary


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenLosses:
    """The losses of each token: what evaluation, tasks and preference ask for. Training asks for their sums."""

    nll_BT: jax.Array  # negative log likelihood of the target, nats, float32
    z_BT: jax.Array  # squared log-normaliser
    correct_BT: jax.Array  # bool: the target is the most likely prediction

    def sums(self, mask_BT: jax.Array) -> LossSums:
        """Summed over the tokens that count."""
        return LossSums(*(jnp.sum(x * mask_BT) for x in (self.nll_BT, self.z_BT, self.correct_BT)))


class Head(Protocol):
    """What the loss needs of a model."""

    def vocabulary(self, parts: int, dtype) -> VocabularyRows:
        """The rows of the output table in at least so many parts, with a first dim for the parts."""

    def logits(self, x_BTD: jax.Array, rows: VocabularyRows) -> jax.Array:
        """Float32 logits_BTV of these rows."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PartialSoftmax:
    """What some rows of the vocabulary say of each token."""

    top_BT: jax.Array  # the largest logit; without a gradient
    total_BT: jax.Array  # sum of exp(logit - top)
    target_BT: jax.Array  # the target's logit, 0 if it is none of them

    @classmethod
    def of(cls, logits_BTV: jax.Array, token_V: jax.Array, targets_BT: jax.Array) -> "PartialSoftmax":
        """What float32 logits say; `token_V`: the tokens they are for."""
        top_BT = jax.lax.stop_gradient(logits_BTV.max(-1))
        total_BT = jnp.exp(logits_BTV - top_BT[..., None]).sum(-1)
        return cls(top_BT, total_BT, _at_targets(*alike(logits_BTV, token_V, targets_BT)))

    def __add__(self, other: "PartialSoftmax") -> "PartialSoftmax":
        top_BT = jnp.maximum(self.top_BT, other.top_BT)
        total = lambda known: known.total_BT * jnp.exp(known.top_BT - top_BT)
        return PartialSoftmax(top_BT, total(self) + total(other), self.target_BT + other.target_BT)

    @classmethod
    def none(cls, zero_BT: jax.Array) -> "PartialSoftmax":
        """The neutral element of +, as zero rows would give it; zero_BT: float32 zeros, typed as the others are."""
        return cls(zero_BT - jnp.inf, zero_BT, zero_BT)

    def losses(self) -> "TokenLosses":
        """The losses, once all rows but those of other stages have been added."""
        top_BT = max_over_stages(self.top_BT)
        log_z_BT = jnp.log(sum_over_stages(self.total_BT * jnp.exp(self.top_BT - top_BT))) + top_BT
        target_BT = sum_over_stages(self.target_BT)
        return TokenLosses(log_z_BT - target_BT, log_z_BT**2, target_BT >= top_BT)


@jax.custom_vjp
def _at_targets(logits_BTV: jax.Array, token_V: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """The target's logit, 0 if it is none of `token_V`, which are evenly spaced (`Embedding.cut`)."""
    if splits("vocab") > 1:  # then a gather would not stay local
        return jnp.where(token_V == targets_BT[..., None], logits_BTV, 0).sum(-1)
    V = len(token_V)
    spacing = token_V[1] - token_V[0] if V > 1 else 1
    column_BT = jnp.clip((targets_BT - token_V[0]) // spacing, 0, V - 1)
    logits_BT = jnp.take_along_axis(logits_BTV, column_BT[..., None], axis=-1, mode="promise_in_bounds")[..., 0]
    return jnp.where(token_V[column_BT] == targets_BT, logits_BT, 0)


def _at_targets_forward(logits_BTV, token_V, targets_BT):
    return _at_targets(logits_BTV, token_V, targets_BT), (token_V, targets_BT)


def _at_targets_backward(residuals, dlogits_BT):
    token_V, targets_BT = residuals  # no scatter: a comparison is part of the pass that the softmax's gradient takes
    return jnp.where(token_V == targets_BT[..., None], dlogits_BT[..., None], 0), None, None


_at_targets.defvjp(_at_targets_forward, _at_targets_backward)


def chunked_losses(head: Head, x_BTD: jax.Array, targets_BT: jax.Array, mask_BT: jax.Array, chunk: int) -> LossSums:
    """Sums over all tokens of a batch; see `token_losses`."""
    return token_losses(head, x_BTD, targets_BT, chunk).sums(mask_BT)


def token_losses(head: Head, x_BTD: jax.Array, targets_BT: jax.Array, chunk: int) -> TokenLosses:
    """The losses of all tokens of a batch, from final hidden vectors; see `vocabulary_parts` for `chunk`."""
    of = lambda logits_BTV, token_V: PartialSoftmax.of(logits_BTV, token_V, targets_BT)
    return over_vocabulary(head, x_BTD, chunk, of, PartialSoftmax.none).losses()


@jax.named_scope("loss")
def over_vocabulary(head: Head, x_BTD: jax.Array, chunk: int, of: Callable, none: Callable):
    """The sum of what `of` says of the logits of parts of the vocabulary (logits_BTV, token_V), a pytree with +.

    `none` makes of zero_BT what is said of no rows. The logits of several parts are computed again in the backward
    pass. Parts of the vocabulary and not of the tokens are taken: then the gradient of a part of the table is whole at
    once, and summed over devices once, where that of tokens would be summed for every part. The gradient of x is summed
    over `tensor` for every part instead.
    """
    n = vocabulary_parts(chunk, x_BTD.shape[1])
    rows = head.vocabulary(n, x_BTD.dtype)
    if n == 1:
        rows = jax.tree.map(lambda x: x[0], rows)
        return of(head.logits(x_BTD, rows), rows.token_V)

    @jax.checkpoint
    def add_part(known, rows: VocabularyRows):
        logits_BTV = head.logits(x32_BTD.astype(x_BTD.dtype), rows)  # the gradients of x are added up in float32
        return known + of(logits_BTV, rows.token_V), None

    zero_BT = jnp.zeros(x_BTD.shape[:2], jnp.float32)
    # before the cast: what stages find is summed over parts in float32, over stages in the dtype of x, half the bytes
    x_BTD, zero_BT, _ = alike(x_BTD, zero_BT, rows.table_VD)
    x32_BTD = x_BTD.astype(jnp.float32)
    known, _ = jax.lax.scan(add_part, none(zero_BT), rows)
    return known
