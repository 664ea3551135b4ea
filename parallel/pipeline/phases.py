"""A function cut into forward, input-gradient and weight-gradient phases, so that a pipeline can run them at different
times: what `jax.vjp` does at once, a zero-bubble schedule does in three steps, and nothing is computed twice.

The function and its gradients are traced into one jaxpr, whose equations are then dealt out: those that the output
needs are the forward phase, those that the input gradient needs beyond them the backward phase, and the rest the weight
phase. An equation that yields both gradients, such as a loop, belongs to the backward phase as a whole; so do the
gradients of vectors.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.extend.core import Literal, Var

from parallel.manual import vary

# calls whose inside is dealt out too, and the parameter that holds it
CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "checkpoint": "jaxpr",
    "remat2": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}


def _bind(eqn, values: list) -> list:
    if eqn.primitive.name == "pvary":  # of a value that was kept between phases, which has the type already
        return [vary(values[0], eqn.params["axes"])]
    with eqn.ctx.manager:
        out = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return out if eqn.primitive.multiple_results else [out]


def _run(eqns: Iterable, env: dict) -> dict:
    """Evaluates equations; `env` maps variables to values and grows."""
    for eqn in eqns:
        values = [a.val if isinstance(a, Literal) else env[a] for a in eqn.invars]
        env.update(zip(eqn.outvars, _bind(eqn, values), strict=True))
    return env


def _opened(jaxpr, consts, arguments: list) -> list:
    """Evaluates a jaxpr with its inner calls, and theirs, spelled out in place."""
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *arguments), strict=True))
    read = lambda a: a.val if isinstance(a, Literal) else env[a]
    for eqn in jaxpr.eqns:
        values, name = [read(a) for a in eqn.invars], CALLS.get(eqn.primitive.name)
        if name is None:
            out = _bind(eqn, values)
        else:
            inner = eqn.params[name]
            out = _opened(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), values)
        env.update(zip(eqn.outvars, out, strict=True))
    return [read(a) for a in jaxpr.outvars]


def _needed(eqns: Iterable, wanted: Iterable, known: set) -> list:
    """The equations, in order, that compute `wanted` from `known`."""
    missing, chosen = {v for v in wanted if isinstance(v, Var)} - known, []
    for eqn in reversed(list(eqns)):
        if missing.intersection(eqn.outvars):
            chosen.append(eqn)
            missing |= {a for a in eqn.invars if isinstance(a, Var)} - known
    return chosen[::-1]


def _reads(eqns: Iterable, outputs: Iterable) -> set:
    return {a for eqn in eqns for a in eqn.invars if isinstance(a, Var)} | {v for v in outputs if isinstance(v, Var)}


def _apart(chosen: Iterable, start: Var, eqns: Iterable) -> list:
    """Those of the chosen equations that do not depend on the variable `start`."""
    reached = {start}
    for eqn in eqns:
        if reached.intersection(a for a in eqn.invars if isinstance(a, Var)):
            reached.update(eqn.outvars)
    return [eqn for eqn in chosen if not reached.intersection(eqn.outvars)]


def _dealt(eqns: list, dx_vars: list, dp_vars: list, done: set, dy_var: Var) -> tuple[list, list]:
    """The equations of the backward and of the weight phase, behind a forward phase that has `done` its own."""
    # the gradient of a vector (a norm's scale, a bias) is a sum over tokens: left for later it would hold what it sums,
    # of a norm two streams in float32, where the sum itself is nothing to hold
    vectors = [v for v in dp_vars if v.aval.ndim <= 1]
    # remat may compute a matmul again that the weights alone need, as attention's last: what it multiplies, a row of
    # probabilities for each token, would be held for it, so it is done where that is
    computed_again = _apart(_needed(eqns, dp_vars, done), dy_var, eqns)
    matmuls = [v for eqn in computed_again if eqn.primitive.name == "dot_general" for v in eqn.outvars]
    backward = _needed(eqns, (*dx_vars, *vectors, *matmuls), done)
    return backward, _needed(eqns, dp_vars, done | {v for eqn in backward for v in eqn.outvars})


@dataclass(frozen=True)
class Phases:
    """The three phases of a function (params, constants, x) -> (y, objective, aux).

    `kept_input` and `kept_weight` are the values that must wait from the forward phase for the backward phase alone,
    and for the weight phase (which the backward phase may read too); `held` waits from backward to weight.
    """

    forward: Callable  # (params, constants, x) -> (y, objective, aux, kept_input, kept_weight)
    backward: Callable  # (params, constants, kept_input, kept_weight, dy) -> (dx, held)
    weight: Callable  # (params, constants, kept_weight, held) -> dparams


def _traced(function: Callable, params, constants, x: jax.Array):
    """The jaxpr of (params, constants, x, dy) -> (y, objective, aux), dx, dparams, with its trees."""
    trees = {}

    def whole(params, constants, x, dy):
        def differentiated(params, x):
            y, objective, aux = function(params, constants, x)
            return (y, objective), aux

        (y, objective), pull, aux = jax.vjp(differentiated, params, x, has_aux=True)
        dparams, dx = pull((dy, None if objective is None else jnp.ones_like(objective)))
        outputs = ((y, objective, aux), dx, dparams)
        trees["out"] = [jax.tree.structure(part) for part in outputs]
        return [jax.tree.leaves(part) for part in outputs]

    arguments = (params, constants, x, x)
    flat, tree = jax.tree.flatten(arguments)
    closed = jax.make_jaxpr(lambda *flat: jax.tree.leaves(whole(*jax.tree.unflatten(tree, flat))))(*flat)
    opened = jax.make_jaxpr(lambda *flat: _opened(closed.jaxpr, closed.consts, list(flat)))(*flat)
    return opened, trees["out"]


def phases(function: Callable, params, constants, x: jax.Array) -> Phases:
    """The phases of `function(params, constants, x) -> (y, objective, aux)` at these types.

    y has the type of x; `objective` is a float32 scalar that is added to what is minimised, with weight 1, or None;
    aux is a pytree that has no gradient, or None. `constants` (a pytree) get no gradient. Values that do not depend on
    x, such as gathered weights or dropout masks, are not kept but computed again.
    """
    opened, (out_tree, dx_tree, dparams_tree) = _traced(function, params, constants, x)
    jaxpr, eqns = opened.jaxpr, opened.jaxpr.eqns
    const_env = dict(zip(jaxpr.constvars, opened.consts, strict=True))

    # ----------------------------------------------------------------------------------------------- deal out equations
    fixed = len(jax.tree.leaves((params, constants)))
    n = out_tree.num_leaves
    x_var, dy_var = jaxpr.invars[fixed], jaxpr.invars[fixed + 1]
    y_vars, dx_vars, dp_vars = jaxpr.outvars[:n], jaxpr.outvars[n : n + 1], jaxpr.outvars[n + 1 :]
    given = {*jaxpr.constvars, *jaxpr.invars[:fixed]}  # what every phase has: parameters and constants
    inputs = given | {x_var, dy_var}
    free = set(given)  # what follows from them
    for eqn in eqns:
        if all(isinstance(a, Literal) or a in free for a in eqn.invars) and eqn.invars:
            free.update(eqn.outvars)
    forward = _needed(eqns, y_vars, inputs)
    backward, weight = _dealt(eqns, dx_vars, dp_vars, inputs | {v for eqn in forward for v in eqn.outvars}, dy_var)

    # --------------------------------------------------------------------------------------------- what crosses phases
    before = {x_var} | {v for eqn in forward for v in eqn.outvars}
    during = {dy_var} | {v for eqn in backward for v in eqn.outvars}
    weight_reads, backward_reads = _reads(weight, dp_vars), _reads(backward, dx_vars)
    ordered = [x_var, dy_var, *(v for eqn in eqns for v in eqn.outvars)]
    # a value computed in the forward phase whose first reader is in the weight phase waits till then
    kept_weight = [v for v in ordered if v in weight_reads & before - free]
    kept_input = [v for v in ordered if v in (backward_reads & before - free) - set(kept_weight)]
    held = [v for v in ordered if v in weight_reads & during - free]
    again_backward = _needed(eqns, backward_reads & free, given)
    again_weight = _needed(eqns, weight_reads & free, given)

    def environment(params, constants) -> dict:
        leaves = jax.tree.leaves((params, constants))
        return const_env | dict(zip(jaxpr.invars[:fixed], leaves, strict=True))

    def read(env: dict, variables) -> list:
        return [v.val if isinstance(v, Literal) else env[v] for v in variables]

    def run_forward(params, constants, x):
        env = _run(forward, environment(params, constants) | {x_var: x})
        y, objective, aux = jax.tree.unflatten(out_tree, read(env, y_vars))
        return y, objective, aux, read(env, kept_input), read(env, kept_weight)

    def run_backward(params, constants, kept_i, kept_w, dy):
        env = environment(params, constants) | {dy_var: dy}
        env |= dict(zip((*kept_input, *kept_weight), (*kept_i, *kept_w), strict=True))
        _run(backward, _run(again_backward, env))
        return jax.tree.unflatten(dx_tree, read(env, dx_vars)), read(env, held)

    def run_weight(params, constants, kept_w, held_values):
        env = environment(params, constants)
        env |= dict(zip((*kept_weight, *held), (*kept_w, *held_values), strict=True))
        _run(weight, _run(again_weight, env))
        return jax.tree.unflatten(dparams_tree, read(env, dp_vars))

    return Phases(run_forward, run_backward, run_weight)
