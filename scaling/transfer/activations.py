"""A coordinate check's measurements: how large activations are, and how far they move in the first steps of a run.

In a good parametrization neither depends on the width, so that one learning rate suits all widths
(arXiv 2203.03466, appendix D.1).
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from model.config import ModelConfig
from model.transformer import Description, block_of, rows_of
from parallel.sharding import local_rows, put_batch, replicated
from training.job import Job
from training.step import in_context_order


def at_width(model: ModelConfig, width: int) -> ModelConfig:
    """The model at another width: heads of the same size, of which there are more, and ffn in proportion.

    Raises ValueError if a number does not come out whole.
    """
    sizes = {name: getattr(model, name) * width for name in ("heads", "kv_heads", "ffn")}
    for name, size in sizes.items():
        if size % model.width or not size:
            scaled = f"model.{name} = {getattr(model, name)} * {width} / {model.width}"
            raise ValueError(f"width {width} of a model of width {model.width}: {scaled} is not a whole number above 0")
    return replace(model, width=width, **{name: size // model.width for name, size in sizes.items()})


def activations(description: Description, params: dict, batch: dict) -> dict[str, jax.Array]:
    """By name: the residual stream (B, T, D) after the embedding and each block, the head's input (B, T, D), and the
    logits (B, T, V). All are float32, whatever the run computes in.
    """
    model, config = description.bind(params), description.config
    info = model.info(batch["tokens_BT"], batch.get("positions_BT"))
    embedded_BTD = model.embed(batch["tokens_BT"], info, jnp.float32)
    block = block_of(description.block)

    def body(x_BTD, layer):
        parameters, row = layer
        x_BTD = block(parameters, x_BTD, row, info)[0]
        return x_BTD, x_BTD

    x_BTD, blocks_LBTD = jax.lax.scan(body, embedded_BTD, (params["layers"], rows_of(config, range(config.layers))))
    x_BTD = model.finish(x_BTD)
    logits_BTV = model.logits(x_BTD)[..., : config.vocab_size]
    return dict(zip(_names(config), (embedded_BTD, *blocks_LBTD, x_BTD, logits_BTV), strict=True))


def _names(config: ModelConfig) -> list[str]:
    """In the order of the forward pass; the last layer has the same name at every depth."""
    return ["embedding", *(f"layer {i + 1}" for i in range(config.layers - 1)), "last layer", "head input", "logits"]


def measure(job: Job, seeds: int, steps: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Trains on one batch of random tokens, with the job's mesh in context, from `seeds` seeds, which are averaged.

    Returns, by name, root mean squares (steps + 1,) of activations before each step and after the last, and those
    (steps,) of their change since the first step.
    """
    mesh, description = job.mesh, job.stored_description
    look = jax.jit(lambda params, batch: activations(description, params, in_context_order(description, batch)))

    @partial(jax.jit, out_shardings=replicated(mesh))
    def rms(now: dict, then: dict) -> dict:
        return jax.tree.map(lambda a, b: jnp.sqrt(jnp.mean(jnp.square(a - b))), now, then)

    step, sizes, changes = job.step, [], []
    for seed in range(seeds):
        batch, state = _batch(job, seed), job.init(seed)
        first = look(job.to_stored(state.params), batch)
        zero = jax.tree.map(jnp.zeros_like, first)
        sizes.append([rms(first, zero)])
        changes.append([])
        for _ in range(steps):
            state, _ = step(state, batch)
            now = look(job.to_stored(state.params), batch)
            sizes[-1].append(rms(now, zero))
            changes[-1].append(rms(now, first))
    mean = lambda runs: {
        name: np.mean([[float(row[name]) for row in run] for run in runs], axis=0) for name in _names(job.model)
    }
    return mean(sizes), mean(changes)


def _batch(job: Job, seed: int) -> dict[str, jax.Array]:
    """One batch of random tokens, all of which count."""
    train, random = job.train, np.random.default_rng(seed)
    tokens = random.integers(0, job.model.vocab_size, (train.batch_size, train.seq_len + 1), dtype=np.int32)
    rows = {"tokens_BT": tokens[:, :-1], "targets_BT": tokens[:, 1:]}
    rows["mask_BT"] = np.ones(rows["tokens_BT"].shape, np.float32)
    mine = local_rows(job.mesh, train.batch_size)
    return put_batch(job.mesh, {name: x[mine] for name, x in rows.items()}, train.batch_size)
