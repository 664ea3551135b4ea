"""What a run carries from step to step, how it lies on the mesh, and how it begins."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from model.specs import Specs, leaves, map_specs
from model.transformer import Description
from parallel.sharding import replicated, sharding_like
from training.trainable import chosen


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Monitor:
    """Running statistics that tell a spike from noise (exponential averages over about 50 steps)."""

    loss_mean: jax.Array
    loss_var: jax.Array
    grad_norm: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that a step reads and writes; saving it is saving the run."""

    step: jax.Array  # int32: steps done, and the cursor into the data
    params: dict
    opt_state: optax.OptState
    rng: jax.Array  # uint32 key data; a step's key is folded from it
    monitor: Monitor
    skipped: jax.Array  # int32: steps whose update was dropped since it was not finite
    halted: jax.Array  # bool: a non-finite step came and the run is to stop; no update is applied any more


def has_vocabulary(specs: Specs) -> Callable[[str], bool]:
    """Whether a leaf of a state, by its path in a checkpoint, has a vocabulary dim: its padding may depend on the mesh.

    Adafactor's means over the other dims have it, too; what else of an optimizer has such a path has one size for all.
    """
    names = tuple("/".join(path) for path, spec in leaves(specs) if "vocab" in spec.axes)
    return lambda path: path.endswith(names)


def reordered(tree, ours: tuple[int, ...], theirs: tuple[int, ...]):
    """The same state or parameters with the stacked layers in another order.

    `ours` and `theirs` are the layer in each row (-1: none, then a row of zeros), as in model.transformer.Description.
    """
    source = jnp.asarray([ours.index(layer) if layer >= 0 else len(ours) for layer in theirs])

    def one(path, leaf):
        if "layers" not in _dict_path(path) or not leaf.ndim or leaf.shape[0] != len(ours):
            return leaf
        return jnp.take(leaf, source, axis=0, mode="fill", fill_value=0)

    return jax.tree_util.tree_map_with_path(one, tree)


def init_key(seed: int) -> jax.Array:
    """What a run's first parameters are drawn from."""
    return jax.random.split(jax.random.key(seed))[0]


def make_state(description: Description, optimizer, seed: int, param_dtype, trainable=None) -> TrainState:
    """The first state of a run, on the default layout: to be traced, see `init_state`."""
    run_key = jax.random.split(jax.random.key(seed))[1]
    dtypes = map_specs(lambda spec: jnp.dtype(spec.dtype or param_dtype), description.specs)
    params = jax.tree.map(lambda p, dtype: p.astype(dtype), description.init(init_key(seed)), dtypes)
    zero = jnp.zeros((), jnp.float32)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(chosen(params, trainable)),
        rng=jax.random.key_data(run_key),
        monitor=Monitor(zero, zero, zero),
        skipped=jnp.zeros((), jnp.int32),
        halted=jnp.zeros((), bool),
    )


def state_shardings(mesh: Mesh, description: Description, state: TrainState) -> TrainState:
    """The NamedSharding of each leaf: optimizer moments lie like their parameters, the rest is on every device."""
    params = description.shardings(mesh)
    by_path = {
        _dict_path(path): (leaf.shape, sharding)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(state.params), jax.tree.leaves(params), strict=True
        )
    }

    def moment(path, leaf) -> NamedSharding:
        shape, sharding = by_path.get(_dict_path(path), ((), None))
        return replicated(mesh) if sharding is None else sharding_like(sharding, shape, leaf.shape)

    everywhere = jax.tree.map(lambda _: replicated(mesh), state)
    return replace(everywhere, params=params, opt_state=jax.tree_util.tree_map_with_path(moment, state.opt_state))


def _dict_path(path) -> tuple[str, ...]:
    """The dict keys that end a path: a parameter's name, wherever in an optimizer's state it stands."""
    names: list[str] = []
    for key in reversed(path):
        if not isinstance(key, jax.tree_util.DictKey):
            break
        names.append(key.key)
    return tuple(reversed(names))


def abstract_state(mesh: Mesh, description: Description, optimizer, param_dtype, trainable=None) -> TrainState:
    """The state's shapes, dtypes and shardings: what a checkpoint is restored into and a step is lowered for."""
    shapes = jax.eval_shape(lambda: make_state(description, optimizer, 0, param_dtype, trainable))
    shardings = state_shardings(mesh, description, shapes)
    return jax.tree.map(lambda s, h: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=h), shapes, shardings)


def init_state(abstract: TrainState, description: Description, optimizer, seed: int, trainable=None) -> TrainState:
    """The first state, drawn shard by shard: no device ever holds more than its part. Bitwise equal on every mesh."""
    dtype = abstract.params["tokens"]["weight"].dtype  # that of parameters without one of their own
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    # runs once: four fifths of its time would be the compiler's optimisation
    quick = {"xla_backend_optimization_level": 0}
    draw = jax.jit(
        lambda: make_state(description, optimizer, seed, dtype, trainable),
        out_shardings=shardings,
        compiler_options=quick,
    )
    return draw()
