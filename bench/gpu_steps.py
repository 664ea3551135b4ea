"""The works of bench/gpu.py, and a process of isomesh that times one: python bench/gpu_steps.py '{"work": ..., ...}'.

Without a work it times a matmul. Prints one JSON line.
"""

import contextlib
import fcntl
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from config import compose, layout

COMMON = ("optimizer=adamw", "train.compute_dtype=bfloat16", "train.steps=1000", "mesh.fsdp=-1")
EXPERTS = (
    # 0.98e9 parameters, 0.23e9 of them active
    *("model.width=1024", "model.heads=16", "model.kv_heads=8", "model.ffn=1024", "model.rope_scaling.kind=none"),
    *("model.experts=16", "model.experts_per_token=2", "model.balance_loss=0.01"),
)
TINY = (
    *("model.layers=2", "model.width=64", "model.heads=4", "model.kv_heads=2", "model.head_dim=16", "model.ffn=64"),
    *("model.vocab_size=512", "model.vocab_multiple=64"),
)


@dataclass(frozen=True)
class Try:
    """Sequences a step and GPU, what is recomputed, and for isomesh further overrides."""

    batch: int
    remat: str = "none"
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Work:
    """A model to train, its marks in tokens/s, and what to try; the twin knows remat none and full."""

    model: tuple[str, ...]
    seq_len: int
    mark: float | None
    aim: float | None
    ours: tuple[Try, ...]
    twin: tuple[Try, ...]
    twin_param_dtype: str = "float32"


UNROLLED, LEAN = ("model.scan_layers=false",), ("optimizer.moment_dtype=bfloat16",)
WORKS = {
    "gpt2_124m": Work(
        ("model=gpt2_124m",), 1024, 460e3, None,
        ours=(Try(32, "none", UNROLLED), Try(64, "none", UNROLLED), Try(16, "none", UNROLLED), Try(32)),
        twin=(Try(32), Try(64), Try(16)),
    ),
    "gpt2_1b5": Work(
        ("model=gpt2_1b5",), 1024, 47e3, None,
        ours=(Try(16, "none", UNROLLED), Try(16), Try(16, "attention"), Try(32, "dots"), Try(8, "none", UNROLLED)),
        twin=(Try(16), Try(8), Try(32, "full")),
    ),
    "llama3_8b": Work(
        ("model=llama3_8b",), 8192, 6.7e3, 7.9e3,
        ours=(
            Try(1, "dots", (*UNROLLED, *LEAN)), Try(1, "attention", LEAN),
            Try(1, "full", LEAN), Try(2, "attention", LEAN),
        ),
        twin=(Try(1, "full"), Try(2, "full"), Try(1)),
        twin_param_dtype="bfloat16",  # 16 bytes a parameter, as float32 needs, leave no room for activations
    ),
    "moe_1b": Work(
        ("model=llama_1b", *EXPERTS), 1024, None, None,
        ours=(Try(16, "none", UNROLLED), Try(16), Try(32, "attention"), Try(32)),
        twin=(Try(16), Try(32)),
    ),
}  # fmt: skip


# ----------------------------------------------------------------------------------------------- a process of isomesh


def overrides_of(work: Work, attempt: Try, devices: int, tiny: bool) -> list[str]:
    """The config of a try of isomesh, as train.py takes it."""
    sizes = (*TINY, f"train.seq_len={min(work.seq_len, 64)}") if tiny else (f"train.seq_len={work.seq_len}",)
    batch = (f"train.batch_size={attempt.batch * devices}", f"train.remat={attempt.remat}")
    return [*COMMON, *work.model, *sizes, *batch, *attempt.overrides]


