"""A choice of parameters is trained: the rest stays to the bit, and costs neither gradients nor moments."""

import functools

import jax
import numpy as np
import pytest
from meshes import MODELS

from config import compose
from parallel.mesh import make_mesh
from parallel.sharding import put_batch
from training.job import make_job
from training.parity import ONE_DEVICE, named, random_batch
from training.trainable import chosen, joined, matching

PATTERNS = ("layers/attention/query/*", "final_norm/*")


@functools.cache
def after_two_steps(patterns=None, model: str = "llama", **sizes: int):
    """Parameters before and after, first gradients, and bytes of temporaries and of state."""
    cfg = compose.load([*MODELS[model], "optimizer=adamw", *(["pipeline.schedule=1f1b"] if "pipe" in sizes else [])])
    mesh = make_mesh(ONE_DEVICE | sizes, jax.devices()[: int(np.prod([1, *sizes.values()]))])
    with jax.set_mesh(mesh):
        trainable = matching(patterns, make_job(cfg, mesh).description.specs) if patterns else None
        job = make_job(cfg, mesh, trainable)
        batches = [put_batch(mesh, random_batch(cfg, i, slice(None)), cfg.train.batch_size) for i in range(2)]
        step, state = job.compile(job.step_and_gradients, batches[0]), job.init(0)
        moments = sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state))
        start, first = named(job.to_stored(state.params)), None
        for batch in batches:
            state, _, grads = step(state, batch)
            first = grads if first is None else first
        memory = job.step.lower(job.abstract, batches[0]).compile().memory_analysis()
        if job.schedule is not None:
            first = chosen(job.to_stored(joined(state.params, first)), trainable)
        return start, named(job.to_stored(state.params)), named(first), memory.temp_size_in_bytes, moments


@pytest.mark.parametrize("sizes", [{}, {"fsdp": 2, "tensor": 2}, {"pipe": 2}], ids=str)
def test_what_is_frozen_stays_and_the_rest_has_its_gradient(sizes):
    start, end, gradients, _, _ = after_two_steps(PATTERNS, **sizes)
    every = after_two_steps(None)[2]
    assert set(gradients) == {"layers.attention.query.weight", "final_norm.scale"}
    for name, p in end.items():
        assert np.array_equal(p, start[name]) == (name not in gradients), name
    for name, gradient in gradients.items():
        error = np.linalg.norm(gradient - every[name]) / np.linalg.norm(every[name])
        assert error < 1e-5, (name, error)


def test_it_takes_less_memory():
    """Moments of what is trained alone; and no gradients of the rest among the temporaries."""
    start, _, gradients, temporaries, moments = after_two_steps(PATTERNS)
    _, _, _, all_temporaries, all_moments = after_two_steps(None)
    size = sum(gradient.nbytes for gradient in gradients.values())
    assert 2 * size <= moments < 2 * size + 64
    assert all_moments >= 2 * sum(p.nbytes for p in start.values())
    assert temporaries < all_temporaries


def test_the_bias_that_balances_experts_can_be_frozen():
    start, end, *_ = after_two_steps(("layers/attention/query/*",), "moe")
    for name, p in end.items():
        assert np.array_equal(p, start[name]) == (name != "layers.attention.query.weight"), name


def test_a_pattern_without_a_parameter_is_one_clear_line():
    with pytest.raises(ValueError, match=r"no parameter matches lora/\*; there are tokens/weight"):
        matching(["lora/*"], {"tokens": {"weight": None}})
