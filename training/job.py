"""A training job put together: model, optimizer, layout and steps on one mesh, from the config's parts.

What train.py, the parity check and ahead-of-time compilation share. Nothing is allocated before `init`.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from model.config import MASKED_LM, ModelConfig
from model.forms import Forms
from model.transformer import Description, describe
from parallel.config import ContextConfig, PipelineConfig, schedule_for
from parallel.pipeline.run import slots
from parallel.pipeline.schedules import PipelineSchedule
from parallel.sharding import batch_sharding, replicated
from performance.collectives import check_pipeline
from training.config import OptimizerConfig, TrainConfig
from training.optimizer import learning_rate, make_optimizer
from training.state import TrainState, abstract_state, init_state, reordered
from training.step import Loss, cross_entropy, make_eval_step, make_train_step
from training.trainable import Rule, Trainable, chosen, joined, of_same


@dataclass(frozen=True)
class Job:
    """The pieces. States of a run have their layers in the order of the pipeline's stages, those of a checkpoint
    (`stored`) in the model's."""

    mesh: Mesh
    model: ModelConfig
    train: TrainConfig
    optimizer_config: OptimizerConfig
    description: Description
    stored_description: Description
    optimizer: optax.GradientTransformation
    schedule: PipelineSchedule | None
    abstract: TrainState
    stored: TrainState
    trainable: Trainable | None = None  # None: all parameters are trained
    rule: Rule | None = None
    loss: Loss = cross_entropy

    @property
    def step(self) -> Callable:
        """The training step (state, batch) -> (state, metrics), jitted; the state is donated."""
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract)
        return jax.jit(self.pure_step(), donate_argnums=0, out_shardings=(shardings, replicated(self.mesh)))

    def compile(self, function: Callable, batch) -> jax.stages.Compiled:
        """`step` or `step_and_gradients`, compiled ahead for batches like this one, and checked. Raises ValueError."""
        compiled = function.lower(self.abstract, batch).compile()
        if self.schedule is not None and self.mesh.devices.flat[0].platform == "cpu":
            check_pipeline(compiled.as_text(), self.mesh)
        return compiled

    @property
    def step_and_gradients(self) -> Callable:
        """As `step`, with the gradients before clipping as a third result; nothing is donated."""
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract)
        out_shardings = (shardings, replicated(self.mesh), chosen(shardings.params, self.trainable))
        return jax.jit(self.pure_step(expose_gradients=True), out_shardings=out_shardings)

    def pure_step(self, **kwargs) -> Callable:
        """The training step (state, batch) -> (state, metrics), not jitted; see training.step.make_train_step."""
        o = self.optimizer_config
        lr_schedule = learning_rate(o, self.train.steps)
        shared = self.description, self.optimizer, lr_schedule, self.train, o.clip_norm, self.schedule
        kwargs |= {"trainable": self.trainable, "rule": self.rule, "loss": self.loss}
        return make_train_step(*shared, **kwargs)

    @property
    def evaluate(self) -> Callable:
        """The evaluation step (params, batch, token_bytes_V) -> sums, jitted."""
        step = make_eval_step(self.description, self.train, self.schedule)
        return jax.jit(step, out_shardings=replicated(self.mesh))

    def evaluate_ahead(self, batch, token_bytes_V: jax.Array) -> Callable:
        """As `evaluate`, for batches like this one. On accelerators it compiles in a thread of its own meanwhile; the
        cores of a CPU have the training step to compile, and to run.
        """
        if self.mesh.devices.flat[0].platform == "cpu":
            return self.evaluate
        lowered = self.evaluate.lower(self.abstract.params, batch, token_bytes_V)
        compiled = ThreadPoolExecutor(1, "compile").submit(lowered.compile)
        return lambda *arguments: compiled.result()(*arguments)

    def init(self, seed: int) -> TrainState:
        """The first state of a run, sharded on the mesh; bitwise the same on every mesh."""
        return init_state(self.abstract, self.description, self.optimizer, seed, self.trainable)

    def to_stored(self, state):
        """A state, or its parameters, as checkpoints hold it."""
        return self._moved(state, self.stored, self.description.slots, self.stored_description.slots)

    def from_stored(self, state):
        """The inverse of `to_stored`."""
        return self._moved(state, self.abstract, self.stored_description.slots, self.description.slots)

    @property
    def saved(self) -> dict:
        """What a checkpoint holds of a state, as shapes: of the parameters those alone that are trained."""
        return vars(self._trained_alone(self.stored))

    def to_saved(self, state: TrainState) -> dict:
        """A state as a checkpoint holds it."""
        slots = self.description.slots, self.stored_description.slots
        return vars(self._moved(self._trained_alone(state), self._trained_alone(self.stored), *slots))

    def from_saved(self, saved: dict, params: dict) -> TrainState:
        """The state of a checkpoint; what it lacks of the parameters is that of `params`, as a run has them."""
        slots = self.stored_description.slots, self.description.slots
        state = self._moved(TrainState(**saved), self._trained_alone(self.abstract), *slots)
        return replace(state, params=joined(params, state.params))

    def _trained_alone(self, state: TrainState) -> TrainState:
        return replace(state, params=chosen(state.params, self.trainable))

    @contextlib.contextmanager
    def for_inference(self, params: dict) -> Iterator[tuple[Description, dict]]:
        """The model and its parameters as generation needs them, on the same devices: stages become shards."""
        if self.schedule is None:
            yield self.description, params
            return
        at = self.mesh.axis_names.index("pipe")
        shape, devices = dict(self.mesh.shape), np.moveaxis(self.mesh.devices, at, at + 1)  # (data, pipe, fsdp, ...)
        joined = "data" if self.model.width % (shape["fsdp"] * shape["pipe"]) else "fsdp"
        shape |= {"pipe": 1, joined: shape[joined] * shape["pipe"]}
        mesh = Mesh(devices.reshape(tuple(shape.values())), self.mesh.axis_names, axis_types=self.mesh.axis_types)
        description, params = self.stored_description, self.to_stored(params)
        with jax.set_mesh(mesh):
            yield description, jax.device_put(params, description.shardings(mesh))

    def _moved(self, state, like: TrainState, ours: tuple[int, ...], theirs: tuple[int, ...]):
        if ours == theirs:
            return state
        whole = isinstance(state, TrainState)
        key = ours, jax.tree.structure(state)
        if key not in self._movers:  # compiled once, not at every checkpoint
            shardings = jax.tree.map(lambda leaf: leaf.sharding, like if whole else of_same(like.params, state))
            self._movers[key] = jax.jit(lambda state: reordered(state, ours, theirs), out_shardings=shardings)
        return self._movers[key](state)

    @functools.cached_property
    def _movers(self) -> dict[tuple, Callable]:
        return {}


