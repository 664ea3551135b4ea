"""A tiny run on its own text, and its compression."""

import jax
import pytest

from checkpoint.config import CheckpointConfig
from checkpoint.store import CheckpointStore
from config.compose import to_yaml
from config.schema import Config, RunConfig, finish
from data.corpus import DataConfig
from model.config import ModelConfig
from model.transformer import describe
from runtime.config import RuntimeConfig
from tests.runs import corpus
from training.config import TrainConfig

MODEL = ModelConfig(layers=2, width=32, heads=4, kv_heads=2, head_dim=8, ffn=48, vocab_multiple=1)


@pytest.fixture(autouse=True, scope="session")
def _fast_compile():
    """Tiny programs run once: compiling them is most of the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A run directory with one checkpoint, of weights that give each token its own logits."""
    path = tmp_path_factory.mktemp("compress") / "run"
    text = corpus(path.parent / "text")
    data = DataConfig(source="text", path=f"{text}/*.txt", heldout=0.2, cache=str(path.parent / "cache"))
    runtime = RuntimeConfig(compile_cache=None, platform="cpu", cpu_devices=8)
    train = TrainConfig(seq_len=64)
    config = finish(Config(model=MODEL, data=data, runtime=runtime, train=train, run=RunConfig(dir=str(path))))
    path.mkdir()
    (path / "config.yaml").write_text(to_yaml(config))
    description = describe(config.model)
    draw = lambda: jax.tree.map(lambda p: 3 * p if p.ndim > 1 else p, description.init(jax.random.key(0)))
    store = CheckpointStore(path / "checkpoints", CheckpointConfig(asynchronous=False))
    assert store.save(7, {"params": jax.jit(draw)()}, {}, metric=1.0)
    store.close()
    return path
