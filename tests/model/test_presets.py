"""Presets have their true sizes, and their training steps lower for meshes that are not there."""

import math
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from config.compose import load
from config.layout import requirements
from model.counts import parameter_count
from model.transformer import describe
from parallel.mesh import AXES, MeshConfig, abstract_mesh, resolve
from parallel.sharding import batch_sharding
from training.optimizer import learning_rate, make_optimizer
from training.state import abstract_state
from training.step import make_train_step

PUBLISHED = {
    "gpt2_124m": 124_439_808,
    "gpt2_1b5": 1_557_611_200,
    "llama_1b": 1_235_814_400,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "qwen3_0b6": 596_049_920,
    "qwen3_8b": 8_190_735_360,
    "gemma2_2b": 2_614_341_888,
    "mixtral_8x7b": 46_702_792_704,
    "qwen3_30b_a3b": 30_532_122_624,
}
ACTIVE = {"mixtral_8x7b": 12.9e9, "qwen3_30b_a3b": 3.3e9}  # published, in billions to one digit
OURS = {"nano", "moe_nano", "deepseek_v3_like"}
PRESETS = sorted(path.stem for path in (Path(__file__).parents[2] / "conf" / "model").glob("*.yaml"))
DEVICES = 16

config_of = cache(
    lambda preset: load([f"model={preset}", "train.batch_size=16", "train.seq_len=64", "train.compute_dtype=bfloat16"])
)


def test_every_large_preset_has_a_published_count():
    assert set(PRESETS) == set(PUBLISHED) | OURS


@pytest.mark.parametrize("preset", PUBLISHED)
def test_parameter_count_is_the_published_one(preset):
    assert parameter_count(config_of(preset).model).total == PUBLISHED[preset]


@pytest.mark.parametrize("preset", PUBLISHED)
def test_active_parameters_are_the_published_ones(preset):
    count = parameter_count(config_of(preset).model)
    assert count.active == pytest.approx(ACTIVE.get(preset, count.total), abs=0.06e9)


@pytest.mark.parametrize("preset", PRESETS)
def test_parameter_count_is_what_the_model_has(preset):
    config = config_of(preset).model
    description, count = describe(config), parameter_count(config)
    size = lambda tree: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
    shapes = description.shapes
    tables = [shapes[name]["weight"] for name in ("tokens", "head") if name in shapes]
    padding = sum((table.shape[0] - config.vocab_size) * config.width for table in tables)
    assert count.total == size(shapes) - padding
    assert count.layers == size(shapes["layers"])


def legal_sizes(preset: str) -> dict[str, int]:
    """fsdp = 8, tensor = 2 where that is legal for the preset, else fsdp = 16."""
    for tensor in (2, 1):
        try:
            return resolve(MeshConfig(fsdp=-1, tensor=tensor), DEVICES, requirements(config_of(preset)))
        except ValueError:
            continue
    raise AssertionError(f"no mesh of {DEVICES} devices for {preset}")


@pytest.mark.parametrize("preset", PRESETS)
def test_training_step_lowers_on_a_mesh_without_devices(preset):
    """State and batch are shapes with shardings: nothing is allocated, and no device of the mesh exists."""
    config, mesh = config_of(preset), abstract_mesh(legal_sizes(preset))
    assert set(mesh.shape) == set(AXES)
    train = config.train
    with jax.sharding.use_abstract_mesh(mesh):
        description = describe(config.model)
        optimizer = make_optimizer(config.optimizer, description.specs)
        state = abstract_state(mesh, description, optimizer, jnp.dtype(train.param_dtype))
        schedule = learning_rate(config.optimizer, train.steps)
        step = make_train_step(description, optimizer, schedule, train, config.optimizer.clip_norm)
        array = lambda dtype: jax.ShapeDtypeStruct((16, 64), dtype, sharding=batch_sharding(mesh))
        batch = {"tokens_BT": array(jnp.int32), "targets_BT": array(jnp.int32), "mask_BT": array(jnp.float32)}
        text = jax.jit(step, donate_argnums=0).trace(state, batch).lower(lowering_platforms=("tpu",)).as_text()
    assert f"mhlo.num_partitions = {DEVICES}" in text
    width = config.model.width
    stored = [leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(state.params)]
    whole = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params))
    assert sum(map(math.prod, stored)) < whole / DEVICES * 1.1 + 20 * width * config.model.layers
