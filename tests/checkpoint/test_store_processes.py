"""Real processes: killed at random moments while they save; two that save and one that restores."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from checkpoint.store import CheckpointConfig, CheckpointStore
from runtime.ports import free_port

ROOT = Path(__file__).parents[2]

SAVE_FOREVER = """
import itertools, sys, jax, jax.numpy as jnp
from checkpoint.store import CheckpointConfig, CheckpointStore
store = CheckpointStore(sys.argv[1], CheckpointConfig(keep=1, keep_best=0))
state = {"w": jnp.arange(1 << 16, dtype=jnp.uint32), "n": jnp.uint32(0)}
restored = store.restore(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state))
state = restored.state if restored else state
advance = jax.jit(lambda s: {"w": s["w"] * jnp.uint32(1664525) + s["n"], "n": s["n"] + 1}, donate_argnums=0)
for step in itertools.count(restored.step + 1 if restored else 1):
    state = advance(state)
    assert store.save(step, state, {"step": step})
    print(step, flush=True)
"""

SAVE_AND_RESTORE_AS_ONE_OF_TWO = """
import sys, jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from checkpoint.store import CheckpointConfig, CheckpointStore
directory, port, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank)
mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
values = {"split": np.arange(64, dtype=np.float32).reshape(8, 8), "whole": np.arange(3), "n": np.int32(5)}
def put(name, value):
    sharding = NamedSharding(mesh, P("data") if name == "split" else P())
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])
state = {name: put(name, value) for name, value in values.items()}
blocked = CheckpointStore("/dev/null/checkpoints", CheckpointConfig())
assert blocked.save(1, state, {}) is False
store = CheckpointStore(directory, CheckpointConfig(every_minutes=1.0))
assert [store.due(step, 40.0 * step if rank == 0 else 0.0) for step in range(4)] == [False, False, True, False]
assert store.save(1, state, {"rank": rank})
assert store.save(2, state, {"rank": rank})
assert store.save(2, state, {}), "there already"
assert store.wait()
if rank == 0:
    with open(f"{directory}/00000002/manifest.json", "ab") as file:
        file.write(b" ")
abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
restored = store.restore(abstract)
assert (restored.step, restored.record) == (1, {"rank": 0})
for name, value in values.items():
    for shard in restored.state[name].addressable_shards:
        np.testing.assert_array_equal(shard.data, value[shard.index])
store.close()
print("done")
"""


def start(script, *arguments):
    command = [sys.executable, "-c", script, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    environment.pop("JAX_NUM_CPU_DEVICES", None)
    return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def state_after(step):
    w, n = np.arange(1 << 16, dtype=np.uint32), np.uint32(0)
    for _ in range(step):
        w, n = w * np.uint32(1664525) + n, n + np.uint32(1)
    return {"w": w, "n": n}


def test_killed_while_saving_the_newest_is_intact(tmp_path):
    moments = random.Random(0)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), state_after(0))
    newest = 0
    for _ in range(3):
        process = start(SAVE_FOREVER, tmp_path)
        printed = [int(process.stdout.readline()) for _ in range(4)]
        assert printed[0] == newest + 1, "it goes on from what was restored here"
        time.sleep(moments.uniform(0.0, 0.5))
        process.kill()
        begun = [*printed, *map(int, process.communicate()[0].split())][-1]
        store = CheckpointStore(tmp_path, CheckpointConfig())
        restored = store.restore(abstract)
        store.close()
        # save(begun) returned, so the one before it was complete; the kill may have come in the next call.
        assert begun - 1 <= restored.step <= begun + 1
        assert restored.record == {"step": restored.step}
        for name, value in state_after(restored.step).items():
            np.testing.assert_array_equal(restored.state[name], value)
        newest = restored.step


def test_two_processes_save_and_one_restores(tmp_path):
    port = free_port()
    processes = [start(SAVE_AND_RESTORE_AS_ONE_OF_TWO, tmp_path, port, rank) for rank in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert [output.split()[-1] for output in outputs] == ["done", "done"]
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:8])
    split, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    abstract = {
        "split": jax.ShapeDtypeStruct((8, 8), np.float32, sharding=split),
        "whole": jax.ShapeDtypeStruct((3,), np.int32, sharding=whole),
        "n": jax.ShapeDtypeStruct((), np.int32, sharding=whole),
    }
    store = CheckpointStore(tmp_path, CheckpointConfig())
    restored = store.restore(abstract)
    store.close()
    assert restored.step == 1
    np.testing.assert_array_equal(restored.state["split"], np.arange(64, dtype=np.float32).reshape(8, 8))
    np.testing.assert_array_equal(restored.state["whole"], np.arange(3))
    assert int(restored.state["n"]) == 5
