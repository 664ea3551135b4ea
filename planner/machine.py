"""Machines as data: what one device computes, holds and exchanges, read from planner/machines/ or a file of the user's.

No JAX here: a search starts at once.
"""

import json
import math
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

from config.build import build, one_line
from performance.hardware import cache_root

FOLDER = Path(__file__).parent / "machines"
PLATFORMS = ("cpu", "gpu", "tpu")
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8": 1}  # of an element


@dataclass(frozen=True)
class Network:
    """What one device receives through it."""

    gb_s: float  # GB/s; of a torus along one of its dims, from both neighbours
    latency_us: float = 10.0  # of one exchange


@dataclass(frozen=True)
class Sustained:
    """Shares of the data sheet's figures that a training step keeps up; `python -m planner calibrate` fits them."""

    matmul: float = 0.75  # of the peak, in large matmuls
    memory: float = 0.85
    inside: float = 0.8
    across: float = 0.8


@dataclass(frozen=True)
class Machine:
    """One device and its networks; figures of data sheets, which `sustained` brings down to what is seen."""

    name: str
    kind: str  # regular expression, searched in jax.Device.device_kind
    platform: str  # cpu | gpu | tpu
    source: str
    peak_tflops: dict  # dense matmuls by the operands' dtype
    memory_gib: float  # that a process finds
    memory_gb_s: float
    exponentials_tera_s: float  # of the softmax in attention kernels
    domain: int  # devices that the fast network joins: a host, a rack, a slice
    inside: Network
    across: Network  # between domains
    torus: int = 0  # dims of the fast network; 0: a switch, every device reaches each other at full rate
    matrix_unit: int = 1  # side of the matrix unit, which heads narrower than it do not fill
    sustained: Sustained = field(default_factory=Sustained)
    usable: float = 0.92  # share of the memory that a program may take (runtime.start.GPU_MEMORY)
    shared: bool = False  # devices are simulated: they share the peak and the memory
    price_per_hour: float | None = None  # of a device, in money of the user's
    calibrated: str = ""  # what `sustained` was fitted to: planner.calibration
    hours_between_failures: float = 50_000  # of a device: 419 in 54 days of 16,384 H100 (arXiv 2407.21783, table 5)

    def __post_init__(self):
        if self.platform not in PLATFORMS:
            raise ValueError(f"platform={self.platform} is not one of {', '.join(PLATFORMS)}")
        for name in ("memory_gib", "memory_gb_s", "exponentials_tera_s", "domain", "hours_between_failures"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0")
        if not self.peak_tflops or any(dtype not in BYTES for dtype in self.peak_tflops):
            raise ValueError(f"peak_tflops needs TFLOP/s for one or more of {', '.join(BYTES)}")

    @property
    def limit(self) -> float:
        """Bytes that a program may take."""
        return self.usable * self.memory_gib * 2**30

    def peak(self, dtype: str) -> float:
        """FLOP/s of matmuls. Raises ValueError where the data sheet has none."""
        if dtype not in self.peak_tflops:
            known = ", ".join(self.peak_tflops)
            raise ValueError(f"{self.name} has no matmul peak in {dtype}; use one of {known}")
        return 1e12 * self.peak_tflops[dtype]

    def among(self, devices: int) -> "Machine":
        """The machine as one of `devices`: where they are simulated, each has its share."""
        if not self.shared or devices == 1:
            return self
        peaks = {dtype: peak / devices for dtype, peak in self.peak_tflops.items()}
        small = {"memory_gib": self.memory_gib / devices, "memory_gb_s": self.memory_gb_s / devices}
        small["exponentials_tera_s"] = self.exponentials_tera_s / devices
        return replace(self, peak_tflops=peaks, **small)


def known() -> list[str]:
    """The machines that planner/machines/ has."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def calibration_file(name: str) -> Path:
    """Where the factors that were fitted for a machine are kept; it need not exist."""
    return cache_root() / "planner" / f"{Path(name).stem.replace('-', '_')}.json"


def open_machine(name: str, *, calibrated: bool = True) -> Machine:
    """The machine of that name, or of the file where `name` ends with .yaml, with the factors that were fitted to runs
    if there are any and they are wanted. Raises ValueError in one line.
    """
    file = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name.replace('-', '_')}.yaml"
    if not file.is_file():
        choices = ", ".join(known())
        raise ValueError(f"--hardware {name}: no such machine; use one of {choices}, or the path of a .yaml file")
    try:
        machine = build(Machine, yaml.safe_load(file.read_text()))
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: {one_line(error)}") from None
    kept = calibration_file(name)
    if not calibrated or not kept.is_file():
        return machine
    try:
        found = json.loads(kept.read_text())
        told = f"fitted to {found['runs']} runs on {found['date']}"
        return replace(machine, sustained=build(Sustained, found["sustained"]), calibrated=told)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{kept} is damaged ({one_line(error)}): delete it, or calibrate again") from None


def written(path: Path, content: bytes) -> None:
    """Writes beside the file, then renames. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=path.suffix)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(beside, 0o644)
        os.replace(beside, path)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise


