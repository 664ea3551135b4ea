"""How much memory is free on the devices of this process, and how much a compiled program takes."""

import math
from pathlib import Path

import jax

CGROUP = Path("/sys/fs/cgroup")  # whose limit a container's processes share


def free_bytes() -> float:
    """Of the fullest of this process's devices; infinite where nobody says. Simulated CPU devices share one memory."""
    devices = jax.local_devices()
    told = [device.memory_stats() for device in devices]
    if all(one and "bytes_limit" in one for one in told):
        return float(min(one["bytes_limit"] - one["bytes_in_use"] for one in told))
    if devices[0].platform == "cpu":
        return min(_free_of_machine(), _free_of_container()) / len(devices)
    return math.inf


def temporary_bytes(memory, platform: str) -> int:
    """Bytes a device that a program needs beside its arguments, by its compiler's account (`memory_analysis()`).

    TPUs' count of what is temporary has more than they place: 8.3 GB of a step of GPT-2 whose buffers, by the
    compiler's own report, end at 5.9 GB with the arguments. That is its peak.
    """
    if platform == "tpu":
        return max(memory.peak_memory_in_bytes - memory.argument_size_in_bytes, 0)
    return memory.temp_size_in_bytes


def _free_of_machine() -> float:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), math.inf)


def _free_of_container() -> float:
    """What its limit leaves; files that the system keeps in memory give way."""
    try:
        most, used, stat = ((CGROUP / name).read_text() for name in ("memory.max", "memory.current", "memory.stat"))
    except OSError:
        return math.inf
    counts = dict(line.split() for line in stat.splitlines())
    kept = sum(int(counts.get(name, 0)) for name in ("active_file", "inactive_file"))
    return math.inf if most.strip() == "max" else float(int(most) - int(used) + kept)
