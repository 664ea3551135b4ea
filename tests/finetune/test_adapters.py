"""Adapters change nothing when they begin, compute what their merged matrices do, and train alike on every mesh."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from finetune.adapter_config import (
    AdaLoraConfig,
    BottleneckConfig,
    FreezeConfig,
    Ia3Config,
    LoraConfig,
    PrefixConfig,
)
from finetune.adapters.adalora import AdaLoraRule, Importance, pairs
from finetune.adapters.adaptation import adaptation, is_adapter, targets
from finetune.adapters.base import begun, in_base_forms
from finetune.adapters.matrices import ADAPTER
from finetune.adapters.merging import merge, unmerge
from model.config import ModelConfig
from model.specs import leaves
from model.transformer import describe
from parallel.mesh import AXES, make_mesh
from training.trainable import chosen, joined

DENSE = ModelConfig(
    layers=1, width=32, heads=4, kv_heads=2, head_dim=8, ffn=48, vocab_size=40, vocab_multiple=8, bias="all"
)
EXPERTS = replace(DENSE, experts=4, shared_experts=1, ffn=24, bias="none")
TOKENS_BT = np.random.default_rng(0).integers(0, 40, (4, 16)).astype(np.int32)
LORA = LoraConfig(rank=3)
KINDS = {
    "lora": LORA,
    "dora": replace(LORA, dora=True),
    "qlora": replace(LORA, base="nf4", group=8),
    "bfloat16": replace(LORA, base="bfloat16"),
    "qdora": replace(LORA, dora=True, base="int8"),
    "adalora": AdaLoraConfig(rank=2, initial_rank=3),
    "ia3": Ia3Config(),
    "int4 ia3": Ia3Config(base="int4", group=8),
    "bottleneck": BottleneckConfig(size=6),
    "prefix": PrefixConfig(length=3),
}


@pytest.fixture(autouse=True, scope="module")
def mesh():
    with jax.set_mesh(made := make_mesh(dict.fromkeys(AXES, 1), jax.devices()[:1])):
        yield made


@functools.cache
def begin(kind: str, model: ModelConfig = DENSE):
    """A model with adapters, its parameters as a run begins, and the base's in the forms that they are kept in."""
    mesh = jax.sharding.get_mesh()
    adapts, plain = adaptation(KINDS[kind], model, 10), describe(model)
    base = jax.jit(lambda: jax.tree.map(lambda p: p + 0.01, plain.init(jax.random.key(0))))()
    base = in_base_forms(adapts, plain, base, mesh)
    description = describe(model, forms=adapts.forms)
    drawn = chosen(jax.jit(description.init)(jax.random.key(0)), is_adapter)
    return description, begun(description, joined(base, drawn), mesh), describe(model, forms=adapts.base_forms), base


def stirred(params: dict, path: tuple[str, ...] = ()) -> dict:
    """The parameters with noise on their adapters, as training leaves them."""
    if not isinstance(params, dict):
        if ADAPTER not in path:
            return params
        noise = np.random.default_rng(len(str(path))).normal(size=params.shape)
        return params + jnp.asarray(0.1 * noise, params.dtype)
    return {name: stirred(value, (*path, name)) for name, value in params.items()}


def logits(description, params) -> np.ndarray:
    def run(params, tokens_BT):
        model = description.bind(params)
        return model.logits(model(tokens_BT, dtype=jnp.float32)[0])[..., : description.config.vocab_size]

    with jax.default_matmul_precision("float32"):
        return np.asarray(jax.jit(run)(params, jnp.asarray(TOKENS_BT)))


def assert_near(ours, theirs, relative=2e-6):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=relative * np.abs(theirs).max())


CASES = [*((kind, DENSE) for kind in KINDS), ("dora", EXPERTS), ("bottleneck", EXPERTS)]


@pytest.mark.parametrize(("kind", "model"), CASES, ids=[f"{kind}-{model.experts}" for kind, model in CASES])
def test_nothing_changes_at_first_and_a_merged_model_is_the_same(kind, model, mesh):
    description, params, plain, base = begin(kind, model)
    first = logits(plain, base)
    assert_near(logits(description, params), first, 1e-6)
    params = stirred(params)
    after = logits(description, params)
    assert np.abs(after - first).mean() > 1e-3 * np.abs(first).mean()
    if kind in ("bottleneck", "prefix"):
        with pytest.raises(ValueError, match="is no matrix, and cannot be merged"):
            merge(description, params, mesh)
        return
    merged = merge(description, params, mesh)
    assert not merged.description.forms
    assert_near(logits(merged.description, merged.params), after)
    adapters = chosen(params, is_adapter)
    if KINDS[kind].base not in ("float", "bfloat16"):
        with pytest.raises(ValueError, match="kept in codes, which are gone"):
            unmerge(merged, description, adapters)
        return
    back = unmerge(merged, description, adapters)
    jax.tree.map(lambda a, b: assert_near(np.asarray(a, np.float32), np.asarray(b, np.float32), 1e-6), back, params)


