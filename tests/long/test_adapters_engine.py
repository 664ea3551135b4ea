"""A model with adapters answers through the engine, whose layers are unstacked, as `generate` does."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from engines import REACH, ask, opened, references

from finetune.adapter_config import BottleneckConfig, Ia3Config, LoraConfig, PrefixConfig
from finetune.adapters.adaptation import adaptation, is_adapter
from finetune.adapters.base import begun, in_base_forms
from inference.engine import Engine
from inference.engine_options import EngineOptions
from model.transformer import describe
from training.trainable import chosen, joined

KINDS = {
    "dora": LoraConfig(rank=3, dora=True),
    "qlora": LoraConfig(rank=3, base="nf4", group=8),
    "ia3": Ia3Config(),
    "bottleneck": BottleneckConfig(size=8),
    "prefix": PrefixConfig(length=4),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mesh", [(), (("fsdp", 2), ("tensor", 2))], ids=str)
def test_the_engine_answers_as_generate(kind, mesh):
    plain = opened("grouped", mesh)
    model = plain.config.model
    adapts = adaptation(KINDS[kind], model, 10)
    with jax.set_mesh(plain.mesh):
        description = describe(model, forms=adapts.forms)
        base = in_base_forms(adapts, plain.description, plain.params, plain.mesh)
        drawn = chosen(jax.jit(description.init)(jax.random.key(1)), is_adapter)
        noise = np.random.default_rng(0)
        drawn = jax.tree.map(lambda p: p + 0.1 * noise.normal(size=p.shape).astype(np.float32), drawn)
        params = begun(description, joined(base, drawn), plain.mesh)
    tuned = replace(plain, description=description, params=params)
    prompts = [tuple(np.random.default_rng(seed).integers(0, 256, 5 + 7 * seed).tolist()) for seed in range(4)]
    engine = Engine(tuned, EngineOptions(max_running=4, block=4, chunk=16, cache_tokens=2 * REACH))
    engine.start()
    try:
        for prompt, text in zip(prompts, references(tuned, prompts), strict=True):
            tokens = ask(engine, str(len(prompt)), prompt, max_tokens=24).tokens()
            assert tokens[: len(text)] == text
            assert len(text) > 4
    finally:
        assert engine.stop(10)
