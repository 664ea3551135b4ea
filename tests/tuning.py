"""Tiny tasks on any mesh: what a run of a task computes, to be compared with one device."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from config import compose
from finetune.opening import open_subject
from parallel.mesh import make_mesh
from training.job import make_job
from training.parity import ONE_DEVICE, named, relative_errors

SMALL = (
    *("model.layers=2", "model.width=32", "model.heads=4", "model.kv_heads=4", "model.head_dim=8", "model.ffn=64"),
    *("train.seq_len=32", "train.batch_size=8", "train.steps=10", "optimizer=adamw", "optimizer.warmup_steps=2"),
    "sample.tokens=0",
)
ENCODER = (*SMALL, "model.causal=false", "model.positions=learned", "model.max_positions=32", "model.token_types=2")


@dataclass(frozen=True)
class Traced:
    """What a short run of a task computed."""

    losses: list[float]
    gradients: dict[str, np.ndarray]  # of the first step
    metrics: dict[str, float]  # of the held-out rows after the last step, with their loss


def trace(arguments: list[str], steps: int = 2, **sizes: int) -> Traced:
    """A few steps of a task on a mesh of these sizes, and its evaluation."""
    config = compose.load([*arguments, *(["pipeline.schedule=1f1b"] if "pipe" in sizes else [])])
    mesh = make_mesh(ONE_DEVICE | sizes, jax.devices()[: int(np.prod([1, *sizes.values()]))])
    with jax.set_mesh(mesh):
        subject = open_subject(config, mesh)
        job = make_job(subject.config, mesh, loss=subject.loss)
        with tempfile.TemporaryDirectory() as folder:
            subject.begin(job, lambda: job.init(0).params, Path(folder))
        batch = subject.feed.batch(0)
        step, state, losses, first = job.compile(job.step_and_gradients, batch), job.init(0), [], None
        for number in range(steps):
            state, metrics, grads = step(state, subject.feed.batch(number))
            losses.append(float(metrics["train/loss"]))
            first = named(job.to_stored(grads)) if first is None else first
        found = subject.judge(job, batch).evaluate(state.params)
        return Traced(losses, first, {**found.metrics, "loss": found.loss})


def assert_same(ours: Traced, one: Traced, *without: str) -> None:
    """Losses, gradients and metrics differ by rounding only; `without`: gradients that are nothing but rounding."""
    np.testing.assert_allclose(ours.losses, one.losses, rtol=1e-5)
    assert len(set(one.losses)) == len(one.losses)  # the steps did something
    errors = relative_errors(ours.gradients, one.gradients)
    for name in without:
        assert np.abs(one.gradients[name]).max() < 1e-6
        del errors[name]
    assert max(errors.values()) < 1e-5, max(errors.items(), key=lambda item: item[1])
    assert ours.metrics.keys() == one.metrics.keys()
    for name, value in one.metrics.items():
        np.testing.assert_allclose(ours.metrics[name], value, rtol=1e-4, err_msg=name)
