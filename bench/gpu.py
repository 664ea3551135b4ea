"""Training speed on NVIDIA GPUs beside PyTorch: python bench/gpu.py [--only gpt2_124m] [--quick] [--out FILE].

For each work, isomesh and its PyTorch twin (bench/torch_twin.py) first try a few batch sizes and remat policies, each
in a process of its own, so that running out of memory costs one try only; then the fastest of each side run in turns
(A B A B), each process alone. Printed, and appended to --out, is one JSON line a process, and one for each work:
medians, their ratio, MFU against a measured matmul and against the data sheet, and whether the marks are passed.

isomesh uses every visible GPU, the twin one, and figures are per GPU: CUDA_VISIBLE_DEVICES=0 compares like with like.
Nothing is downloaded. isomesh runs in the Python that runs this script, which needs jax[cuda13], flax, optax, orbax and
hydra-core (`make setup EXTRAS=cuda`); the twin in that of --torch-python, which needs PyTorch 2.10 for CUDA; they may
be the same. A work stops at its share of --minutes: give --only where a command may run for ten minutes only.

    python bench/gpu.py --platform cpu --tiny --torch-python PATH    # all the way through on a machine without a GPU
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from config import compose, layout
from model.config import ModelConfig
from model.counts import flops_per_token

TWIN = Path(__file__).with_name("torch_twin.py")
DATA_SHEET = 989.4e12  # FLOP/s of an H100 or H200 SXM in bfloat16, dense
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
        ours=(Try(16), Try(16, "attention"), Try(32, "dots"), Try(8, "none", UNROLLED)),
        twin=(Try(16), Try(8), Try(32, "full")),
    ),
    "llama3_8b": Work(
        ("model=llama3_8b",), 8192, 6.7e3, 7.9e3,
        ours=(Try(1, "full", LEAN), Try(1, "dots", LEAN), Try(2, "full", LEAN), Try(1, "attention", LEAN)),
        twin=(Try(1, "full"), Try(2, "full"), Try(1)),
        twin_param_dtype="bfloat16",  # 16 bytes a parameter, as float32 needs, leave no room for activations
    ),
    "moe_1b": Work(
        ("model=llama_1b", *EXPERTS), 1024, None, None,
        ours=(Try(16), Try(32, "attention"), Try(32)),
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
    """Times steps on random tokens."""
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
    with jax.set_mesh(mesh):
        job = make_job(cfg, mesh)
        rows = random_batch(cfg, 0, slice(0, cfg.train.batch_size))
        batch = put_batch(mesh, rows | {"mask_BT": rows["mask_BT"] * 0 + 1}, cfg.train.batch_size)
        began = time.perf_counter()
        step = job.compile(job.step, batch)
        memory = step.memory_analysis()
        state, losses, seconds = job.init(0), [], []
        state, metrics = step(state, batch)
        losses.append(float(metrics["train/loss"]))
        first = time.perf_counter() - began
        for _ in range(2):
            state, metrics = step(state, batch)
        while len(seconds) < 3 or sum(seconds) < given["seconds"]:
            start_s = time.perf_counter()
            for _ in range(given["window"]):
                state, metrics = step(state, batch)
            losses.append(float(metrics["train/loss"]))  # waits for the device
            seconds.append((time.perf_counter() - start_s) / given["window"])
    return {
        "step_s": seconds,
        "first_step_s": first,
        "losses": [losses[0], losses[-1]],
        "memory_bytes": (devices[0].memory_stats() or {}).get("peak_bytes_in_use"),
        "compiled_bytes": memory.argument_size_in_bytes + memory.temp_size_in_bytes,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "device": devices[0].device_kind,
        "devices": len(devices),
        "versions": {"jax": jax.__version__},
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


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


# ------------------------------------------------------------------------------------------- the process above them all


class Bench:
    """Runs processes one after the other within a time limit, and writes down what each says."""

    def __init__(self, given: argparse.Namespace):
        self.given, self.ends = given, time.monotonic() + 60 * given.minutes
        self.machine = f"{platform.node()}, {os.cpu_count()} cores"

    def write(self, record: dict) -> dict:
        """Prints a line and appends it to the results."""
        record = {"time": time.strftime("%Y-%m-%dT%H:%M:%S"), "machine": self.machine, **record}
        print(json.dumps(record), flush=True)
        if self.given.out:
            with open(self.given.out, "a") as file:
                file.write(json.dumps(record) + "\n")
        return record

    def process(self, kind: str, record: dict, command: list[str], until: float) -> dict:
        """What a process says; `failed` is why it says nothing: out of memory, out of time, or its last words."""
        record = {"kind": kind, **record}
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=max(until - time.monotonic(), 1))
        except subprocess.TimeoutExpired:
            return record | {"failed": "out of time"}
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode or not lines:
            memory = re.search(r"RESOURCE_EXHAUSTED|out of memory|OutOfMemory", done.stderr, re.IGNORECASE)
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:300]
            return record | {"failed": "out of memory" if memory else last}
        return record | json.loads(lines[-1])

    def attempt(self, name: str, who: str, attempt: Try, seconds: float, until: float) -> dict:
        """One process of isomesh or of the twin; its line has tokens/s for each GPU."""
        work, model, seq_len = WORKS[name], *self.model(name)
        told = {"work": name, **asdict(attempt), "platform": self.given.platform, "tiny": self.given.tiny}
        told |= {
            "seconds": seconds,
            "window": 1 if self.given.tiny else max(1, 20 // attempt.batch),
            "seq_len": seq_len,
        }
        if who == "isomesh":
            command = [sys.executable, __file__, "--child", json.dumps(told)]
        else:
            told |= {"model": asdict(model), "param_dtype": work.twin_param_dtype}
            command = [self.given.torch_python, str(TWIN), json.dumps(told)]
        dtype = work.twin_param_dtype if who == "torch" else "float32"
        record = {"work": name, "who": who, **asdict(attempt), "seq_len": seq_len, "param_dtype": dtype}
        line = self.process("steps", record, command, until)
        if "step_s" in line:
            line["tokens_per_s"] = attempt.batch * seq_len / statistics.median(line["step_s"])
        return self.write(line)

    def model(self, name: str) -> tuple[ModelConfig, int]:
        """A work's model, and the length of its sequences."""
        cfg = compose.load(overrides_of(WORKS[name], Try(1), 1, self.given.tiny))
        return cfg.model, cfg.train.seq_len

    def best(self, name: str, who: str, until: float) -> Try | None:
        """The fastest of a side's tries; None where all failed."""
        work = WORKS[name]
        tries = work.ours if who == "isomesh" else work.twin
        if self.given.quick:
            return tries[0]
        speeds: dict[Try, float] = {}
        for attempt in tries:
            speeds[attempt] = self.attempt(name, who, attempt, self.given.seconds / 4, until).get("tokens_per_s", 0)
        fastest = max(speeds, key=speeds.get)
        return fastest if speeds[fastest] else None

    def compare(self, name: str, peak: float | None, until: float) -> dict:
        """Searches, then runs the two sides in turns; the line that a reader looks for."""
        sides = ["isomesh", *(["torch"] if self.given.torch_python else [])]
        searched = time.monotonic() + 0.6 * (until - time.monotonic())
        best = {}
        for number, who in enumerate(sides, 1):  # a slow compiler may not take the other side's time
            left = searched - time.monotonic()
            best[who] = self.best(name, who, time.monotonic() + left / (len(sides) - number + 1))
        speeds = {who: [] for who in sides if best[who]}
        for _ in range(1 if self.given.quick else self.given.rounds):
            for who in speeds:
                line = self.attempt(name, who, best[who], self.given.seconds, until)
                speeds[who] += [line["tokens_per_s"]] if "tokens_per_s" in line else []
        medians = {who: statistics.median(found) for who, found in speeds.items() if found}
        return self.write(self.verdict(name, best, medians, peak))

    def verdict(self, name: str, best: dict[str, Try | None], medians: dict[str, float], peak: float | None) -> dict:
        """Figures of both sides and whether the marks are passed."""
        work, model, seq_len = WORKS[name], *self.model(name)
        flops = flops_per_token(model, seq_len)
        record = {"kind": "result", "work": name, "tokens_per_s": medians, "mark": work.mark, "aim": work.aim}
        record["best"] = {who: asdict(attempt) for who, attempt in best.items() if attempt}
        record["mfu_of_989"] = {who: speed * flops / DATA_SHEET for who, speed in medians.items()}
        record["mfu_of_989_full_attention"] = {
            who: speed * flops_per_token(model, seq_len, full_attention=True) / DATA_SHEET
            for who, speed in medians.items()
        }
        if peak:
            record["mfu_of_matmul"] = {who: speed * flops / peak for who, speed in medians.items()}
        ours, twin = medians.get("isomesh"), medians.get("torch")
        if ours and twin:
            record |= {"ratio": ours / twin, "ahead_of_twin": ours > twin}
        if ours and work.mark:
            record |= {"mark_passed": ours >= work.mark}
        return record


def arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(WORKS), help="works, separated by commas")
    parser.add_argument("--torch-python", help="the Python that has PyTorch; without it no twin runs")
    parser.add_argument("--out", help="file to append JSON lines to")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all works together")
    parser.add_argument("--seconds", type=float, default=20.0, help="that a measured process trains for")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each side")
    parser.add_argument("--quick", action="store_true", help="the first try of each side, one turn")
    parser.add_argument("--platform", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--tiny", action="store_true", help="small models, to check the script itself")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if unknown := set(given.only.split(",")) - WORKS.keys():
        parser.error(f"--only: {', '.join(sorted(unknown))} unknown; choose from {', '.join(WORKS)}")
    return given


def main() -> None:
    given = arguments()
    if given.child:
        told = json.loads(given.child)
        print(json.dumps(train(told) if "work" in told else matmul(told)), flush=True)
        return
    bench, names = Bench(given), given.only.split(",")
    told = json.dumps({"platform": given.platform, "tiny": given.tiny})
    peak = bench.write(bench.process("matmul", {}, [sys.executable, __file__, "--child", told], bench.ends)).get(
        "flops"
    )
    for number, name in enumerate(names):
        now = time.monotonic()
        bench.compare(name, peak, now + (bench.ends - now) / (len(names) - number))


if __name__ == "__main__":
    main()
