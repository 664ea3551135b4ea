"""One training step and one evaluation step, as pure functions to be jitted."""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from model.transformer import Description
from training.config import TrainConfig
from training.loss import LossSums, chunked_losses
from training.state import Monitor, TrainState

SPIKE_DECAY = 0.98
WARM_MONITOR = 20  # steps before a spike is called one


Batch = Mapping[str, jax.Array]  # tokens_BT, targets_BT, mask_BT, and segments_BT where documents are kept apart


def batch_losses(description: Description, config: TrainConfig, params, batch: Batch, keys_B=None) -> LossSums:
    """Loss sums of a batch; `keys_B` switch dropout on."""
    model = description.bind(params)
    x_BTD, _ = model(
        batch["tokens_BT"],
        segments_BT=batch.get("segments_BT"),
        dropout_keys_B=keys_B,
        dtype=jnp.dtype(config.compute_dtype),
        remat=config.remat,
    )
    return chunked_losses(model.logits, x_BTD, batch["targets_BT"], batch["mask_BT"], config.loss_chunk)


def gradients(description: Description, config: TrainConfig, params, batch: Batch, keys_B=None):
    """Loss sums of the whole batch and the gradient of the mean loss (z-loss included), microbatch by microbatch.

    Every microbatch divides by the tokens of the whole batch, so cutting a batch does not change its gradient.
    """
    tokens = jnp.maximum(batch["mask_BT"].sum(), 1)

    def objective(params, batch, keys_B):
        sums = batch_losses(description, config, params, batch, keys_B)
        return (sums.nll + config.z_loss * sums.z) / tokens, sums

    gradient = jax.grad(objective, has_aux=True)
    if config.grad_accumulation == 1:
        grads, sums = gradient(params, batch, keys_B)
        return sums, grads

    def cut(x: jax.Array) -> jax.Array:  # strided, (B, ...) to (M, B / M, ...): each device cuts its own rows
        m = config.grad_accumulation
        return jnp.moveaxis(x.reshape(x.shape[0] // m, m, *x.shape[1:]), 1, 0)

    def body(carry, microbatch):
        sums, total = carry
        grads, new = gradient(params, *microbatch)
        return (sums + new, jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, grads)), None

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    (sums, grads), _ = jax.lax.scan(body, (LossSums.zero(), zeros), jax.tree.map(cut, (dict(batch), keys_B)))
    return sums, jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)


def dropout_keys(description: Description, config: TrainConfig, state: TrainState) -> jax.Array | None:
    """A key for each sequence of this step's batch, or None where the model has no dropout."""
    if not description.config.dropout:
        return None
    key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    return jax.random.split(key, config.batch_size)


def _watch(monitor: Monitor, step, loss, grad_norm, healthy) -> tuple[Monitor, dict[str, jax.Array]]:
    """The next running statistics, and how far this step lies from the last ones."""
    weight = jnp.maximum(1 - SPIKE_DECAY, 1 / (step + 1.0))  # a plain mean until there is enough of a past
    deviation = loss - monitor.loss_mean
    moved = Monitor(
        monitor.loss_mean + weight * deviation,
        (1 - weight) * (monitor.loss_var + weight * deviation**2),
        monitor.grad_norm + weight * (grad_norm - monitor.grad_norm),
    )
    warm = step >= WARM_MONITOR
    signs = {
        "train/loss_spike": jnp.where(warm, deviation * jax.lax.rsqrt(monitor.loss_var + 1e-12), 0.0),
        "train/grad_norm_ratio": jnp.where(warm, grad_norm / (monitor.grad_norm + 1e-12), 1.0),
    }
    return jax.tree.map(lambda new, old: jnp.where(healthy, new, old), moved, monitor), signs


def make_train_step(
    description: Description,
    optimizer: optax.GradientTransformation,
    schedule: Callable[[jax.Array], jax.Array],
    config: TrainConfig,
    clip_norm: float,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """The step (state, batch) -> (state, metrics); metrics are float32 scalars under their logged names."""

    def train_step(state: TrainState, batch: Batch):
        keys_B = dropout_keys(description, config, state)
        sums, grads = gradients(description, config, state.params, batch, keys_B)
        tokens = jnp.maximum(batch["mask_BT"].sum(), 1)
        loss, norm = sums.nll / tokens, optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.float32), grads))
        if clip_norm:
            scale = jnp.minimum(1.0, clip_norm / jnp.maximum(norm, 1e-30))
            grads = jax.tree.map(lambda g: (g * scale).astype(g.dtype), grads)

        lr = schedule(state.step)
        direction, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda p, d: (p - lr * d).astype(p.dtype), state.params, direction)

        param_norm = optax.tree.norm(jax.tree.map(lambda p: p.astype(jnp.float32), params))
        healthy = jnp.isfinite(loss) & jnp.isfinite(norm) & jnp.isfinite(param_norm)
        halted = state.halted | ~healthy if config.nonfinite == "stop" else state.halted
        apply = healthy & ~halted
        monitor, signs = _watch(state.monitor, state.step, loss, norm, apply)
        keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(apply, n, o), new, old)
        new_state = TrainState(
            step=state.step + jnp.where(halted, 0, 1),
            params=keep(params, state.params),
            opt_state=keep(opt_state, state.opt_state),
            rng=state.rng,
            monitor=monitor,
            skipped=state.skipped + jnp.where(apply | halted, 0, 1),
            halted=halted,
        )
        metrics = {
            "train/loss": loss,
            "train/grad_norm": norm,
            "train/param_norm": param_norm,
            "train/lr": lr,
            "train/accuracy": sums.correct / tokens,
            "train/skipped": new_state.skipped.astype(jnp.float32),
            **signs,
        }
        if config.z_loss:
            metrics["train/z_loss"] = config.z_loss * sums.z / tokens
        return new_state, metrics

    return in_float32_matmuls(train_step, config)


def make_eval_step(description: Description, config: TrainConfig) -> Callable:
    """The step (params, batch, token_bytes_V) -> nats, tokens and bytes of the targets that count, float32 sums."""

    def eval_step(params, batch: Batch, token_bytes_V: jax.Array) -> dict[str, jax.Array]:
        sums = batch_losses(description, config, params, batch)
        bytes_BT = jnp.take(token_bytes_V, batch["targets_BT"]) * batch["mask_BT"]
        return {"nats": sums.nll, "tokens": batch["mask_BT"].sum(), "bytes": bytes_BT.sum()}

    return in_float32_matmuls(eval_step, config)


def in_float32_matmuls(step: Callable, config: TrainConfig) -> Callable:
    """Accelerators round float32 matmuls to fewer bits by default; a run in float32 means float32."""
    if config.compute_dtype != "float32":
        return step

    @functools.wraps(step)
    def precise(*args):
        with jax.default_matmul_precision("float32"):
            return step(*args)

    return precise
