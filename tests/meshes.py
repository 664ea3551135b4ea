"""Small models of every kind, and the assertion that a mesh trains one of them as one device does."""

import functools
import math
from collections.abc import Mapping

import numpy as np

from config import compose, layout
from parallel.mesh import AXES, MeshConfig, resolve
from training import parity

SHAPE = ["train.seq_len=16", "train.batch_size=24", "train.steps=10", "optimizer.warmup_steps=2", "model.layers=2"]
MODELS = {
    # grouped queries, rotary positions, gated ffn, one table
    "llama": [*SHAPE, "model.width=48", "model.heads=8", "model.kv_heads=2", "model.head_dim=8", "model.ffn=96"],
    # learned positions, biases, dropout, two tables, and a vocabulary that no mesh divides
    "gpt2": [
        *SHAPE,
        *("model.width=48", "model.heads=8", "model.kv_heads=8", "model.head_dim=6", "model.ffn=96"),
        *("model.positions=learned", "model.norm=layer", "model.bias=all", "model.activation=gelu"),
        *("model.dropout=0.1", "model.tied_embeddings=false", "model.vocab_size=257", "model.vocab_multiple=1"),
    ],
    # six heads, for meshes of 3 and 6; sandwich norms, windows, soft-caps, packed documents, microbatches
    "gemma": [
        *SHAPE,
        *("model.width=48", "model.heads=6", "model.kv_heads=3", "model.head_dim=8", "model.ffn=96"),
        *("model.norm_position=both", "model.window=5", "model.window_pattern=LG", "model.attention_softcap=20"),
        *("model.logit_softcap=10", "model.qk_norm=true", "model.embedding_scale=true", "data.segments=true"),
        *("train.grad_accumulation=2", "train.loss_chunk=4", "train.z_loss=0.001", "train.remat=full"),
        "train.seq_len=18",
    ],
    # what published families ask for: both halves of a block beside each other, norms of each half's output and of all
    # heads, a share of the dims that turns, other angles in local layers, kinds of tokens, a layer before the logits
    "families": [
        *SHAPE,
        *("model.width=48", "model.heads=4", "model.kv_heads=2", "model.head_dim=8", "model.ffn=96"),
        *("model.norm=layer", "model.bias=all", "model.parallel_block=true", "model.norm_position=output"),
        *("model.rope_fraction=0.5", "model.rope_theta_local=50", "model.window=5", "model.window_pattern=LG"),
        *("model.embedding_norm=true", "model.norm_plus_one=true", "model.qk_norm=true", "model.qk_norm_dims=all"),
        *("model.head=masked_lm", "model.token_types=2", "model.activation=gelu_exact", "train.loss_chunk=4"),
        *("model.vocab_size=257", "model.vocab_multiple=1", "optimizer=adamw"),
    ],
    # a mixture of experts with auxiliary losses, a shared expert and a router that is balanced by its bias
    "moe": [
        *SHAPE,
        *("model=moe_nano", "model.width=48", "model.heads=4", "model.kv_heads=2", "model.head_dim=12"),
        *("model.experts=8", "model.ffn=32", "model.vocab_multiple=8", "optimizer=adamw"),
    ],
}


@functools.cache
def one_device(model: str, *extra: str) -> parity.Trace:
    """The run to compare with; `extra` are overrides that change the numbers, such as the number of layers."""
    return parity.trace(compose.load([*MODELS[model], *extra]), parity.ONE_DEVICE)


def assert_changes_nothing(model: str, mesh: Mapping[str, int], *how: str, extra: tuple[str, ...] = ()) -> None:
    """Trains `model` on `mesh` and on one device. `how` are overrides that must not matter, such as a schedule."""
    cfg = compose.load([*MODELS[model], *extra, *how])
    asked = MeshConfig(**dict.fromkeys(AXES, 1) | dict(mesh))
    sizes = resolve(asked, math.prod(mesh.values()), layout.requirements(cfg))
    ours, one = parity.trace(cfg, sizes), one_device(model, *extra)
    np.testing.assert_allclose(ours.losses, one.losses, rtol=1e-5)
    assert len(set(one.losses)) == len(one.losses)  # the steps did something
    for name, start in one.start.items():
        rows = min(len(start), len(ours.start[name]))  # padding of the vocabulary may differ
        assert np.array_equal(ours.start[name][:rows], start[:rows]), name
        assert not np.any(ours.start[name][rows:]), name
    errors = parity.relative_errors(ours.gradients, one.gradients)
    assert max(errors.values()) < 1e-5, max(errors.items(), key=lambda item: item[1])
    lines, good = parity.report(ours, one)
    assert good, lines
