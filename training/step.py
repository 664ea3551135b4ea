"""One training step and one evaluation step, as pure functions to be jitted."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import jax
import jax.numpy as jnp
import optax

from model.moe import RouterSums
from model.transformer import Description, Transformer
from parallel.context import zigzag
from parallel.pipeline.schedules import PipelineSchedule
from parallel.sharding import shard, splits
from runtime.platform import platform
from training.config import TrainConfig
from training.loss import LossSums, TokenLosses, chunked_losses, token_losses
from training.pipelined import cut, pipelined_gradients, pipelined_losses
from training.rounding import stored_as
from training.state import Monitor, TrainState
from training.trainable import Rule, Trainable, chosen, fixed, joined

SPIKE_DECAY = 0.98
WARM_MONITOR = 20  # steps before a spike is called one
BALANCE_BIAS = "layers/moe/router/balance_bias"


# tokens_BT, targets_BT, mask_BT; segments_BT, places_BT where documents are kept apart; what else a loss asks for, of
# each token (names that end in _BT; perhaps with more dims) or of each sequence (_BX)
Batch = Mapping[str, jax.Array]
Loss = Callable[[Transformer, jax.Array, Batch, TrainConfig], LossSums]  # of final hidden vectors x_BTD


def in_context_order(description: Description, batch: Batch) -> Batch:
    """The batch with its tokens where ring attention wants them, and their positions_BT (1, T).

    That is for causal models: in the order of the sequence the device with its end would have most of the work. Nothing
    but attention sees the order. Raises ValueError if T does not divide.
    """
    shards = splits("tokens")
    if shards == 1 or description.context_style != "ring" or not description.config.causal:
        return batch
    order_T = zigzag(batch["tokens_BT"].shape[1], shards)
    move = lambda x: shard(jnp.take(x, order_T, axis=1), "batch", "tokens", *(None,) * (x.ndim - 2))
    moved = {name: x if name.endswith("_BX") else move(x) for name, x in batch.items()}
    return moved | {"positions_BT": jnp.asarray(order_T)[None]}


def hidden(description: Description, config: TrainConfig, params, batch: Batch, keys_B=None):
    """The model, its final hidden vectors x_BTD of a batch, and its routers' sums; `keys_B` switch dropout on."""
    model = description.bind(params)
    x_BTD, _, router = model(
        batch["tokens_BT"],
        positions_BT=batch.get("positions_BT"),
        segments_BT=batch.get("segments_BT"),
        places_BT=batch.get("places_BT"),
        dropout_keys_B=keys_B,
        mask_BT=batch.get("mask_BT"),
        types_BT=batch.get("types_BT"),
        dtype=jnp.dtype(config.compute_dtype_on(platform())),
        remat=config.remat,
    )
    return model, x_BTD, router


def cross_entropy(model: Transformer, x_BTD: jax.Array, batch: Batch, config: TrainConfig) -> LossSums:
    """The loss of pretraining: of the targets that count, over the vocabulary."""
    return chunked_losses(model, x_BTD, batch["targets_BT"], batch["mask_BT"], config.loss_chunk)


def loss_sums(
    config: TrainConfig, batch: Batch, model: Transformer, x_BTD: jax.Array, router, loss: Loss = cross_entropy
) -> LossSums:
    """Loss sums of a batch, from what `hidden` returns."""
    return replace(loss(model, x_BTD, batch, config), router=router)


def gradients(
    description: Description,
    config: TrainConfig,
    params,
    batch: Batch,
    keys_B=None,
    schedule: PipelineSchedule | None = None,
    trainable: Trainable | None = None,
    loss: Loss = cross_entropy,
):
    """Loss sums of the whole batch and the gradient of the mean loss, auxiliary ones included, by microbatches.

    The gradient is that of what is `trainable`, a nested dict with those parameters alone.

    Every microbatch divides by the tokens of the whole batch, so cutting a batch does not change its gradient. With a
    pipeline's `schedule`, each accumulation step goes through it.
    """
    batch = in_context_order(description, batch)
    tokens = jnp.maximum(batch["mask_BT"].sum(), 1)

    trained = chosen(params, trainable)

    def objective(trained, batch, keys_B):
        params_of_all = joined(params, trained)
        sums = loss_sums(config, batch, *hidden(description, config, params_of_all, batch, keys_B), loss)
        return sums.objective(config.z_loss) / tokens, sums

    if schedule is None:
        gradient = jax.grad(objective, has_aux=True)
    else:
        rest = fixed(params, trainable)

        def gradient(trained, batch, keys_B):
            return pipelined_gradients(description, config, schedule, trained, rest, batch, keys_B, tokens, loss)

    if config.grad_accumulation == 1:
        grads, sums = gradient(trained, batch, keys_B)
        return sums, jax.tree.map(lambda g, p: g.astype(p.dtype), grads, trained)

    def body(carry, microbatch):
        sums, total = carry
        grads, new = gradient(trained, *microbatch)
        return (sums + new, jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, grads)), None

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), trained)
    parts = lambda x: cut(x, config.grad_accumulation)
    experts = description.config.experts
    none = LossSums.zero(RouterSums.zero(len(description.slots), experts) if experts else None)
    (sums, grads), _ = jax.lax.scan(body, (none, zeros), jax.tree.map(parts, (dict(batch), keys_B)))
    return sums, jax.tree.map(lambda g, p: g.astype(p.dtype), grads, trained)


