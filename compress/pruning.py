"""Weights that become zero: which ones, by their size alone or by what they are multiplied with.

Everything here is about one matrix w_nm, whose n inputs are multiplied with a token's vector and whose m outputs come
out. A pattern says among which weights is compared; nothing is stored but the matrix with its zeros.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from model.specs import ParameterSpec, Specs

CUT, KEPT_OF_CUT = 4, 2  # of neighbouring inputs that sparse tensor cores read as one: so many, of which half stay


@dataclass(frozen=True)
class Sparse:
    """A matrix of which some weights are zero: a `share` of them, or two of each four neighbouring inputs."""

    share: float = 0.5
    two_of_four: bool = False

    def specs(self, specs: Specs) -> Specs:
        """The same: zeros are stored. Raises ValueError for inputs that cannot be cut into fours."""
        weight = specs["weight"]
        length = weight.shape[weight.contracted[-1]]
        if self.two_of_four and length % CUT:
            raise ValueError(f"a dim of {length} inputs has no groups of {CUT}: use a share of zeros instead")
        return specs

    def module(self, part: nnx.Module, specs: Specs) -> nnx.Module:
        """The part itself."""
        return part

    def kept(self, weight: ParameterSpec, w_nm: jax.Array, gram_nn: jax.Array | None) -> dict:
        """What is stored of one matrix, in the shape of one layer."""
        mask_nm = self.mask(w_nm, gram_nn)
        return {"weight": jnp.where(mask_nm, w_nm, 0).reshape(weight.shape)}

    def mask(self, w_nm: jax.Array, gram_nn: jax.Array | None) -> jax.Array:
        """Which weights stay, bool (n, m).

        With a gram (the sum over tokens of x^T x) the size of a weight is multiplied with that of its input, and
        weights of one output are compared (Wanda, arXiv 2306.11695, equation 1); without, those of the whole matrix.
        """
        score_nm = jnp.abs(w_nm)
        if gram_nn is not None:
            score_nm = score_nm * jnp.sqrt(jnp.maximum(jnp.diagonal(gram_nn), 0))[:, None]
        if self.two_of_four:
            return best_of_each_cut(score_nm)
        stay = lambda count: count - int(self.share * count)
        if gram_nn is not None:
            return jax.vmap(lambda score_n: largest(score_n, stay(len(score_n))), 1, 1)(score_nm)
        return largest(score_nm.reshape(-1), stay(score_nm.size)).reshape(score_nm.shape)


def largest(score_n: jax.Array, count: int) -> jax.Array:
    """Which entries are the `count` largest, of equal ones the first: bool."""
    order_n = jnp.argsort(-score_n, stable=True)
    return jnp.zeros(score_n.shape, bool).at[order_n[:count]].set(True)


def best_of_each_cut(score_nm: jax.Array) -> jax.Array:
    """Which entries are the best two of their cut of four neighbours, of equal ones the first: bool."""
    score_gcm = score_nm.reshape(-1, CUT, score_nm.shape[1])
    ours, theirs, place = score_gcm[:, :, None], score_gcm[:, None], jnp.arange(CUT)
    is_first = (place[None] < place[:, None])[None, :, :, None]
    better_gcm = ((theirs > ours) | ((theirs == ours) & is_first)).sum(2)  # how many of the cut are
    return (better_gcm < KEPT_OF_CUT).reshape(score_nm.shape)
