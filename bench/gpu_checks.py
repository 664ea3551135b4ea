"""Correctness on a GPU, a part of bench/gpu.py --all: python bench/gpu_checks.py '{"kind": "numbers", ...}'.

`numbers`: fused attention against the plain form in float32, float8 against float32, and the losses of 20 steps against
those of the CPU. `starts`: seconds of the default run, cold and warm. `resume`: a run that is killed and goes on,
bitwise. Prints one JSON line for each finding, with `ok`.
"""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
SMALL = (
    *("model.layers=2", "model.width=64", "model.heads=4", "model.kv_heads=4", "model.head_dim=16", "model.ffn=128"),
    *("train.seq_len=128", "train.batch_size=4"),
)


def say(check: str, ok: bool | None, **found) -> None:
    """One finding; `ok` None: a figure without a bound."""
    print(json.dumps({"check": check, "ok": ok, **found}), flush=True)


# ------------------------------------------------------------------------------------------------------------- numbers


def numbers(given: dict) -> None:
    from runtime.config import RuntimeConfig
    from runtime.start import start

    start(RuntimeConfig(platform=given["platform"]))
    cases = {"whole": (0, False), "windowed": (64, False), "packed": (0, True)}
    for name, (window, packed) in cases.items():
        try:
            errors = attention_errors(window, packed, given["platform"])
            say(f"attention {name}", max(errors.values()) < 2e-2, relative_errors=errors)
        except Exception as error:
            say(f"attention {name}", False, failed=str(error)[:300])
    for name, check in (("float8", float8), ("losses of 20 steps", losses)):
        try:
            check(given["platform"])
        except Exception as error:
            say(name, False, failed=str(error)[:300])


def attention_errors(window: int, packed: bool, platform: str) -> dict[str, float]:
    """Norm of the difference over the norm, of the result and of the gradients of q, k and v."""
    import jax
    import jax.numpy as jnp

    from model.attention import TokenInfo, attention

    B, T, N, K, H = 2, 256, 4, 2, 64
    keys = jax.random.split(jax.random.key(7), 4)
    q, k, v, weight = (jax.random.normal(x, (B, T, n, H)) for x, n in zip(keys, (N, K, K, N), strict=True))
    segments = jnp.broadcast_to((jnp.arange(T) >= 100).astype(jnp.int32), (B, T)) if packed else None
    info = TokenInfo(jnp.arange(T, dtype=jnp.int32)[None], segments, in_order=True)
    size = jnp.int32(window) if window else None

    def result(kernel, dtype, q, k, v):
        arrays = (x.astype(dtype) for x in (q, k, v))
        settings = {"causal": True, "window": size, "scale": H**-0.5, "windows": (window,), "kernel": kernel}
        return attention(*arrays, info, info, **settings).astype(jnp.float32)

    def all_of(kernel, dtype):
        objective = lambda *x: (result(kernel, dtype, *x) * weight).sum()
        return result(kernel, dtype, q, k, v), *jax.grad(objective, (0, 1, 2))(q, k, v)

    fused = "auto" if platform == "cpu" else "fused"
    with jax.default_matmul_precision("float32"):
        plain = jax.jit(lambda: all_of("plain", jnp.float32))()
    found = jax.jit(lambda: all_of(fused, jnp.bfloat16))()
    error = lambda a, b: float(jnp.linalg.norm((a - b).ravel()) / jnp.linalg.norm(b.ravel()))
    return {n: error(a, b) for n, a, b in zip(("out", "dq", "dk", "dv"), found, plain, strict=True)}


def float8(platform: str) -> None:
    """The product in 8 bits against the one in float32."""
    import jax
    import jax.numpy as jnp

    from model import low_precision

    a, b = jax.random.split(jax.random.key(3))
    x, matrix = jax.random.normal(a, (2, 128, 256)), jax.random.normal(b, (256, 512))
    with jax.default_matmul_precision("float32"):
        exact = jnp.einsum("btd,df->btf", x, matrix)
    found = jax.jit(low_precision.dot)(x.astype(jnp.bfloat16), matrix.astype(jnp.bfloat16)).astype(jnp.float32)
    error = float(jnp.linalg.norm((found - exact).ravel()) / jnp.linalg.norm(exact.ravel()))
    say("float8", error < 6e-2, relative_error=error)


