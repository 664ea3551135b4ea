"""Saving and restoring: bitwise on every mesh, retention, intervals, errors of the file system."""

import json
import logging
import resource
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from checkpoint.store import CheckpointConfig, CheckpointError, CheckpointStore

MESHES = [(8, 1), (2, 4), (4, 2), (1, 1)]


class Extra(NamedTuple):
    flags: jax.Array
    nothing: tuple


def mesh_of(shape):
    devices = jax.devices()[: shape[0] * shape[1]]
    return jax.make_mesh(shape, ("data", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=devices)


def make_state(mesh, seed=0):
    """A state with every kind of leaf: sharded, replicated, scalar, empty; seven dtypes."""
    random = np.random.default_rng(seed)
    put = lambda array, *spec: jax.device_put(array, NamedSharding(mesh, P(*spec)))
    parameters = {
        "embed": put(random.standard_normal((16, 8)).astype(np.float32), "data", "tensor"),
        "layers": {"w": put(jnp.asarray(random.standard_normal((2, 8, 8)), jnp.bfloat16), None, "tensor", "data")},
        "bias": put(np.array([0.0, -0.0, np.nan, np.inf, 1e-45, -1, 2, 3], np.float32), "tensor"),
    }
    return {
        "parameters": parameters,
        "optimizer": jax.tree.map(lambda x: put(x), optax.adamw(1e-3).init(parameters)),
        "step": put(np.int32(seed)),
        "key": put(random.integers(0, 2**32, 2, dtype=np.uint32)),
        "extra": Extra(flags=put(random.integers(0, 2, 8).astype(bool), ("data",)), nothing=()),
        "bytes": put(random.integers(0, 256, (8, 3), dtype=np.uint8)),
        "half": put(random.standard_normal(5).astype(np.float16)),
        "none": put(np.zeros((0, 4), np.float32)),
    }


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_same(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


@pytest.fixture
def open_store(tmp_path):
    stores = []

    def make(directory=tmp_path / "checkpoints", **config):
        stores.append(CheckpointStore(directory, CheckpointConfig(**config)))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


def test_bitwise_from_every_mesh_to_every_mesh(open_store):
    store = open_store(keep=len(MESHES))
    states = {shape: make_state(mesh_of(shape)) for shape in MESHES}
    for step, state in enumerate(states.values()):
        assert store.save(step, state, {"cursor": [step, 0.1]})
    assert store.wait()
    for step in range(len(MESHES)):
        for wanted in states.values():
            restored = store.restore(abstract(wanted), before=step + 1)
            assert (restored.step, restored.record) == (step, {"cursor": [step, 0.1]})
            assert_same(restored.state, wanted)
            same = jax.tree.map(lambda one, other: one.sharding == other.sharding, restored.state, wanted)
            assert all(jax.tree.leaves(same))


def test_what_was_saved_is_what_was_there_even_if_donated_at_once(open_store):
    store = open_store(keep=3)
    sharding = NamedSharding(mesh_of((8, 1)), P("data"))
    step = jax.jit(lambda x: x + 1, donate_argnums=0, out_shardings=sharding)
    state = step(jax.device_put(jnp.zeros((8, 1 << 18)), sharding))
    for n in range(3):
        assert store.save(n, {"x": state}, {})
        for _ in range(3):
            state = step(state)
    for n in range(3):
        restored = store.restore(abstract({"x": state}), before=n + 1).state["x"]
        np.testing.assert_array_equal(restored, np.full((8, 1 << 18), 1 + 3 * n, np.float32))


def test_nothing_there_is_none_and_touches_nothing(open_store, tmp_path):
    store = open_store()
    assert store.restore({"x": jax.ShapeDtypeStruct((1,), jnp.float32)}) is None
    assert store.steps() == []
    assert not (tmp_path / "checkpoints").exists()


def test_retention_keeps_the_newest_and_the_best(open_store):
    store = open_store(keep=2, keep_best=1, asynchronous=False)
    state = {"x": jnp.arange(8.0)}
    kept = []
    for step, metric in enumerate([3.0, 1.0, None, float("nan"), 2.0, 0.5, 0.5]):
        assert store.save(step, state, {}, metric=metric)
        kept.append(store.steps())
    assert kept == [[0], [0, 1], [1, 2], [1, 2, 3], [1, 3, 4], [4, 5], [5, 6]]


def test_going_back_keeps_what_is_saved_then(open_store):
    store = open_store(keep=1, keep_best=0, asynchronous=False)
    state = {"x": jnp.arange(8.0)}
    for step in (10, 20, 15):
        assert store.save(step, state, {})
    assert store.steps() == [15, 20]
    assert store.restore(abstract(state), before=20).step == 15
    assert store.save(25, state, {})
    assert store.steps() == [25]


def test_saving_an_intact_step_again_changes_nothing(open_store, tmp_path):
    store = open_store()
    first, second = ({"x": jnp.full(8, value)} for value in (1.0, 2.0))
    assert store.save(3, first, {"n": 1})
    assert store.save(3, second, {"n": 2})
    restored = store.restore(abstract(first))
    assert restored.record == {"n": 1}
    assert_same(restored.state, first)


def test_due_by_steps_and_by_minutes(open_store):
    by_steps = open_store(every=3)
    assert [step for step in range(10) if by_steps.due(step, now=0.0)] == [3, 6, 9]
    by_minutes = open_store(every_minutes=1.0)
    assert [step for step in range(20) if by_minutes.due(step, now=100.0 + 25 * step)] == [3, 6, 9, 12, 15, 18]
    both = open_store(every=5, every_minutes=1.0)
    assert [step for step in range(14) if both.due(step, now=25.0 * step)] == [3, 5, 8, 10, 13]
    assert not any(open_store().due(step, now=1e9 * step) for step in range(10))


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"every": -1}, "checkpoint.every=-1 must be at least 0"),
        ({"every_minutes": float("nan")}, "checkpoint.every_minutes=nan must be at least 0"),
        ({"keep": 0}, "checkpoint.keep=0 must be at least 1"),
        ({"keep_best": -2}, "checkpoint.keep_best=-2 must be at least 0"),
        ({"resume": "yes"}, "checkpoint.resume=yes is unknown; choose auto, never or require"),
    ],
)
def test_config_refuses(field, message):
    with pytest.raises(ValueError, match=message):
        CheckpointConfig(**field)


