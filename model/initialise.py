"""Draws parameters as their specifications say: the same numbers on every mesh, and for every order of the layers."""

import jax
import jax.numpy as jnp

from model.specs import LAYERS, LAYERS_KEY, ParameterSpec, RandomKey, Specs, map_specs


def draw_all(specs: Specs, slots: tuple[int, ...], key: jax.Array) -> dict:
    """All parameters, float32, from the model's key: to be jitted with the shardings that they shall have.

    `slots` is the layer in each row of the stacked layers, -1 for a row of zeros. A layer's key is made from its index:
    its weights depend neither on how many layers there are nor on their order.
    """
    slots_L = jnp.asarray(slots)
    keys_L = jax.vmap(lambda layer: jax.random.fold_in(derived(key, LAYERS_KEY), layer))(slots_L)

    def draw_layers(spec: ParameterSpec) -> jax.Array:
        values = jax.vmap(lambda layer_key: draw(spec.of_one_layer(), layer_key))(keys_L)
        return jnp.where((slots_L >= 0).reshape(-1, *[1] * (values.ndim - 1)), values, 0)

    outside = {name: branch for name, branch in specs.items() if name != LAYERS}
    return map_specs(lambda spec: draw(spec, key), outside) | {LAYERS: map_specs(draw_layers, specs[LAYERS])}


def draw(spec: ParameterSpec, key: jax.Array) -> jax.Array:
    """One parameter, float32; `key` is the model's, or the layer's of a parameter in one layer.

    Stacked experts are drawn each from a key of its own, so that one does not depend on how many there are.
    """
    if not spec.std:
        return jnp.full(spec.shape, spec.value, jnp.float32)
    key = derived(key, spec.key)
    if spec.batch:
        keys_E = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(spec.shape[0]))
        return jax.vmap(lambda key: spec.std * jax.random.normal(key, spec.shape[1:], jnp.float32))(keys_E)
    value = spec.std * jax.random.normal(key, spec.shape, jnp.float32)
    if spec.rows is None or spec.rows == spec.shape[0]:
        return value
    return value * (jnp.arange(spec.shape[0]) < spec.rows).astype(jnp.float32)[:, None]


def derived(key: jax.Array, path: RandomKey) -> jax.Array:
    """The key that `path` describes, from the one where it begins."""
    for parts, part in path.splits:
        key = jax.random.split(key, parts)[part]
    return key
