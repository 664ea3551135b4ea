"""Unrolled layers whose gradients are computed layer by layer.

Nothing in a program says when the gradient of a weight has to be there, before the optimizer takes it. XLA (jaxlib
0.10, on all platforms) leaves those of unrolled layers for the end, and until then keeps what remat has computed again
of every layer: 8.1 GB for eight layers of llama_1b with remat=full on eight H200s, where layer by layer it is 3.5.
Without remat that costs nothing more, and a scan over layers leaves the compiler no such choice.
"""

from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.lax import optimization_barrier


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Trained:
    """Which of a layer's parameters have a gradient, in the order of their leaves."""

    leaves: tuple[bool, ...] = field(metadata={"static": True})


def first_turn() -> jax.Array:
    """The turn of the first layer: a zero, as all are."""
    return jnp.zeros((), jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def take_turn(dtypes: tuple, parameters, x: jax.Array, turn: jax.Array):
    """A layer's `parameters` and its input x, as they are, and the turn of the layer after it.

    In the backward pass the gradient of x goes on to the layer before once the parameters of the layer after this one
    have theirs: those are summed over devices while this layer computes. Parameters that are not trained stay without.
    `dtypes` are those in which the parameters' leaves are multiplied, and their gradients found: in these they wait.
    """
    return parameters, x, turn


def _forward(dtypes, parameters, x, turn):
    leaves, structure = jax.tree.flatten(parameters)
    trained = _Trained(tuple(leaf.perturbed for leaf in leaves))
    return (structure.unflatten([leaf.value for leaf in leaves]), x.value, turn.value), trained


def _backward(dtypes, trained, grads):
    parameters, x, turn = grads
    leaves, structure = jax.tree.flatten(parameters, is_leaf=lambda grad: isinstance(grad, SymbolicZero))
    if not isinstance(turn, SymbolicZero):
        x = x + turn.astype(x.dtype)  # what has to wait; another barrier would go, since nothing needs its turn
    mine = [i for i, on in enumerate(trained.leaves) if on and not isinstance(leaves[i], SymbolicZero)]
    done, turn = optimization_barrier(([leaves[i].astype(dtypes[i]) for i in mine], first_turn()))
    grads = [None] * len(leaves)
    for i, grad in zip(mine, done, strict=True):
        grads[i] = grad.astype(leaves[i].dtype)
    return structure.unflatten(grads), x, turn


take_turn.defvjp(_forward, _backward, symbolic_zeros=True)