# ---- another model --------------------------------------------------------------------------------------------------


def leaf(shape, dtype=jnp.float32, mesh=(1, 1), *spec):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh_of(mesh), P(*spec)))


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"a": {"w": leaf((4, 9))}, "b": leaf((3,))}, r"a/w is float32 \(4, 8\) there and float32 \(4, 9\) here"),
        ({"a": {"w": leaf((4, 8), jnp.bfloat16)}, "b": leaf((3,))}, r"a/w is float32 \(4, 8\) there and bfloat16"),
        ({"a": {"w": leaf((4, 8))}, "b": leaf((3,)), "c": leaf(())}, r"c is missing there and float32 \(\) here"),
        ({"a": {"w": leaf((4, 8))}}, r"b is float32 \(3,\) there and missing here"),
    ],
)
def test_another_model_is_a_clear_error_and_no_damage(open_store, caplog, wanted, message):
    store = open_store()
    store.save(1, {"a": {"w": jnp.ones((4, 8))}, "b": jnp.ones(3)}, {})
    store.save(2, {"a": {"w": jnp.ones((4, 8))}, "b": jnp.ones(3)}, {})
    with pytest.raises(ValueError, match=message) as error:
        store.restore(wanted)
    assert not isinstance(error.value, CheckpointError)
    assert "\n" not in str(error.value)
    assert not caplog.records


@pytest.mark.parametrize("mesh", MESHES)
def test_padding_is_made_up_and_cut_off(open_store, mesh):
    store = open_store(keep=2)
    values = np.arange(1, 10 * 3 + 1, dtype=np.float32).reshape(10, 3)
    for rows in (12, 16):
        padded = np.pad(values, ((0, rows - 10), (0, 0)))
        store.save(rows, {"embed": jnp.asarray(padded), "head": jnp.asarray(padded.T)}, {})
    for saved in (12, 16):
        for rows in (16, 24):
            wanted = {"embed": leaf((rows, 3), jnp.float32, mesh, "data"), "head": leaf((3, rows), jnp.float32, mesh)}
            state = store.restore(wanted, before=saved + 1, resize=lambda path: path in ("embed", "head")).state
            np.testing.assert_array_equal(state["embed"], np.pad(values, ((0, rows - 10), (0, 0))))
            np.testing.assert_array_equal(state["head"], np.pad(values, ((0, rows - 10), (0, 0))).T)
            assert state["embed"].sharding == wanted["embed"].sharding


def test_padding_of_a_size_that_no_mesh_axis_divides_is_cut(open_store):
    store = open_store()
    store.save(1, {"embed": jnp.pad(jnp.ones((8, 2)), ((0, 5), (0, 0)))}, {})
    state = store.restore({"embed": leaf((8, 2), jnp.float32, (4, 2), "data", "tensor")}, resize=lambda _: True).state
    np.testing.assert_array_equal(state["embed"], np.ones((8, 2)))


def test_values_are_never_cut_off(open_store):
    store = open_store()
    store.save(1, {"embed": jnp.ones((16, 2))}, {})
    with pytest.raises(ValueError, match=r"embed cannot be cut to \(8, 2\): there are values beyond it"):
        store.restore({"embed": leaf((8, 2))}, resize=lambda path: path == "embed")
    with pytest.raises(ValueError, match="another model"):
        store.restore({"embed": leaf((8, 2))}, resize=lambda path: path == "other")


# ---- a file system that refuses -------------------------------------------------------------------------------------


def test_a_path_that_cannot_be_written_is_told_in_one_line(open_store, tmp_path, caplog):
    (tmp_path / "file").write_text("not a folder")
    store = open_store(tmp_path / "file" / "checkpoints")
    with caplog.at_level(logging.INFO, "isomesh.checkpoint"):
        assert store.save(1, {"x": jnp.ones(4)}, {}) is False
    assert len(caplog.records) == 1
    (message,) = store.poll()
    assert message.startswith("step 1 was not saved: NotADirectoryError")
    assert store.poll() == []
    assert store.restore({"x": leaf((4,))}) is None


