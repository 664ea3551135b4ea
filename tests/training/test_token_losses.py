"""Losses token by token: those of whole logits, in the batch's order, on every mesh; their sums are the step's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from every import few_of
from meshes import MODELS

from config.compose import load
from parallel.mesh import AXES, make_mesh
from training.job import make_job
from training.parity import ONE_DEVICE, random_batch
from training.step import make_token_loss_step

MESHES = [{"tensor": 2, "fsdp": 2}, {"context": 4}, {"context": 2, "tensor": 2}, {"pipe": 2, "data": 2}]


def losses(cfg, batch, sizes):
    mesh = make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
    with jax.set_mesh(mesh):
        job = make_job(cfg, mesh)
        with job.for_inference(job.init(0).params) as (description, params):
            return jax.tree.map(np.asarray, jax.jit(make_token_loss_step(description, cfg.train))(params, batch))


@pytest.mark.parametrize("mesh", few_of(MESHES, MESHES[-2:]), ids=str)
def test_each_token_has_the_loss_that_the_whole_logits_give_it(mesh):
    cfg = load([*MODELS["llama"], "train.loss_chunk=4", "data.segments=true"])
    batch = random_batch(cfg, 0, slice(None))
    found = losses(cfg, batch, dict.fromkeys(AXES, 1) | mesh)
    one = make_mesh(ONE_DEVICE, jax.devices()[:1])
    with jax.set_mesh(one):
        job = make_job(cfg, one)
        state, description = job.init(0), job.description
        model = description.bind(state.params)
        extra = {name: batch[name] for name in ("segments_BT", "places_BT")}
        logits = jax.jit(lambda tokens: model.logits(model(tokens, **extra)[0]))(batch["tokens_BT"])
        log_p = jax.nn.log_softmax(logits[..., : cfg.model.vocab_size])
        expected = -jnp.take_along_axis(log_p, jnp.asarray(batch["targets_BT"])[..., None], axis=-1)[..., 0]
        _, metrics = job.step(state, batch)
    np.testing.assert_allclose(found.nll_BT, expected, rtol=2e-5, atol=1e-5)
    mean = (found.nll_BT * batch["mask_BT"]).sum() / batch["mask_BT"].sum()
    np.testing.assert_allclose(mean, metrics["train/loss"], rtol=1e-5)


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_a_document_in_a_packed_row_is_what_it_is_alone(positions):
    """Its logits do not depend on where in the row it stands."""
    cfg = load([*MODELS["llama"], f"model.positions={positions}", "data.segments=true"])
    one = make_mesh(ONE_DEVICE, jax.devices()[:1])
    T, half = cfg.train.seq_len, cfg.train.seq_len // 2
    tokens = np.random.default_rng(0).integers(0, 250, (1, T), dtype=np.int32)
    at_T = np.arange(T, dtype=np.int32)[None]
    with jax.set_mesh(one):
        job = make_job(cfg, one)
        model = job.description.bind(job.init(0).params)
        packed = model(tokens, segments_BT=at_T // half, places_BT=at_T % half)[0]
        alone = model(tokens[:, half:])[0]
    np.testing.assert_allclose(packed[:, half:], alone, rtol=1e-5, atol=1e-5)
