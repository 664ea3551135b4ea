"""Hardware FLOPs: what is computed again, by hand and against the matmuls of the traced step."""

import math
from dataclasses import replace
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params
from jax.interpreters import partial_eval

from model import attention
from model.config import ModelConfig
from model.counts import flops_per_token
from model.transformer import describe
from parallel import experts as expert_dispatch
from performance import flops
from performance.flops import count_flops
from training.config import TrainConfig
from training.step import gradients

SMALL = {"layers": 2, "width": 16, "heads": 4, "kv_heads": 2, "head_dim": 8, "ffn": 24, "vocab_size": 32}
MODEL = ModelConfig(**SMALL, vocab_multiple=1, causal=False)  # masked scores are multiplied too, and not counted
MOE = replace(MODEL, experts=4, experts_per_token=2, shared_experts=1)
TOKENS = 16


def matmul_flops(jaxpr) -> int:
    """Of all matmuls of a jaxpr, those in loops as often as they run."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += 2 * eqn.outvars[0].aval.size * math.prod(shape[dim] for dim in contracted)
        elif eqn.primitive.name.startswith("ragged_dot"):  # rows or, for a weight, pairs of them
            rows = eqn.invars[0].aval.shape[0]
            total += 2 * rows * expert_matrix(eqn)
        for inner in jaxprs_in_params(eqn.params):
            total += eqn.params.get("length", 1) * matmul_flops(inner)
    return total


def expert_matrix(eqn) -> int:
    (E,) = eqn.invars[2].aval.shape
    return max(v.aval.size for v in (*eqn.invars[:2], *eqn.outvars) if v.aval.shape[0] == E and v.aval.ndim == 3) // E


def traced(model: ModelConfig, train: TrainConfig) -> float:
    """FLOPs of a token, as the step's gradients do them."""
    description = describe(model)
    tokens = jax.ShapeDtypeStruct((train.batch_size, train.seq_len), jnp.int32)
    batch = {"tokens_BT": tokens, "targets_BT": tokens, "mask_BT": jax.ShapeDtypeStruct(tokens.shape, jnp.float32)}
    with mock.patch.object(expert_dispatch, "_implementation", return_value="ragged"):  # no padding rows
        closed = jax.make_jaxpr(lambda params, batch: gradients(description, train, params, batch))(
            description.shapes, batch
        )
    jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    return matmul_flops(jaxpr) / (train.batch_size * train.seq_len)


def counted(model: ModelConfig, train: TrainConfig) -> flops.Flops:
    mesh = jax.make_mesh((1,), ("context",))
    return count_flops(model, train, mesh, "ring", packed=False)


TRAIN = TrainConfig(batch_size=2, seq_len=TOKENS, loss_chunk=0)


@pytest.mark.parametrize("remat", ["none", "full", "dots", "attention"])
@pytest.mark.parametrize(
    "model",
    [MODEL, replace(MODEL, norm_position="both", activation="gelu"), MOE],
    ids=["pre", "both", "experts"],
)
def test_hardware_flops_are_those_of_the_traced_step(model, remat):
    train = replace(TRAIN, remat=remat)
    again = traced(model, train) - traced(model, TRAIN)
    assert counted(model, train).hardware - counted(model, TRAIN).hardware == pytest.approx(again)


@pytest.mark.parametrize("remat", ["none", "full", "dots", "attention"])
def test_chunks_of_attention_and_of_the_loss_are_counted(remat, monkeypatch):
    monkeypatch.setattr(attention, "QUERY_CHUNK", 4)
    monkeypatch.setattr(flops, "QUERY_CHUNK", 4)
    train = replace(TRAIN, remat=remat, loss_chunk=8)
    assert counted(MODEL, train).hardware == pytest.approx(traced(MODEL, train))


def test_a_soft_cap_has_scores_computed_again():
    model = replace(MODEL, attention_softcap=30.0)
    assert counted(model, TRAIN).hardware == pytest.approx(traced(model, TRAIN))


def test_nothing_again_makes_hfu_equal_mfu_whatever_else_is_set():
    for model in (MODEL, MOE, replace(MODEL, causal=True, window=3)):
        for train in (TRAIN, replace(TRAIN, grad_accumulation=2, compute_dtype="bfloat16")):
            found = counted(model, train)
            assert found.hardware == found.model == flops_per_token(model, TOKENS)
            assert found.full_attention == flops_per_token(model, TOKENS, full_attention=True) >= found.model


def test_full_remat_is_four_thirds_where_weights_are_all():
    """Of 6 FLOPs a parameter, 2 forward are done again: of every matrix if a norm reads the last one's result."""
    wide = replace(MODEL, width=4096, head_dim=4096 // 4, ffn=8192, vocab_size=2, norm_position="both", kv_heads=4)
    found = counted(wide, replace(TRAIN, remat="full", seq_len=1))
    assert found.hardware / found.model == pytest.approx(4 / 3, rel=1e-3)
    pre = replace(wide, norm_position="pre")  # the down projection need not: 4 D^2 + 3 D F = 4 + 6 parts, less 2
    found = counted(pre, replace(TRAIN, remat="full", seq_len=1))
    assert found.hardware / found.model == pytest.approx(1 + (1 / 3) * 8 / 10, rel=1e-3)