def dropout_keys(description: Description, config: TrainConfig, state: TrainState) -> jax.Array | None:
    """A key for each sequence of this step's batch, (B,), or None where the model has no dropout."""
    if not description.config.dropout:
        return None
    key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    return jax.random.split(key, config.batch_size)


def _verdict(halted: jax.Array, loss: jax.Array, grad_norm: jax.Array, nonfinite: str) -> tuple[jax.Array, jax.Array]:
    """Whether a step's update is applied, and whether the run is halted from now on.

    A loss or norm that is not finite is not applied; with nonfinite=stop nothing after it is, either.
    """
    healthy = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    halted = halted | ~healthy if nonfinite == "stop" else halted
    return healthy & ~halted, halted


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


def balanced(params: dict, load_LE: jax.Array, speed: float) -> dict:
    """Moves every expert's bias by `speed`, up where it had less than its share of the batch, down where it had more
    (DeepSeek-V3, arXiv 2412.19437, section 2.1.2). Parameters are a nested dict; integer loads are equal on every mesh.
    """
    moe, router = params["layers"]["moe"], params["layers"]["moe"]["router"]
    bias_LE = router["balance_bias"]
    lacking_LE = load_LE.mean(1, keepdims=True) - load_LE
    bias_LE = bias_LE + (speed * jnp.sign(lacking_LE)).astype(bias_LE.dtype)
    return params | {"layers": params["layers"] | {"moe": moe | {"router": router | {"balance_bias": bias_LE}}}}


def router_metrics(description: Description, router: RouterSums, tokens: jax.Array) -> dict[str, jax.Array]:
    """What is logged of a batch's routers: load of the busiest expert over the mean one's, by layer and in the worst;
    share of assignments dropped; entropy of the scores in nats; what the auxiliary losses add to the loss.
    """
    config = description.config
    rows = jnp.asarray([description.slots.index(layer) for layer in range(config.layers)])
    router = jax.tree.map(lambda leaf: leaf[rows], router)
    load_L = router.load_E.max(1) / router.load_E.mean(1)
    routed = router.tokens.sum().astype(jnp.float32)
    return {
        "moe/load_max_over_mean": load_L.max(),
        "moe/load": load_L,
        "moe/dropped": router.dropped.sum() / (routed * config.experts_per_token),
        "moe/router_entropy": router.entropy.sum() / routed,
        "moe/auxiliary_loss": router.objective.sum() / tokens,
    }


def _auxiliary_metrics(
    description: Description, config: TrainConfig, sums: LossSums, tokens: jax.Array
) -> dict[str, jax.Array]:
    """What is logged of the losses beside the cross-entropy, where there are any."""
    found = {"train/z_loss": config.z_loss * sums.z / tokens} if config.z_loss else {}
    return found | ({} if sums.router is None else router_metrics(description, sums.router, tokens))


def _clipped(grads, clip_norm: float) -> tuple:
    """Gradients scaled down to the global norm `clip_norm` (0: as they are), and the float32 norm that they had."""
    norm = optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.float32), grads))
    scale = jnp.minimum(1.0, clip_norm / jnp.maximum(norm, 1e-30)) if clip_norm else 1.0
    return jax.tree.map(lambda g: (g * scale).astype(g.dtype), grads), norm


