"""The three phases of a function: together they are its gradient, apart they compute nothing twice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.matmul import project
from parallel.pipeline.phases import CALLS, phases


def mlp(params, scale, x):
    h = jax.nn.silu(project(x, params["into"])) * scale
    return x + project(h, params["out"]), jnp.square(h).sum() * 0.1, {"largest": h.max()}


def rematerialised(params, scale, x):
    y, _, _ = jax.checkpoint(mlp)(params, scale, x)
    return y, None, None


def looped(params, scale, x):
    turn = lambda x, _: (mlp(params, scale, x)[0], None)
    return jax.lax.scan(turn, x, length=3)[0], None, None


FUNCTIONS = {f.__name__: f for f in (mlp, rematerialised, looped)}


@pytest.fixture
def arguments():
    key = jax.random.key(0)
    draw = lambda i, *shape: jax.random.normal(jax.random.fold_in(key, i), shape)
    return {"into": draw(1, 8, 16), "out": draw(2, 16, 8)}, jnp.float32(1.5), draw(3, 2, 5, 8)


def primitives(jaxpr) -> list[str]:
    """Every equation's primitive, those inside of calls and loops too."""
    found = []
    for eqn in jaxpr.eqns:
        inner = [getattr(v, "jaxpr", v) for v in eqn.params.values() if hasattr(getattr(v, "jaxpr", v), "eqns")]
        if eqn.primitive.name not in CALLS:
            found.append(eqn.primitive.name)
        found += [name for one in inner for name in primitives(one)]
    return found


@pytest.mark.parametrize("name", FUNCTIONS)
def test_phases_are_the_gradient(name, arguments):
    params, scale, x = arguments
    cut = phases(FUNCTIONS[name], *arguments)
    y, objective, aux, kept_input, kept_weight = cut.forward(*arguments)
    dy = jnp.cos(y)
    dx, held = cut.backward(params, scale, kept_input, kept_weight, dy)
    dparams = cut.weight(params, scale, kept_weight, held)

    def minimised(params, x):
        y, objective, _ = FUNCTIONS[name](params, scale, x)
        return (y * dy).sum() + (0 if objective is None else objective)

    expected = jax.grad(minimised, (0, 1))(params, x)
    for ours, theirs in zip(jax.tree.leaves((dparams, dx)), jax.tree.leaves(expected), strict=True):
        assert jnp.linalg.norm(ours - theirs) <= 1e-6 * jnp.linalg.norm(theirs)
    expected_y, expected_objective, expected_aux = FUNCTIONS[name](*arguments)
    assert jnp.allclose(y, expected_y)
    assert (objective is None) == (expected_objective is None)
    assert jax.tree.structure(aux) == jax.tree.structure(expected_aux)


def test_nothing_is_computed_twice_and_weights_are_apart(arguments):
    """Two matmuls forward, two in the input gradient, two in the weight gradient."""
    params, scale, _ = arguments
    cut = phases(mlp, *arguments)
    y, _, _, kept_input, kept_weight = cut.forward(*arguments)
    _, held = cut.backward(params, scale, kept_input, kept_weight, y)
    matmuls = [
        primitives(jax.make_jaxpr(phase)(*inputs).jaxpr).count("dot_general")
        for phase, inputs in (
            (cut.forward, arguments),
            (cut.backward, (params, scale, kept_input, kept_weight, y)),
            (cut.weight, (params, scale, kept_weight, held)),
        )
    ]
    assert matmuls == [2, 2, 2]


def test_recomputed_only_when_asked(arguments):
    """With rematerialisation x alone is kept, and the forward matmul that the gradients need runs again."""
    params, scale, x = arguments
    cut = phases(rematerialised, *arguments)
    y, _, _, kept_input, kept_weight = cut.forward(*arguments)
    assert sum(v.size for v in (*kept_input, *kept_weight)) <= 2 * x.size
    backward = jax.make_jaxpr(cut.backward)(params, scale, kept_input, kept_weight, y).jaxpr
    assert primitives(backward).count("dot_general") == 3


def test_parameters_and_what_follows_from_them_are_not_kept(arguments):
    def cast(params, scale, x):
        return project(x, params["into"] * 2), None, None

    params, scale, x = arguments
    square = {"into": jnp.eye(8)}
    cut = phases(cast, square, scale, x)
    _, _, _, kept_input, kept_weight = cut.forward(square, scale, x)
    assert [v.shape for v in (*kept_input, *kept_weight)] == [x.shape]


def test_gradients_of_vectors_hold_nothing_of_the_tokens():
    """A norm's scale: its gradient is a sum over tokens, which the backward phase takes at once."""
    D = 8
    params, x = {"scale": jnp.arange(1.0, D + 1)}, jnp.sin(jnp.arange(2.0 * 4 * D)).reshape(2, 4, D)
    layer = lambda params, constants, x: (x / (1 + abs(x)) * params["scale"], None, None)
    cut = phases(layer, params, (), x)
    dy = jnp.cos(x)
    *_, kept_input, kept_weight = cut.forward(params, (), x)
    dx, held = cut.backward(params, (), kept_input, kept_weight, dy)
    assert [h.shape for h in (*kept_weight, *held)] == [(D,)]
    dparams = cut.weight(params, (), kept_weight, held)
    expected = jax.vjp(lambda params, x: layer(params, (), x)[0], params, x)[1](dy)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), (dparams, dx), expected)


def test_what_remat_computes_again_for_weights_alone_holds_no_probabilities():
    """Under remat=dots nothing but the gradient of a projection's weight needs what attention gives."""
    B, T, D = 2, 64, 4
    params = {name: jnp.eye(D) * (i + 1) for i, name in enumerate(("query", "value", "out"))}

    def attention(params, constants, x):
        scores_BTS = jnp.einsum("btd,bsd->bts", project(x, params["query"]), x)
        values = jnp.einsum("bts,bsd->btd", jax.nn.softmax(scores_BTS), project(x, params["value"]))
        return x + project(values, params["out"]), None, None

    dots = jax.checkpoint(attention, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
    x = jax.random.normal(jax.random.key(0), (B, T, D))
    cut = phases(dots, params, (), x)
    y, _, _, kept_input, kept_weight = cut.forward(params, (), x)
    dx, held = cut.backward(params, (), kept_input, kept_weight, y)
    assert max(h.size for h in (*kept_weight, *held)) == x.size
    expected, dx_expected = jax.grad(lambda p, x: jnp.square(attention(p, (), x)[0]).sum() / 2, (0, 1))(params, x)
    np.testing.assert_allclose(dx, dx_expected, rtol=1e-4, atol=1e-4)
    dparams = cut.weight(params, (), kept_weight, held)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), dparams, expected)
