"""The cache of an engine whose size nobody said: four long sequences, or what there is memory for."""

import jax
import pytest
from engines import REACH, opened

from inference import room
from inference.engine import Engine
from inference.engine_options import EngineOptions
from model.block_cache import make_pool
from runtime import memory
from runtime.memory import free_bytes


@pytest.mark.parametrize("dtype", ["", "int8"])
def test_a_token_takes_what_the_arrays_take(dtype):
    """On one device, and on two that share the heads."""
    model, tokens = opened("grouped"), 48
    with jax.set_mesh(model.mesh):
        pool = make_pool(model.config.model, tokens, dtype or model.dtype)
    held = 2 * model.config.model.layers * sum(x.nbytes for x in jax.tree.leaves(pool))
    assert room.bytes_a_token(model, dtype) * tokens == held
    assert room.bytes_a_token(opened("grouped", (("tensor", 2),)), dtype) * tokens == held / 2


@pytest.mark.parametrize(
    ("reach", "free", "tokens"),
    [
        (100, float("inf"), 400),
        (50_000, float("inf"), 65_536),
        (70_000, float("inf"), 70_000),
        (100, 2 * 10 * 250, 250),  # half of the memory
        (100, 2 * 10 * 100, 100),
    ],
)
def test_room(reach, free, tokens):
    assert room.room_for(reach, 10.0, free) == tokens


def test_no_room_for_one_sequence_is_told_with_the_length_that_fits():
    with pytest.raises(ValueError, match=r"100 tokens x 1.0 KiB.*set max_length=99 or less, or say cache_tokens"):
        room.room_for(100, 1024.0, 2 * 1024 * 99.5)


def test_an_engine_minds_the_memory(monkeypatch):
    model = opened("grouped")
    token = room.bytes_a_token(model, "")
    monkeypatch.setattr(room, "free_bytes", lambda: 2 * token * (REACH + 9))
    assert Engine(model).cache_tokens == REACH + 9
    assert Engine(model, EngineOptions(cache_tokens=REACH + 29)).cache_tokens == REACH + 29  # as it was asked for
    drafted = EngineOptions(speculation="draft", max_length=REACH // 2)
    assert Engine(model, drafted, draft=model).cache_tokens == (REACH + 9) // 2  # two caches of the same blocks


@pytest.mark.parametrize(
    "sizes",
    [
        {"cache_tokens": 10**12},
        {"max_running": 10**8},
        {"chunk": 10**10},
        {"max_adapters": 2, "max_adapter_rank": 10**9},
    ],
    ids=str,
)
def test_sizes_beyond_the_memory_are_told_by_their_option(sizes, monkeypatch):
    monkeypatch.setattr(room, "free_bytes", lambda: 2.0**34)
    with pytest.raises(ValueError, match=rf"{' x '.join(sizes)}=\d+ takes .* GiB at least, and 16 GiB are free"):
        Engine(opened("grouped"), EngineOptions(**sizes))


def test_free_memory_is_that_of_the_machine_and_of_the_container(tmp_path, monkeypatch):
    assert 2**20 < free_bytes() * jax.device_count() < 2**50
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("3000\n")
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.stat").write_text("anon 500\nactive_file 100\ninactive_file 300\n")  # files can be read again
    assert free_bytes() * jax.device_count() == 2400
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes() * jax.device_count() > 2**20