def machine_of(device_kind: str) -> Machine | None:
    """The machine of a `jax.Device.device_kind`; None where none is known."""
    return next((m for m in map(open_machine, known()) if re.search(m.kind, device_kind)), None)


# ---------------------------------------------------------------------------------------------- networks under a mesh


@dataclass(frozen=True)
class Lines:
    """How a mesh axis lies on the networks: the rates at which a device receives along it, in bytes/s."""

    size: int
    within: int  # neighbours that the fast network joins
    inside: float
    across: float  # of a device, when all of its neighbours in the domain send along with it
    latency: float  # seconds of one exchange

    def seconds(self, gathered: float) -> float:
        """An all-gather or a reduce-scatter of `gathered` bytes by rings, domain by domain; an all-reduce takes two."""
        if self.size == 1 or not gathered:
            return 0.0
        inside = gathered * (self.within - 1) / self.within / self.inside
        domains = self.size // self.within
        across = gathered * (domains - 1) / domains / (self.across * self.within) if domains > 1 else 0.0
        # a ring waits at every domain that it comes through, for about a microsecond
        late = self.latency * (1 + math.log2(domains)) + 1e-6 * (domains - 1)
        return late + max(inside, across) + 0.1 * min(inside, across)

    def all_to_all(self, sent: float) -> float:
        """Each device sends and receives `sent` bytes, evenly to all of the axis, itself included."""
        if self.size == 1 or not sent:
            return 0.0
        near = sent * (self.within - 1) / self.size / self.inside
        far = sent * (self.size - self.within) / self.size / self.across
        return self.latency + max(near, far)

    def shift(self, sent: float) -> float:
        """Every device sends `sent` bytes to its next neighbour; the slowest pair counts."""
        if self.size == 1 or not sent:
            return 0.0
        return self.latency + sent / (self.across if self.within < self.size else self.inside)


def lines(machine: Machine, sizes: Mapping[str, int]) -> dict[str, Lines]:
    """For each mesh axis, outermost first, how it lies: inner axes fill a domain first.

    On a torus inner axes take its dims first. An axis that fills k dims has k times the rate of one; one that fills
    part of a dim has no way around, and half of it (How to Scale Your Model, chapter 3).
    """
    devices, domain, found = math.prod(sizes.values()), machine.domain, {}
    keep = machine.sustained
    domain = math.gcd(devices, domain) if devices > domain else devices
    dims, taken, inner = torus_dims(domain, machine.torus), 1, 1
    for axis in reversed(list(sizes)):
        size = sizes[axis]
        within = math.gcd(size, max(domain // inner, 1))
        rate = 1.0 if not machine.torus else _torus_rate(dims, taken, within)
        taken *= within
        latency = (machine.inside.latency_us if within == size else machine.across.latency_us) * 1e-6
        found[axis] = Lines(
            size,
            within,
            1e9 * machine.inside.gb_s * keep.inside * rate,
            1e9 * machine.across.gb_s * keep.across,
            latency,
        )
        inner *= size
    return {axis: found[axis] for axis in sizes}


def torus_dims(devices: int, count: int) -> tuple[int, ...]:
    """The sides of the most compact torus of so many devices, by prime factors; the smallest first."""
    sides, left = [1] * max(count, 1), devices
    factors, prime = [], 2
    while left > 1:
        while left % prime == 0:
            factors.append(prime)
            left //= prime
        prime += 1 if prime * prime <= left else max(left - prime, 1)
    for factor in sorted(factors, reverse=True):
        sides[sides.index(min(sides))] *= factor
    return tuple(sorted(sides))


def _torus_rate(dims: tuple[int, ...], taken: int, size: int) -> float:
    """Rates of one dim that an axis of `size` neighbours has, where inner axes have taken `taken` places."""
    rate, left, before = 0.0, size, taken
    for side in dims:
        used = math.gcd(before, side)
        before //= used
        free = side // used
        mine = math.gcd(left, free)
        left //= mine
        if mine > 1:
            rate += 1.0 if mine == side and side > 2 else 0.5
    return max(rate, 0.5)
