"""The transformer as a pipeline's program: losses and gradients of a batch that goes through the stages of `pipe`."""

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp

from model.specs import LAYERS, map_specs
from model.transformer import Description, block_of, rematerialised, rows_of
from parallel.pipeline import run as pipeline
from parallel.pipeline import schedules
from parallel.pipeline.schedules import PipelineSchedule
from parallel.sharding import stored_over_stages
from runtime.platform import platform
from training.config import TrainConfig
from training.loss import LossSums
from training.trainable import joined, of_same


def cut(x: jax.Array | None, parts: int) -> jax.Array | None:
    """(B, ...) to (parts, B / parts, ...), strided, so that each device cuts its own rows; (1, ...) is repeated."""
    if x.shape[0] == 1:
        return jnp.broadcast_to(x, (parts, *x.shape))
    return jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)


def program(description: Description, config: TrainConfig, loss_of: Callable) -> pipeline.Program:
    """What the stages run. `micro` is a batch's dict, with "dropout_keys_B" where dropout is on; `loss_of` a Loss."""
    block = block_of(description.block)
    dtype = jnp.dtype(config.compute_dtype_on(platform()))

    def prepare(micro):
        names = ("positions_BT", "segments_BT", "places_BT", "dropout_keys_B", "mask_BT", "types_BT")
        return description.bind({}).info(micro["tokens_BT"], *(micro.get(name) for name in names))

    def embed(shared, fixed, micro):
        return description.bind(joined(fixed, shared)).embed(micro["tokens_BT"], prepare(micro), dtype)

    def layer(params, constants, x_BTD):
        row, info = constants
        x_BTD, _, aux = block(joined(row["fixed"], params), x_BTD, row, info)
        return x_BTD, None if aux is None else aux.objective, aux

    def loss(shared, fixed, x_BTD, micro):
        model = description.bind(joined(fixed, shared))
        sums = loss_of(model, model.finish(x_BTD), micro, config)
        return sums.nll + config.z_loss * sums.z, sums

    scanned = description.config.scan_layers
    specs = map_specs(lambda spec: stored_over_stages(spec.axes), _shared(description.specs))
    layer = rematerialised(layer, config.remat, scanned=scanned)
    in_turn = not scanned and config.remat != "none"
    return pipeline.Program(prepare, embed, layer, loss, specs, unroll=not scanned, in_turn=in_turn)


def _shared(tree: dict) -> dict:
    return {name: value for name, value in tree.items() if name != LAYERS}


def _run(
    description: Description, config: TrainConfig, schedule: PipelineSchedule, trained, fixed, batch, keys_B, loss
):
    micros = dict(batch) | ({} if keys_B is None else {"dropout_keys_B": keys_B})
    micros = {name: cut(x, schedule.microbatches) for name, x in micros.items()}
    rows, padded = rows_of(description.config, description.slots), -1 in description.slots
    rows |= {"fixed": fixed.get(LAYERS, {})}
    what = program(description, config, loss)
    shared = [_shared(params) for params in (trained, fixed)]
    specs = [of_same(what.shared_specs, params) for params in shared]
    what = replace(what, shared_specs=specs[0], fixed_specs=specs[1])
    layers = trained.get(LAYERS, {})
    sums, router, *grads = pipeline.run(what, schedule, layers, rows, *shared, micros, padded=padded)
    return replace(sums, router=router), *grads


def pipelined_losses(
    description: Description, config: TrainConfig, schedule: PipelineSchedule, params, batch, loss: Callable
) -> LossSums:
    """As training.step.loss_sums, through the stages."""
    forward = schedules.forward_only(schedule.stages, schedule.microbatches, schedule.placement)
    return _run(description, config, forward, {}, params, batch, None, loss)[0]


def pipelined_gradients(
    description: Description,
    config: TrainConfig,
    schedule: PipelineSchedule,
    trained,
    fixed,
    batch,
    keys_B,
    tokens,
    loss,
):
    """(gradients of what is minimised, divided by `tokens`; loss sums) of a batch, through the stages.

    The gradients are those of `trained`, which with `fixed` are the parameters.
    """
    sums, layers, shared = _run(description, config, schedule, trained, fixed, batch, keys_B, loss)
    return jax.tree.map(lambda g: g / tokens, shared | ({LAYERS: layers} if LAYERS in trained else {})), sums
