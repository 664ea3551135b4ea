"""Optimizers from optax, and learning-rate schedules.

An optimizer here gives a direction; the training step scales it by the schedule's learning rate, so that a skipped
step and a resumed run have the learning rate of their step.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from model.config import ModelConfig
from model.parametrization import factors_of
from model.specs import ParameterSpec, Specs, map_specs
from training.config import OptimizerConfig
from training.factored import scale_by_factored_rms
from training.moments import in_bfloat16

MUON_RMS = 0.2  # root mean square of a Muon update, that of a typical AdamW one: one lr serves both (arXiv 2502.16982)


def learning_rate(config: OptimizerConfig, steps: int) -> Callable[[jax.Array], jax.Array]:
    """The learning rate's schedule: step (int scalar, 0 first) to rate (float32), for a run of `steps` steps.

    The last step of the warm-up, or the first of a run without one, has the peak, and the last step of a decay has
    exactly its end.
    """
    warmup, low = config.warmup_steps, config.final_lr
    start = max(warmup, 1)  # the first step of the decay
    if config.schedule == "wsd":
        start = max(start, min(round(steps * (1 - config.decay_fraction)), steps - 1))

    def lr_schedule(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        rise = jnp.minimum(1.0, (step + 1) / warmup) if warmup else 1.0
        done = jnp.clip((step + 1 - start) / max(steps - start, 1), 0, 1)  # share of the decay, this step's included
        left = {
            "constant": lambda: 1.0,
            "linear": lambda: 1 - done,
            "wsd": lambda: 1 - done,
            "cosine": lambda: (1 + jnp.cos(jnp.pi * done)) / 2,
        }[config.schedule]()
        return jnp.asarray(config.lr * rise * (left + low * (1 - left)), jnp.float32)

    return lr_schedule


def _muon(config: OptimizerConfig, specs: Specs) -> optax.GradientTransformation:
    masked = lambda x: isinstance(x, optax.MaskedNode)

    def dimensions(leaf, spec: ParameterSpec):
        """Stacked matrices, of layers and experts, are a batch: all contracted dims against all output dims."""
        return MuonDimensionNumbers(spec.contracted, tuple(range(spec.contracted[-1] + 1, leaf.ndim)))

    def for_matrices(function, updates):
        """`function(leaf, spec)` of every matrix; the others are masked out here."""
        return jax.tree.map(lambda u, spec: u if masked(u) else function(u, spec), updates, specs, is_leaf=masked)

    def to_rms(leaf, spec: ParameterSpec):
        reduction, output = dimensions(leaf, spec)
        fan_in, fan_out = (math.prod(leaf.shape[axis] for axis in axes) for axes in (reduction, output))
        return leaf * (MUON_RMS * max(fan_in, fan_out) ** 0.5)

    matrices = optax.chain(
        scale_by_muon(beta=config.momentum, weight_dimension_numbers=lambda p: for_matrices(dimensions, p)),
        optax.stateless(lambda updates, _: for_matrices(to_rms, updates)),
    )
    labels = map_specs(lambda spec: "muon" if spec.is_matrix else "adamw", specs)
    others = optax.scale_by_adam(config.beta1, config.beta2, config.eps)
    return optax.partition({"muon": matrices, "adamw": others}, labels)


def _clip_rms(updates: dict, _) -> dict:
    """Scales updates down to a root mean square of 1, over the entries that are not zero: padding does not count."""

    def one(update: jax.Array) -> jax.Array:
        mean_square = jnp.sum(jnp.square(update)) / jnp.maximum(jnp.count_nonzero(update), 1)
        return update / jnp.maximum(1.0, jnp.sqrt(mean_square))

    return jax.tree.map(one, updates)


def _parametrized(core: optax.GradientTransformation, factors: dict, name: str) -> optax.GradientTransformation:
    """`core`, which sees gradients of the size that the base model has, with its updates made as large as they may be.

    An update of bounded entries (Adam's, Lion's, Adafactor's, and what Muon does to vectors) is multiplied by `change`.
    SGD's entries follow the gradient's, so that dividing those by `gradient` is right for it, too. Muon's update of a
    matrix is of full rank, and acts on a vector more weakly than one of the same entries whose rank is low: by the
    square root of the width, which is that of 1 / change.
    """

    def scale(leaf, factor: float):
        return leaf if factor == 1 else leaf * factor

    def update(updates, state, params=None):
        updates = jax.tree.map(lambda u, f: scale(u, 1 / f.gradient), updates, factors)
        updates, state = core.update(updates, state, params)
        muon = name == "muon"
        change = lambda f: f.change**0.5 if muon and f.matrix else f.change
        return jax.tree.map(lambda u, f: scale(u, change(f)), updates, factors), state

    return optax.GradientTransformation(core.init, update)


def make_optimizer(
    config: OptimizerConfig, specs: Specs, model: ModelConfig | None = None, param_dtype: str = "float32"
) -> optax.GradientTransformation:
    """The direction to go against: `params - lr * direction`. Clipping is done before, by the step.

    `specs` is the tree of the parameters' specifications. Without `model`, whose parametrization says how updates
    follow its sizes, all are as in the base model. Weight decay has no factor: lr * weight_decay, the share that a step
    takes away, means the same at every size.
    """
    core = {
        "adamw": lambda: optax.scale_by_adam(config.beta1, config.beta2, config.eps),
        "lion": lambda: optax.scale_by_lion(config.beta1, config.beta2),
        "sgd": lambda: optax.trace(config.momentum, nesterov=config.momentum > 0),
        "muon": lambda: _muon(config, specs),
        # arXiv 1804.04235 without its relative step size: factored second moments, updates clipped to RMS 1
        "adafactor": lambda: optax.chain(scale_by_factored_rms(specs), optax.stateless(_clip_rms)),
    }[config.name]()
    if "bfloat16" in (config.moment_dtype, param_dtype):
        core = in_bfloat16(core)
    if model is not None:
        core = _parametrized(core, factors_of(model, specs), config.name)
    decayed = map_specs(lambda spec: spec.decayed, specs)
    return optax.chain(core, optax.add_decayed_weights(config.weight_decay, decayed))