# ------------------------------------------------------------------------------------------------------------- AdaLoRA


def test_adalora_keeps_the_most_important_of_all_matrices():
    """With the importance of each value known, those that are left are the largest, as many as the budget says."""
    config = AdaLoraConfig(rank=2, initial_rank=4, begin=0.1, end=0.3)
    rule = AdaLoraRule(config, DENSE.layers, steps=10)
    specs = describe(DENSE, forms=adaptation(config, DENSE, 10).forms)
    params = chosen(jax.jit(specs.init)(jax.random.key(0)), is_adapter)
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda p: jnp.asarray(random.normal(size=p.shape), jnp.float32), params)
    seen = jax.tree.map(jnp.zeros_like, params)
    scores = [jnp.asarray(random.random(pair["values"].shape), jnp.float32) for pair in pairs(seen)]
    for pair, score in zip(pairs(seen), scores, strict=True):
        pair["values"] = score
    ones = jax.tree.map(jnp.ones_like, params)
    state = None, Importance(seen, ones)
    matrices = len(pairs(params)) * DENSE.layers
    left = []
    for step in range(10):
        after = rule.adjust(params, params, state, jnp.asarray(step))
        values = np.concatenate([np.asarray(pair["values"]).ravel() for pair in pairs(after)])
        flat = np.concatenate([np.asarray(score).ravel() for score in scores])
        left.append(int((values != 0).sum()))
        assert set(np.flatnonzero(values)) == set(np.argsort(-flat)[: left[-1]])
        params = after
    assert left[0] == 4 * matrices
    assert left == sorted(left, reverse=True)
    assert left[6:] == [2 * matrices] * 4  # the last three steps of ten change no rank


# --------------------------------------------------------------------------------------------------- what is refused


def test_a_quantised_base_loses_no_adapter():
    """The same parts have one, whatever their matrices are kept in."""

    def adapters(config):
        specs = describe(DENSE, forms=adaptation(config, DENSE, 9).forms).specs
        return sorted(path for path, _ in leaves(specs) if ADAPTER in path)

    for config in (LORA, Ia3Config(), BottleneckConfig(size=4), PrefixConfig()):
        assert adapters(config) == adapters(replace(config, base="int4", group=8))


def test_what_does_not_fit_is_one_clear_line():
    with pytest.raises(ValueError, match=r"no matrix matches ffn/q; there are attention/query, "):
        targets(("ffn/q",), DENSE)
    with pytest.raises(ValueError, match=r"no parameter matches lora/\*; there are tokens/weight"):
        adaptation(FreezeConfig(train=("lora/*",)), DENSE, 10)
    with pytest.raises(ValueError, match=r"adapter.initial_rank=4 must be at least adapter.rank=8"):
        AdaLoraConfig(initial_rank=4)
    for base in ("nf4", "bfloat16"):
        with pytest.raises(ValueError, match=rf"layers/ffn/up/weight is kept in {base}, .* adapter.base=float"):
            adaptation(LoraConfig(base=base, group=8, also=("final_norm/*", "layers/ffn/up/*")), DENSE, 10)
    with pytest.raises(ValueError, match=r"has no groups of 64"):
        adaptation(LoraConfig(base="nf4"), replace(DENSE, head_dim=6), 10)


@pytest.mark.parametrize(("rank", "share"), [(4, 4), (3, 1)], ids=["divides", "does not divide"])
@pytest.mark.parametrize("model", [DENSE, EXPERTS], ids=["dense", "experts"])
def test_both_thin_matrices_are_split_over_fsdp(model, rank, share):
    """That with a width dim is split there, the other one in its rank, where the mesh divides that."""
    mesh = make_mesh(dict.fromkeys(AXES, 1) | {"fsdp": 4}, jax.devices()[:4])
    description = describe(model, forms=adaptation(LoraConfig(rank=rank), model, 10).forms)
    shapes, places = (chosen(tree, is_adapter) for tree in (description.shapes, description.shardings(mesh)))
    specs = dict(leaves(chosen(description.specs, is_adapter)))
    parts = jax.tree.map(
        lambda shape, place: np.prod(shape.shape) // np.prod(place.shard_shape(shape.shape)), shapes, places
    )
    assert {path: 4 if "width" in spec.axes else share for path, spec in specs.items()} == dict(leaves(parts))