class Settings(Protocol):
    """What a job needs of a run's config."""

    model: ModelConfig
    train: TrainConfig
    optimizer: OptimizerConfig
    pipeline: PipelineConfig
    context: ContextConfig


def make_job(
    config: Settings,
    mesh: Mesh,
    trainable: Trainable | None = None,
    forms: Forms | None = None,
    rule: Rule | None = None,
    *,
    loss: Loss = cross_entropy,
) -> Job:
    """The job of a run on `mesh`, which must be in context. Raises ValueError for a pipeline that cannot be.

    Parameters that are not `trainable` have no gradient and no moments, and are in no checkpoint; see
    training.trainable.matching. `forms` stand in the place of parts of the model, a `rule` around the optimizer; `loss`
    is what is minimised.
    """
    model, train, style = config.model, config.train, config.context.style
    if loss is cross_entropy and model.head not in ("vocabulary", *MASKED_LM):
        raise ValueError(f"model.head={model.head} gives no logits to train; use vocabulary or masked_lm")
    schedule = schedule_for(config.pipeline, train.batch_size // train.grad_accumulation, mesh.shape)
    stored = describe(model, context_style=style, forms=forms)
    description = stored if schedule is None else describe(model, slots(model.layers, schedule), style, forms)
    trained = chosen(description.specs, trainable)
    optimizer = make_optimizer(config.optimizer, trained, model, train.param_dtype)
    optimizer = optimizer if rule is None else rule.around(optimizer, trained)
    dtype = jnp.dtype(train.param_dtype)
    abstract = lambda description: abstract_state(mesh, description, optimizer, dtype, trainable)
    of_run, of_checkpoints = abstract(description), abstract(stored)
    pieces = description, stored, optimizer, schedule, of_run, of_checkpoints
    return Job(mesh, model, train, config.optimizer, *pieces, trainable, rule, loss)


def abstract_batch(train: TrainConfig, mesh: Mesh, *, segments: bool) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a run's batch, on its mesh; with `segments` documents are kept apart."""
    dtypes = {"tokens_BT": jnp.int32, "targets_BT": jnp.int32, "mask_BT": jnp.float32}
    if segments:
        dtypes |= {"segments_BT": jnp.int32, "places_BT": jnp.int32}
    shape, layout = (train.batch_size, train.seq_len), batch_sharding(mesh)
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=layout) for name, dtype in dtypes.items()}
