"""An axis in front of all others, over which copies of a run train apart: the seam that islands will hold on to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from every import few_of
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P
from meshes import MODELS

from config.compose import load
from parallel.mesh import AXES, make_mesh
from training.job import make_job
from training.parity import random_batch

ISLANDS = 2
INNER = [{"fsdp": 2, "tensor": 2}, {"data": 2, "fsdp": 2}]


def stacked(trees):
    return jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *trees)


@pytest.mark.parametrize("inner", few_of(INNER, INNER[:1]), ids=str)
def test_each_island_takes_the_step_that_it_would_take_alone(inner):
    cfg, sizes = load(MODELS["llama"]), dict.fromkeys(AXES, 1) | inner
    batches = [random_batch(cfg, i, slice(None)) for i in range(ISLANDS)]
    alone = make_mesh(sizes, jax.devices()[:4])
    with jax.set_mesh(alone):
        job = make_job(cfg, alone)
        states = [job.init(seed) for seed in range(ISLANDS)]
        begin = stacked(states)
        expected = stacked([job.step(state, batch) for state, batch in zip(states, batches, strict=True)])

    devices = np.asarray(jax.devices()[:8]).reshape(ISLANDS, *(sizes[axis] for axis in AXES))
    mesh = Mesh(devices, ("island", *AXES), axis_types=(AxisType.Auto,) * (1 + len(AXES)))
    with jax.set_mesh(mesh):
        step = make_job(cfg, mesh).pure_step()

        def of_island(state, batch):
            first = lambda tree: jax.tree.map(lambda leaf: leaf[0], tree)
            return jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], step(first(state), first(batch)))

        over = jax.shard_map(of_island, in_specs=P("island"), out_specs=P("island"), axis_names={"island"})
        found = jax.tree.map(np.asarray, jax.jit(over)(begin, stacked(batches)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)
    assert not np.array_equal(found[1]["train/loss"][0], found[1]["train/loss"][1])
