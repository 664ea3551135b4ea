"""The peak that MFU is measured against: data sheets for accelerators, a timed matmul for CPUs."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import platform
import re
import tempfile
import time
from pathlib import Path

import numpy as np

from runtime.locks import locked

DTYPES = ("bfloat16", "float16", "float8", "tf32", "float32")
FIRST_S, AGAIN_S = 0.5, 0.1  # seconds of measuring a CPU, and of measuring it again
CONFIRMATIONS = 3  # measurements of an idle CPU: virtual ones are slow at times, and do not show it


@dataclasses.dataclass(frozen=True)
class Peak:
    """A peak in FLOP/s per JAX device; NaN where none is known."""

    flops: float
    name: str  # what the figure stands for, to be printed beside every MFU
    source: str  # where it comes from; empty where none is known


@dataclasses.dataclass(frozen=True)
class Chip:
    """Dense matmul peaks in TFLOP/s of one JAX device, by dtype of the operands; None: not in the data sheet."""

    kind: str  # regular expression, searched in jax.Device.device_kind
    source: str
    bfloat16: float | None = None
    float16: float | None = None
    float8: float | None = None
    tf32: float | None = None
    float32: float | None = None


# Dense figures: where a data sheet prints only the sparse one, it is halved. The first row that matches counts.
# \b keeps A10 from A10G, L40S from L40, H200 from GH200; $ keeps a desktop card from its laptop and "D" variants.
CHIPS = (
    # NVIDIA. Volta has no bfloat16 units and no tf32.
    Chip(r"\bV100-SXM", "NVIDIA V100 data sheet (2020)", float16=125, float32=15.7),
    Chip(r"\bV100-PCIE", "NVIDIA V100 data sheet (2020)", float16=112, float32=14),
    Chip(r"\bA100\b", "NVIDIA A100 data sheet (2021)", 312, 312, None, 156, 19.5),
    Chip(r"\bA10\b", "NVIDIA A10 data sheet (2021)", 125, 125, None, 62.5, 31.2),
    Chip(r"\bL4\b", "NVIDIA L4 data sheet (2023), half of the sparse figures", 121, 121, 242.5, 60, 30.3),
    Chip(r"\bL40S\b", "NVIDIA L40S data sheet (2023)", 362.05, 362.05, 733, 183, 91.6),
    # The float32 accumulator's rate: GeForce runs it at half of the float16 accumulator's.
    Chip(r"\bRTX 4090$", "NVIDIA Ada whitepaper v2.1, appendix A", 165.2, 165.2, 330.3, 82.6, 82.6),
    Chip(r"\bH100 PCIe\b", "NVIDIA H100 whitepaper v1.04, table 2", 756, 756, 1513, 378, 51.2),
    Chip(r"\bH(100|200) NVL\b", "NVIDIA H100 and H200 data sheets, NVL column, half of the sparse figures",
         835.5, 835.5, 1670.5, 417.5, 60),
    Chip(r"\b(H100|H200|GH200)\b", "NVIDIA H100 whitepaper v1.04, table 2, SXM5 (H200 and GH200: the same die)",
         989.4, 989.4, 1978.9, 494.7, 66.9),
    Chip(r"\b(B200|B300)\b", "NVIDIA HGX B200 and B300 data sheets, an eighth of the board, dense",
         2250, 2250, 4500, 1125, 75),
    Chip(r"\b(GB200|GB300)\b", "NVIDIA GB200 NVL72 data sheet, a 72nd of the rack, dense",
         2500, 2500, 5000, 1250, 80),
    # AMD. Each of the two dies of an MI250X is a device of its own.
    Chip(r"\bMI250X\b", "AMD Instinct MI250X data sheet (383 / 95.7 TFLOP/s), one die of two",
         191.5, 191.5, None, None, 47.85),
    Chip(r"\bMI300X\b", "AMD Instinct MI300X data sheet", 1307.4, 1307.4, 2614.9, 653.7, 163.4),
    # Google. Matmuls are bfloat16 or narrower; v2, v3 and v7x show each of the chip's two cores as a device.
    Chip(r"^TPU v2$", "Jouppi et al., ISCA 2021, table 1 (46 TFLOP/s a chip), one core of two", 23),
    Chip(r"^TPU v3$", "Jouppi et al., ISCA 2021, table 1 (123 TFLOP/s a chip), one core of two", 61.5),
    Chip(r"^TPU v4$", "Google Cloud TPU v4 specification", 275),
    Chip(r"^TPU v5 ?(e|lite)$", "Google Cloud TPU v5e specification", 197),
    Chip(r"^TPU v5p?$", "Google Cloud TPU v5p specification", 459, float8=459),
    Chip(r"^TPU v6 ?(e|lite)$", "Google Cloud TPU v6e specification", 918, float8=918),
    Chip(r"^TPU ?v?7x?$", "Google Cloud TPU7x specification (2307 / 4614 TFLOP/s a chip), one core of two",
         1153.5, float8=2307),
)  # fmt: skip


def peak_flops(dtype: str, devices) -> Peak:
    """Dense matmul peak per device for operands of `dtype`, as a figure, its name and its source.

    dtype: one of DTYPES or a NumPy name such as `float8_e4m3fn`. `float32` is real float32, as training computes it
    (training.step.in_float32_matmuls), not the tf32 of GPUs; TPUs make it of several bfloat16 passes, which no data
    sheet rates. devices: jax devices. Unknown or mixed kinds have a NaN peak and a name that says so. On CPU the peak
    is measured (about half a second, once per machine, JAX version and dtype; for a tenth at the next starts, until the
    machine was found idle three times, keeping the best) and shared among the simulated devices of this process.
    Raises ValueError for a dtype without matmul peaks.
    """
    family = "float8" if dtype.startswith("float8") else dtype
    if family not in DTYPES:
        raise ValueError(f"no matmul peak is defined for dtype {dtype!r}; choose one of {', '.join(DTYPES)}")
    devices = list(devices)
    kinds = sorted({device.device_kind for device in devices})
    if devices[0].platform == "cpu":
        return _cpu_peak(family, devices)
    if len(kinds) > 1:
        return Peak(math.nan, f"no common peak of mixed devices: {' + '.join(kinds)}", "")
    return _table_peak(family, kinds[0])


def _table_peak(dtype: str, kind: str) -> Peak:
    # A MIG slice carries the whole card's name, but not its peak.
    chip = None if " MIG " in kind else next((chip for chip in CHIPS if re.search(chip.kind, kind)), None)
    tflops = chip and getattr(chip, dtype)
    if tflops is None:
        return Peak(math.nan, f"no peak known for {kind} in {dtype}", "")
    return Peak(tflops * 1e12, f"{kind}, {dtype}, dense", chip.source)


def _cpu_peak(dtype: str, devices) -> Peak:
    import jax

    local = [device for device in devices if device.process_index == jax.process_index()]
    simulated = len(jax.local_devices(backend="cpu"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    key = {
        "machine": f"{platform.node()}, {_cpu_model()}, {cores} cores",
        "jax": jax.__version__,
        "dtype": dtype,
        "flags": os.environ.get("XLA_FLAGS", ""),  # they choose threads and the matmul library
        "ways": _ways(dtype),
    }
    path = cache_root() / f"cpu-peak-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.json"
    with _alone(path.with_name("cpu-peak.lock")):
        record = _read_record(path)
        if record is None or record["idle"] < CONFIRMATIONS:
            flops, busy = _measure_matmul(dtype, local[0], cores, FIRST_S if record is None else AGAIN_S)
            idle = 0 if record is None else record["idle"]
            if record is None or flops > record["flops"]:
                record = {**key, "flops": flops, "measured": time.strftime("%Y-%m-%d")}
            record["idle"] = idle + (not busy)  # an idle machine that was no faster confirms the older figure
            _write_record(path, record)
    share = "" if simulated == 1 else f", shared by {simulated} simulated devices"
    busy = "" if record["idle"] else " while other work ran"
    name = f"{_cpu_model()}, {cores} cores, {dtype} matmul measured{busy}{share}"
    return Peak(record["flops"] / simulated, name, f"measured on {record['measured']}, kept in {path}")


def _ways(dtype: str) -> tuple[tuple[str, str], ...]:
    """The dtypes of operands and result in which a CPU may be fastest: XLA has bfloat16 kernels for float32 results
    alone, and where a CPU has no units for a dtype, it computes in float32.
    """
    operands = {"float8": "float8_e4m3fn", "tf32": "float32"}.get(dtype, dtype)
    return tuple(dict.fromkeys(((operands, "float32"), (operands, operands), ("float32", "float32"))))


def _measure_matmul(dtype: str, device, cores: int, budget_s: float) -> tuple[float, bool]:
    """Best FLOP/s of square matmuls on one CPU device (it uses every core), and whether other work held the cores."""
    import jax
    import jax.numpy as jnp

    size = 2048
    values = np.random.default_rng(0).standard_normal((size, size), dtype=np.float32)
    matmuls = []
    for operands, result in _ways(dtype):
        a = jax.device_put(values.astype(jnp.dtype(operands)), device)
        matmul = jax.jit(functools.partial(jnp.matmul, preferred_element_type=jnp.dtype(result)))
        matmuls.append(functools.partial(matmul.lower(a, a).compile(), a, a))
    times, began = [], time.perf_counter()
    while not times or time.perf_counter() - began < budget_s:
        for matmul in matmuls:
            start, cpu_start = time.perf_counter(), time.process_time()
            matmul().block_until_ready()
            elapsed, cpu_elapsed = time.perf_counter() - start, time.process_time() - cpu_start
            times.append((elapsed, cpu_elapsed < 0.8 * cores * elapsed))
    best, busy = min(times)
    return 2 * size**3 / best, busy


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine() or "unknown CPU"


def cache_root() -> Path:
    """Folder of what is kept between runs: $ISOMESH_CACHE, else ~/.cache/isomesh. It need not exist."""
    return Path(os.environ.get("ISOMESH_CACHE") or Path.home() / ".cache" / "isomesh")


@contextlib.contextmanager
def _alone(lock: Path):
    """Lets one process of a machine measure at a time; the others find its record. Without a cache, no lock."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            lock.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            stack.enter_context(locked(lock, on_wait=lambda: None))
        yield


def _read_record(path: Path) -> dict | None:
    try:
        record = json.loads(path.read_text())
        return record if record["flops"] > 0 and {"idle", "measured"} <= record.keys() else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _write_record(path: Path, record: dict) -> None:
    with contextlib.suppress(OSError):  # a read-only home only costs the next run half a second
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        with os.fdopen(handle, "w") as file:
            json.dump(record, file, indent=1)
        os.replace(temporary, path)
