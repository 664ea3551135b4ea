"""A damaged checkpoint is named and never loaded: every file in turn, flipped, cut, removed, added."""

import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoint.digests import MANIFEST, find_damage, read_manifest, seal, write_manifest
from checkpoint.store import CheckpointConfig, CheckpointError, CheckpointStore

OLD, NEW = 7, 9


def state_of(step):
    return {"w": jax.random.normal(jax.random.key(step), (32, 8)), "m": {"count": jnp.int32(step)}}


def abstract_state():
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), state_of(0))


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    directory = tmp_path_factory.mktemp("pristine")
    store = CheckpointStore(directory, CheckpointConfig(keep=2))
    for step in (OLD, NEW):
        assert store.save(step, state_of(step), {"cursor": step})
    store.close()
    return directory


@pytest.fixture
def directory(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "checkpoints")


def files_of(directory, step=NEW):
    folder = directory / f"{step:08d}"
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(content)


def assert_falls_back(directory, caplog, named, **config):
    """The newest is named with what is wrong, and the one before is restored bitwise."""
    caplog.clear()
    store = CheckpointStore(directory, CheckpointConfig(**config))
    restored = store.restore(abstract_state())
    store.close()
    assert (restored.step, restored.record) == (OLD, {"cursor": OLD})
    for found, wanted in zip(jax.tree.leaves(restored.state), jax.tree.leaves(state_of(OLD)), strict=True):
        np.testing.assert_array_equal(found, wanted)
    warnings = [record.getMessage() for record in caplog.records if record.name == "isomesh.checkpoint"]
    assert len(warnings) == 1
    assert f"step {NEW}" in warnings[0]
    assert named in warnings[0]


def test_a_flipped_bit_in_every_file(directory, caplog):
    random = np.random.default_rng(0)
    for path in files_of(directory):
        content = path.read_bytes()
        flip(path, int(random.integers(8 * len(content))))
        assert_falls_back(directory, caplog, path.relative_to(directory / f"{NEW:08d}").as_posix())
        path.write_bytes(content)


def test_every_file_cut_short_missing_and_longer(directory, caplog):
    for path in files_of(directory):
        content = path.read_bytes()
        name = path.relative_to(directory / f"{NEW:08d}").as_posix()
        for damaged in (content[:-1], content[: len(content) // 2], b"", content + b"\0"):
            path.write_bytes(damaged)
            assert_falls_back(directory, caplog, name, verify=False)  # seen without reading any contents
        path.unlink()
        assert_falls_back(directory, caplog, f"{name} is missing" if name == MANIFEST else f"{name}: missing")
        path.write_bytes(content)


def test_a_file_that_was_not_written(directory, caplog):
    (directory / f"{NEW:08d}" / ".left-by-a-file-browser").write_bytes(b"")
    store = CheckpointStore(directory, CheckpointConfig())
    assert store.restore(abstract_state()).step == NEW
    store.close()
    (directory / f"{NEW:08d}" / "arrays" / "d" / "0123").write_bytes(b"half a")
    assert_falls_back(directory, caplog, "arrays/d/0123: not part of it")


def test_a_folder_under_the_name_of_another_step(directory, caplog):
    shutil.rmtree(directory / f"{NEW:08d}")
    shutil.copytree(directory / f"{OLD:08d}", directory / f"{NEW:08d}")
    assert_falls_back(directory, caplog, f"its manifest is that of step {OLD}")


def test_none_usable_is_one_line_that_names_all(directory):
    for step in (OLD, NEW):
        flip(files_of(directory, step)[0], 3)
    store = CheckpointStore(directory, CheckpointConfig())
    with pytest.raises(CheckpointError, match=rf"no usable checkpoint in .*step {NEW} \(.*step {OLD} \(") as error:
        store.restore(abstract_state())
    assert "\n" not in str(error.value)


def test_a_first_save_that_did_not_finish_is_named_and_is_no_checkpoint(directory, caplog):
    (directory / f"{NEW:08d}").rename(directory / f"{NEW:08d}.partial")
    assert_falls_back(directory, caplog, "its save did not finish")
    shutil.rmtree(directory / f"{OLD:08d}")
    store = CheckpointStore(directory, CheckpointConfig())
    with caplog.at_level(logging.WARNING):
        assert store.restore(abstract_state()) is None
    assert "step 9 is partial" in caplog.text
    assert store.steps() == []
    assert store.save(NEW, state_of(NEW), {})
    store.close()
    assert store.steps() == [NEW]


def test_a_damaged_step_is_written_anew(directory):
    flip(max(files_of(directory), key=lambda path: path.stat().st_size), 1000)
    store = CheckpointStore(directory, CheckpointConfig())
    assert store.restore(abstract_state()).step == OLD
    assert store.save(NEW, state_of(NEW), {"again": True})
    restored = store.restore(abstract_state())
    store.close()
    assert (restored.step, restored.record) == (NEW, {"again": True})
    np.testing.assert_array_equal(restored.state["w"], state_of(NEW)["w"])


def test_a_flipped_bit_in_every_byte_of_a_manifest(tmp_path):
    (tmp_path / "data").write_bytes(b"abc")
    body = {"step": 1, "record": {"name": "naïve", "x": [1.5, None]}, "files": seal(tmp_path)}
    write_manifest(tmp_path, body)
    assert read_manifest(tmp_path) == body
    path = tmp_path / MANIFEST
    content = path.read_bytes()
    for byte in range(len(content)):
        flip(path, 8 * byte + byte % 7)
        with pytest.raises(ValueError, match="is damaged"):
            read_manifest(tmp_path)
        path.write_bytes(content)


def test_every_single_bit_of_a_file(tmp_path):
    path = tmp_path / "folder" / "data"
    path.parent.mkdir()
    path.write_bytes(bytes(range(16)))
    files = seal(tmp_path)
    assert find_damage(tmp_path, files, contents=True) == []
    for bit in range(8 * 16):
        flip(path, bit)
        assert find_damage(tmp_path, files, contents=True) == ["folder/data: its digest differs"]
        flip(path, bit)