def make_train_step(
    description: Description,
    optimizer: optax.GradientTransformation,
    lr_schedule: Callable[[jax.Array], jax.Array],
    config: TrainConfig,
    clip_norm: float,
    schedule: PipelineSchedule | None = None,
    *,
    trainable: Trainable | None = None,
    loss: Loss = cross_entropy,
    rule: Rule | None = None,
    expose_gradients: bool = False,
) -> Callable:
    """The step (state, batch) -> (state, metrics); metrics are float32 under their logged names, scalars or, by layer,
    vectors.

    `schedule` is that of a pipeline, where the mesh has one. `optimizer` is made for the parameters that are
    `trainable`, and around it is the `rule` that adjusts them. With `expose_gradients` the step also returns the
    gradients before clipping.
    """

    def train_step(state: TrainState, batch: Batch):
        keys_B = dropout_keys(description, config, state)
        sums, raw = gradients(description, config, state.params, batch, keys_B, schedule, trainable, loss)
        tokens = jnp.maximum(batch["mask_BT"].sum(), 1)
        with jax.named_scope("clip"):
            mean = sums.nll / tokens
            grads, norm = _clipped(raw, clip_norm)

        with jax.named_scope("optimizer"):
            lr = lr_schedule(state.step)
            trained = chosen(state.params, trainable)
            direction, opt_state = optimizer.update(grads, state.opt_state, trained)
            params = jax.tree.map(lambda p, d: p.astype(jnp.float32) - lr * d, trained, direction)
            if description.config.balance_bias and (trainable is None or trainable(BALANCE_BIAS)):
                params = balanced(params, sums.router.load_E, description.config.balance_bias)
            if rule is not None:
                params = rule.adjust(trained, params, opt_state, state.step)
            params = stored_as(trained, params, state.step)

        apply, halted = _verdict(state.halted, mean, norm, config.nonfinite)
        monitor, signs = _watch(state.monitor, state.step, mean, norm, apply)
        # decided before anything is updated, so that the update is one pass over memory; what would overflow stays
        with jax.named_scope("optimizer"):
            keep = lambda new, old: jnp.where(apply & jnp.isfinite(new), new, old)
            params, opt_state = jax.tree.map(keep, (params, opt_state), (trained, state.opt_state))
            param_norm = optax.tree.norm(jax.tree.map(lambda p: p.astype(jnp.float32), params))
            params = joined(state.params, params)
        new_state = TrainState(
            step=state.step + jnp.where(halted, 0, 1),
            params=params,
            opt_state=opt_state,
            rng=state.rng,
            monitor=monitor,
            skipped=state.skipped + jnp.where(apply | halted, 0, 1),
            halted=halted,
        )
        metrics = {
            "train/loss": mean,
            "train/grad_norm": norm,
            "train/param_norm": param_norm,
            "train/lr": lr,
            "train/accuracy": sums.correct / tokens,
            "train/skipped": new_state.skipped.astype(jnp.float32),
            **signs,
            **_auxiliary_metrics(description, config, sums, tokens),
        }
        return (new_state, metrics, raw) if expose_gradients else (new_state, metrics)

    return in_float32_matmuls(train_step, config)


def make_eval_step(description: Description, config: TrainConfig, schedule: PipelineSchedule | None = None) -> Callable:
    """The step (params, batch, token_bytes_V) -> nats, tokens and bytes of the targets that count, float32 sums."""

    def eval_step(params, batch: Batch, token_bytes_V: jax.Array) -> dict[str, jax.Array]:
        batch = in_context_order(description, batch)
        if schedule is None:
            sums = loss_sums(config, batch, *hidden(description, config, params, batch))
        else:
            sums = pipelined_losses(description, config, schedule, params, batch, cross_entropy)
        bytes_BT = jnp.take(token_bytes_V, batch["targets_BT"]) * batch["mask_BT"]
        return {"nats": sums.nll, "tokens": batch["mask_BT"].sum(), "bytes": bytes_BT.sum()}

    return in_float32_matmuls(eval_step, config)


def make_token_loss_step(description: Description, config: TrainConfig) -> Callable:
    """The step (params, batch) -> training.loss.TokenLosses of each token, (B, T) in the batch's order.

    For parameters in the model's order of layers: those of a run with stages go through Job.for_inference first.
    """

    def token_loss_step(params, batch: Batch) -> TokenLosses:
        moved = in_context_order(description, batch)
        model, x_BTD, _ = hidden(description, config, params, moved)
        losses = token_losses(model, x_BTD, moved["targets_BT"], config.loss_chunk)
        if "positions_BT" not in moved or "positions_BT" in batch:
            return losses
        back_T = jnp.argsort(moved["positions_BT"][0])
        return jax.tree.map(lambda x: shard(jnp.take(x, back_T, axis=1), "batch", "tokens"), losses)

    return in_float32_matmuls(token_loss_step, config)


def in_float32_matmuls(step: Callable, config: TrainConfig) -> Callable:
    """Accelerators round float32 matmuls to fewer bits by default; a run in float32 means float32."""
    return jax.default_matmul_precision("float32")(step) if config.compute_dtype_on(platform()) == "float32" else step
