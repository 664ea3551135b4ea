"""Whether a training step fits into a device's memory: what it needs by part, and the nearest settings that do."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from runtime.memory import temporary_bytes
from runtime.platform import platform
from training.config import OptimizerConfig, TrainConfig

OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"  # what the runtime says


@dataclass(frozen=True)
class Need:
    """Bytes of a step on one device. Activations are what the compiler adds, logits and work space among it."""

    parameters: float
    moments: float
    gradients: float
    activations: float | None = None  # None: not compiled yet

    @property
    def total(self) -> float:
        """Bytes that are known to be needed."""
        return self.parameters + self.moments + self.gradients + (self.activations or 0)

    def told(self) -> str:
        """The parts in GB, as messages have them."""
        parts = {"parameters": self.parameters, "moments": self.moments, "gradients": self.gradients}
        parts |= {} if self.activations is None else {"activations": self.activations}
        return " + ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items())


def need(state, memory=None, trained=None) -> Need:
    """Of a training.state.TrainState of shapes with shardings; `memory` is the compiled step's account, if known, and
    `trained` the parameters that have gradients, if not all do.
    """
    parameters, moments = bytes_a_device(state.params), bytes_a_device(state.opt_state)
    # all at once: their norm is taken before the first is used
    gradients = parameters if trained is None else bytes_a_device(trained)
    if memory is None:
        return Need(parameters, moments, gradients)
    rest = memory.argument_size_in_bytes + temporary_bytes(memory, platform()) - parameters - moments - gradients
    return Need(parameters, moments, gradients, max(rest, 0))


def bytes_a_device(tree) -> float:
    """Of arrays or shapes with shardings."""
    size = lambda leaf: math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return float(sum(map(size, jax.tree.leaves(tree))))


def memory_of(device: jax.Device) -> float:
    """Bytes that programs may take; infinite where the device does not say, as CPUs do not."""
    return float((device.memory_stats() or {}).get("bytes_limit", math.inf))


@dataclass(frozen=True)
class Room:
    """The memory of a device, and the step that shall fit into it."""

    state: Any  # a training.state.TrainState of shapes with shardings
    limit: float  # bytes
    train: TrainConfig
    optimizer: OptimizerConfig
    mesh: Mapping[str, int]
    trained: Any = None  # the parameters that have gradients, if not all do

    def check(self, memory=None) -> None:
        """Raises MemoryError, with what fits instead, for a step that needs more; `memory` as of `need`."""
        if need(self.state, memory, self.trained).total > self.limit:
            raise MemoryError(self.explain(memory))

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Says in one line what the allocator says in pages.

        Within it, an allocator's error becomes a MemoryError with what fits instead.
        """
        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            if not self.exhausted(error):
                raise
            raise MemoryError(self.explain()) from None

    @staticmethod
    def exhausted(error: Exception) -> bool:
        """Whether an error is that of an allocator."""
        return isinstance(error, jax.errors.JaxRuntimeError) and OUT_OF_MEMORY in str(error)

    def explain(self, memory=None) -> str:
        """The line that a user reads: what a step needs, what a device has, and which settings fit."""
        needed = need(self.state, memory, self.trained)
        about = "" if needed.activations is not None else " before activations"
        said = f"out of device memory: a step needs {needed.total / 1e9:.1f} GB{about} ({needed.told()})"
        ways = settings_that_fit(needed, self.limit, self.train, self.optimizer, self.mesh)
        less = ", of which less was free" if needed.total <= self.limit else ""
        has = f"a device has {self.limit / 1e9:.1f}{less}"
        return f"{said}, and {has}; by this arithmetic these fit: {', or '.join(ways)}"


def settings_that_fit(
    needed: Need, limit: float, train: TrainConfig, optimizer: OptimizerConfig, mesh: Mapping[str, int]
) -> list[str]:
    """Overrides, the nearest first, each with the gigabytes that it would need."""
    fixed, activations = needed.parameters + needed.moments + needed.gradients, needed.activations or 0.0
    found = []
    shards = mesh["data"] * mesh["fsdp"] * mesh["expert"] * train.grad_accumulation
    smaller = range(train.batch_size - shards, 0, -shards)
    if batch := next((b for b in smaller if fixed + activations * b / train.batch_size <= limit), None):
        found.append(f"train.batch_size={batch} ({(fixed + activations * batch / train.batch_size) / 1e9:.1f})")
        if activations and train.batch_size % (2 * shards) == 0:
            cut = next(n for n in range(2, train.batch_size + 1) if fixed + activations / n <= limit)
            found.append(f"train.grad_accumulation={train.grad_accumulation * cut}")
    if train.remat != "full" and fixed < limit:
        found.append(f"train.remat=full (above {fixed / 1e9:.1f})")
    halved = needed.total - needed.moments / 2
    if (
        not optimizer.moment_dtype
        and optimizer.name != "adafactor"
        and train.param_dtype == "float32"
        and halved <= limit
    ):
        found.append(f"optimizer.moment_dtype=bfloat16 ({halved / 1e9:.1f})")
    for times in (2, 4, 8, 16, 32, 64):
        if fixed / times + activations <= limit:
            devices = f"{times} times the devices"
            found.append(f"mesh.fsdp={times * mesh['fsdp']} on {devices} ({(fixed / times + activations) / 1e9:.1f})")
            break
    return found or ["a smaller model, or more devices with mesh.fsdp"]