def train(given: dict) -> dict:
    """Times steps on random tokens. Waits for a line on stdin, once it has compiled, where `given` has a lock."""
    import jax

    from parallel.mesh import make_mesh
    from parallel.sharding import put_batch
    from runtime.config import RuntimeConfig
    from runtime.start import start
    from training.job import make_job
    from training.parity import random_batch

    start(RuntimeConfig(platform=given["platform"]))
    devices = jax.devices()
    attempt = Try(given["batch"], given["remat"], tuple(given["overrides"]))
    cfg = compose.load(overrides_of(WORKS[given["work"]], attempt, len(devices), given["tiny"]))
    mesh = make_mesh(layout.mesh_sizes(cfg, len(devices)), devices)
    with jax.set_mesh(mesh), contextlib.ExitStack() as stack:
        with compiling(given):
            job = make_job(cfg, mesh)
            rows = random_batch(cfg, 0, slice(0, cfg.train.batch_size))
            batch = put_batch(mesh, rows | {"mask_BT": rows["mask_BT"] * 0 + 1}, cfg.train.batch_size)
            began = time.perf_counter()
            step = job.compile(job.step, batch)
            compile_s = time.perf_counter() - began
        stack.enter_context(alone(given))
        began, memory = time.perf_counter(), step.memory_analysis()
        state, losses, seconds = job.init(0), [], []
        state, metrics = step(state, batch)
        losses.append(float(metrics["train/loss"]))
        first = compile_s + time.perf_counter() - began
        for _ in range(2):
            state, metrics = step(state, batch)
        while len(seconds) < 3 or sum(seconds) * given["window"] < given["seconds"]:
            start_s = time.perf_counter()
            for _ in range(given["window"]):
                state, metrics = step(state, batch)
            losses.append(float(metrics["train/loss"]))  # waits for the device
            seconds.append((time.perf_counter() - start_s) / given["window"])
        peak = (devices[0].memory_stats() or {}).get("peak_bytes_in_use")
        kernels = profiled(step, state, batch) if given.get("profile") and given["platform"] == "gpu" else {}
    return {
        "step_s": seconds,
        "first_step_s": first,
        "compile_s": compile_s,
        "losses": [losses[0], losses[-1]],
        "memory_bytes": peak,
        "kernels": kernels,
        "compiled_bytes": memory.argument_size_in_bytes + memory.temp_size_in_bytes,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(job.abstract.params)),
        "device": devices[0].device_kind,
        "devices": len(devices),
        "versions": {"jax": jax.__version__},
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


@contextlib.contextmanager
def compiling(given: dict) -> Iterator[None]:
    """Compiles beside others that compile; nothing is timed meanwhile. Then waits until the parent says go."""
    if not given.get("lock"):
        yield
        return
    with open(given["lock"], "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        yield
    sys.stdin.readline()


@contextlib.contextmanager
def alone(given: dict) -> Iterator[None]:
    """Has the device while no other process of the bench compiles or runs on it."""
    if not given.get("lock"):
        yield
        return
    with open(given["lock"], "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def profiled(step, state, batch, steps: int = 3) -> dict[str, float]:
    """Milliseconds a step of each kernel, by its name."""
    import jax

    kernels = Counter()
    with tempfile.TemporaryDirectory() as folder:
        jax.block_until_ready(state)
        with jax.profiler.trace(folder):
            for _ in range(steps):
                state, _ = step(state, batch)
            jax.block_until_ready(state)
        for path in Path(folder).glob("plugins/profile/*/*.xplane.pb"):
            for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
                for line in plane.lines if plane.name.startswith("/device:") else ():
                    for event in line.events if line.name.startswith("Stream") else ():
                        kernels[event.name] += event.duration_ns / 1e6 / steps
    return dict(kernels)


def matmul(given: dict) -> dict:
    """The best FLOP/s of a square bfloat16 matmul of random numbers on one device."""
    import jax
    import jax.numpy as jnp

    from runtime.config import RuntimeConfig
    from runtime.start import start

    start(RuntimeConfig(platform=given["platform"]))
    size, times = 512 if given["tiny"] else 8192, 20
    a, b = (jax.random.normal(key, (size, size), jnp.bfloat16) for key in jax.random.split(jax.random.key(0)))
    product = jax.jit(jnp.matmul)
    product(a, b).block_until_ready()
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(times):
            c = product(a, b)
        c.block_until_ready()
        best = min(best, (time.perf_counter() - began) / times)
    return {"size": size, "flops": 2 * size**3 / best, "device": jax.devices()[0].device_kind}


if __name__ == "__main__":
    GIVEN = json.loads(sys.argv[1])
    print(json.dumps(train(GIVEN) if "work" in GIVEN else matmul(GIVEN)), flush=True)
