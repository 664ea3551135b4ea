"""The mesh is not a hyperparameter, for models with experts: losses, gradients, updates and what routers log."""

import functools

import jax
import numpy as np
import pytest
from every import few_of

from config import compose, schema
from parallel.mesh import make_mesh
from parallel.sharding import local_rows, put_batch
from training import parity
from training.job import make_job

SHAPE = [
    *("train.seq_len=16", "train.batch_size=16", "train.steps=10", "optimizer.warmup_steps=2", "model.layers=2"),
    *("model.width=32", "model.heads=4", "model.kv_heads=2", "model.head_dim=8", "model.ffn=16", "model.experts=8"),
    "model.scan_layers=true",
]
MODELS = {
    # as Mixtral, dropless, with both auxiliary losses
    "mixtral": [*SHAPE, "optimizer=adamw", "model.balance_loss=0.01", "model.router_z_loss=0.001"],
    # as DeepSeek-V3, with drops, packed documents, microbatches, remat, dropout
    "deepseek": [
        *SHAPE,
        *("model.router_scores=sigmoid", "model.shared_experts=1", "model.experts_per_token=3"),
        *("model.router_groups=4", "model.router_groups_per_token=2", "model.router_scale=2.5"),
        *("model.balance_bias=0.01", "model.balance_loss=0.001", "model.expert_capacity=0.75", "model.dropout=0.1"),
        *("data.segments=true", "train.grad_accumulation=2", "train.remat=full", "optimizer=adamw"),
    ],
}
CASES = [
    *(("mixtral", axes) for axes in ({"expert": 2}, {"expert": 4}, {"tensor": 4}, {"expert": 4, "fsdp": 2})),
    *((model, {"expert": 4, "tensor": 2}) for model in MODELS),
    *((model, {"expert": 2, "data": 2, "fsdp": 2}) for model in MODELS),
    ("deepseek", {"expert": 2, "context": 2, "tensor": 2}),
]


def routed(cfg: schema.Config, sizes: dict) -> dict[str, np.ndarray]:
    """What the first step logs of its routers."""
    mesh = make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
    batch_size = cfg.train.batch_size
    with jax.set_mesh(mesh):
        job = make_job(cfg, mesh)
        batch = put_batch(mesh, parity.random_batch(cfg, 0, local_rows(mesh, batch_size)), batch_size)
        metrics = job.step(job.init(cfg.seed), batch)[1]
    return {name: np.asarray(value) for name, value in metrics.items() if name.startswith("moe/")}


@functools.cache
def one_device(model: str):
    cfg = compose.load(MODELS[model])
    return parity.trace(cfg, parity.ONE_DEVICE), routed(cfg, parity.ONE_DEVICE)


def spelled(value) -> str:
    return value if isinstance(value, str) else "x".join(f"{n}{axis}" for axis, n in value.items())


FEW = [("mixtral", {"expert": 4, "fsdp": 2})]
LONG = [("deepseek", {"expert": 2, "context": 2, "tensor": 2})]


@pytest.mark.parametrize(("model", "axes"), few_of(CASES, FEW, LONG), ids=spelled)
def test_mesh_changes_nothing(model, axes):
    one, _ = one_device(model)
    ours = parity.trace(compose.load(MODELS[model]), parity.ONE_DEVICE | axes)
    np.testing.assert_allclose(ours.losses, one.losses, rtol=1e-5)
    lines, good = parity.report(ours, one)
    assert good, lines


def test_routers_log_the_same_assignments():
    axes = {"expert": 2, "context": 2, "tensor": 2}
    _, logged = one_device("deepseek")
    theirs = routed(compose.load(MODELS["deepseek"]), parity.ONE_DEVICE | axes)
    for name in ("moe/load", "moe/load_max_over_mean", "moe/dropped"):  # whole numbers: the same assignments
        np.testing.assert_array_equal(theirs[name], logged[name], err_msg=name)
    for name in ("moe/router_entropy", "moe/auxiliary_loss"):
        np.testing.assert_allclose(theirs[name], logged[name], rtol=1e-5, err_msg=name)


def test_what_is_compared_is_there():
    _, mixtral = one_device("mixtral")
    trace, deepseek = one_device("deepseek")
    assert mixtral["moe/dropped"] == 0
    assert deepseek["moe/dropped"] > 0.1
    assert np.ptp(deepseek["moe/load"]) > 0
    assert min(mixtral["moe/auxiliary_loss"], deepseek["moe/auxiliary_loss"]) > 1e-3
    bias = trace.end["layers.moe.router.balance_bias"]
    assert 0.009 < np.abs(bias).max() <= 0.0301  # three steps