def losses(platform: str) -> None:
    """20 steps in float32 on this device and on the CPU."""
    import jax

    from config import compose, layout
    from parallel.mesh import make_mesh
    from parallel.sharding import put_batch
    from training.job import make_job
    from training.parity import random_batch

    cfg = compose.load(["optimizer=adamw", "train.compute_dtype=float32", "train.steps=20", *SMALL])
    found = {}
    for device in (jax.devices()[0], jax.devices("cpu")[0]):
        mesh = make_mesh(layout.mesh_sizes(cfg, 1), [device])
        with jax.set_mesh(mesh):
            job = make_job(cfg, mesh)
            put = lambda step, mesh=mesh: put_batch(
                mesh, random_batch(cfg, step, slice(0, cfg.train.batch_size)), cfg.train.batch_size
            )
            state, step, seen = job.init(0), job.compile(job.step, put(0)), []
            for number in range(20):
                state, metrics = step(state, put(number))
                seen.append(float(metrics["train/loss"]))
        found[device.platform] = seen
    ours, cpu = found[jax.devices()[0].platform], found["cpu"]
    worst = max(abs(a - b) / b for a, b in zip(ours, cpu, strict=True))
    say("losses of 20 steps", worst < 1e-4, worst_relative=worst, last=[ours[-1], cpu[-1]])


# ------------------------------------------------------------------------------------------ runs of train.py


def run(folder: Path, cache: Path, *overrides: str, tiny: bool, platform: str, kill_at: int = 0) -> dict:
    """Runs train.py; `kill_at` ends it without a warning once a checkpoint of that step is there."""
    where = (
        f"run.dir={folder}",
        f"runtime.compile_cache={cache}",
        f"runtime.platform={platform}",
        "wandb.mode=disabled",
    )
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        *where,
        "wandb.mode=disabled",
        *(SMALL if tiny else ()),
        *overrides,
    ]
    began = time.perf_counter()
    log = folder.with_suffix(".log")
    with open(log, "w") as out:
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
        first = None
        while process.poll() is None:
            time.sleep(0.05)
            if first is None and losses_of(folder):
                first = time.perf_counter() - began
            if kill_at and any(int(n) >= kill_at for n in saved(folder)):
                os.killpg(process.pid, signal.SIGKILL)
    seconds = time.perf_counter() - began
    return {"code": process.wait(), "first_loss_s": first, "run_s": seconds, "said": log.read_text()[-400:]}


def saved(folder: Path) -> list[str]:
    return [p.name for p in (folder / "checkpoints").glob("*") if re.fullmatch(r"\d+", p.name)]


def losses_of(folder: Path) -> dict[int, str]:
    """The losses that a run has written, as text, by step."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    found = re.compile(r'"train/loss": ([^,}]+)'), re.compile(r'"step": (\d+)')
    return {int(s[1]): loss[1] for line in lines if (loss := found[0].search(line)) and (s := found[1].search(line))}


def starts(given: dict) -> None:
    """The default run as a newcomer starts it, with an empty compile cache and then with what that left."""
    with tempfile.TemporaryDirectory() as work:
        for name in ("cold", "warm"):
            folder = Path(work) / name
            found = run(
                folder, Path(work) / "cache", *given["overrides"], tiny=given["tiny"], platform=given["platform"]
            )
            ok = found.pop("code") == 0
            bounds = {"cold": (15, 45), "warm": (8, 20)}[name]
            say(
                f"start {name}",
                ok,
                **found if not ok else {k: found[k] for k in ("first_loss_s", "run_s")},
                aims=bounds,
            )


def resume(given: dict) -> None:
    """One run to its end, and one that is killed in the middle and started again: the same losses, bit for bit."""
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
        " --xla_gpu_deterministic_ops=true" if given["platform"] != "cpu" else ""
    )
    steps = 400 if given["tiny"] else 2000
    overrides = (f"train.steps={steps}", "train.log_every=1", "train.eval_every=0", "sample.tokens=0")
    overrides = (*given["overrides"], *overrides, f"checkpoint.every={steps // 4}")
    settings = {"tiny": given["tiny"], "platform": given["platform"]}
    with tempfile.TemporaryDirectory() as work:
        whole, broken, cache = Path(work) / "whole", Path(work) / "broken", Path(work) / "cache"
        codes = [run(whole, cache, *overrides, **settings)["code"]]
        codes.append(run(broken, cache, *overrides, **settings, kill_at=steps // 4)["code"])
        kept, end = max(map(int, saved(broken)), default=0), run(broken, cache, *overrides, **settings)
        a, b = losses_of(whole), losses_of(broken)
        same = [step for step in a if step > kept and a[step] == b.get(step)]
        after = [step for step in a if step > kept]
        ok = bool(after) and same == after and end["code"] == 0
        ok = ok and codes[1] != 0  # it was killed
        say(
            "kill and resume",
            ok,
            resumed_from=kept,
            steps_after=len(after),
            equal=len(same),
            codes=[*codes, end["code"]],
        )


def main(given: dict) -> None:
    with open(given["lock"], "a") as lock:  # what is timed waits until the checks are done, and they for it
        fcntl.flock(lock, fcntl.LOCK_EX if given["kind"] == "starts" else fcntl.LOCK_SH)
        {"numbers": numbers, "starts": starts, "resume": resume}[given["kind"]](given)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