def test_too_little_space_is_told_before_anything_is_written(open_store, tmp_path, monkeypatch):
    store = open_store()
    state = {"x": jnp.zeros(250_000)}
    assert store.save(1, state, {})
    assert store.wait()
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=999_999))
        assert store.save(2, state, {}) is False
    (message,) = store.poll()
    assert message.startswith("step 2 was not saved: OSError: [Errno 28] 1.0 MB to write, 1.0 MB free")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["00000001"]


class Disk:
    """Instead of shutil.disk_usage: a disk of `slots` checkpoints."""

    def __init__(self, directory, state, slots):
        self.directory, self.size = directory, sum(x.nbytes for x in jax.tree.leaves(state))
        self.slots = slots

    def __call__(self, _):
        return SimpleNamespace(free=(self.slots - len(list(self.directory.glob("????????")))) * self.size)


def test_what_nothing_keeps_makes_room_where_what_stays_is_whole(open_store, tmp_path, monkeypatch):
    """A run with checkpoint.keep=1 finds three checkpoints of one that kept more, on a disk that holds no fourth."""
    state, directory = {"x": jnp.arange(1024.0)}, tmp_path / "checkpoints"
    before = open_store(keep=3)
    for step, metric in ((1, 5.0), (2, 1.0), (3, 4.0)):
        assert before.save(step, state, {}, metric=metric)
    before.wait()
    monkeypatch.setattr("shutil.disk_usage", Disk(directory, state, slots=3))
    store = open_store(keep=1, keep_best=1)
    assert store.save(4, state, {})
    assert store.wait()
    assert store.steps() == [2, 4]  # 2 is the best; 3 stayed until 4 was whole
    assert store.poll() == []


@pytest.mark.parametrize("keep", [1, 2])
def test_room_is_never_made_of_the_last_whole_checkpoint(open_store, tmp_path, monkeypatch, keep):
    state, directory = {"x": jnp.arange(1024.0)}, tmp_path / "checkpoints"
    store = open_store(keep=2, keep_best=0)
    for step in (1, 2):
        assert store.save(step, state, {})
    store.wait()
    manifest = directory / "00000002" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes() + b" ")
    monkeypatch.setattr("shutil.disk_usage", Disk(directory, state, slots=2))
    store = open_store(keep=keep, keep_best=0)
    assert store.save(3, state, {})
    assert store.wait()
    assert store.steps() == ([3] if keep == 1 else [1, 3])  # the damaged one made room
    for step in store.steps():
        assert store.restore(abstract(state), before=step + 1).step == step
    monkeypatch.setattr("shutil.disk_usage", Disk(directory, state, slots=len(store.steps())))
    (directory / f"{store.steps()[-1]:08d}" / "manifest.json").write_text("{}")
    left = sorted(path.name for path in directory.iterdir())
    assert store.save(4, state, {}) is (keep == 2)  # nothing whole would stay: nothing is removed
    assert store.wait() is (keep == 2)
    if keep == 1:
        assert sorted(path.name for path in directory.iterdir()) == left
        assert str(directory) in store.poll()[0]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_full_disk_leaves_the_checkpoint_before(open_store, tmp_path, asynchronous):
    """A limit on the size of files makes every write behind it fail, as a full disk does."""
    store = open_store(asynchronous=asynchronous, keep=1)
    small = {"x": jnp.arange(8.0)}
    assert store.save(1, small, {})
    store.wait()
    large = {"x": jax.random.normal(jax.random.key(0), (1 << 18,))}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        began = store.save(2, large, {})
        whole = store.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (began, whole) == (asynchronous, False)
    (message,) = store.poll()
    assert message.startswith("step 2 was not saved: ")
    assert "\n" not in message
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["00000001"]
    assert_same(store.restore(abstract(small)).state, small)
    assert store.save(2, large, {}), "the disk has room again"
    assert store.wait()
    assert store.steps() == [2]
    assert_same(store.restore(abstract(large)).state, large)


def test_an_error_while_sealing_leaves_the_checkpoint_before(open_store, tmp_path, monkeypatch):
    store = open_store()
    state = {"x": jnp.arange(8.0)}
    store.save(1, state, {})
    store.wait()

    def refuse(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("checkpoint.store.write_manifest", refuse)
        assert store.save(2, state, {})
        assert not store.wait()
    place = tmp_path / "checkpoints"
    assert store.poll() == [f"step 2 was not saved: OSError: [Errno 28] No space left on device ({place})"]
    assert store.steps() == [1]


def test_the_record_is_taken_at_the_time_of_the_call(open_store):
    store = open_store()
    record = {"cursor": 1, "config": {"train": {"lr": 3e-4, "mesh": [1, 2]}, "name": "naïve"}}
    written = json.loads(json.dumps(record))
    store.save(1, {"x": jnp.ones(1)}, record)
    record["cursor"] = 2
    assert store.restore({"x": leaf((1,))}).record == written
