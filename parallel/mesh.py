"""The device mesh: six axes that always exist, outermost first, and the arithmetic that says which meshes are legal.

JAX is imported where a mesh is made, not here: an impossible mesh is told before anything slow is imported.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from parallel.axes import ACTIVATION_AXES, AXES, PARAMETER_AXES, REPLICATED_IF_UNDIVIDED

if TYPE_CHECKING:
    from jax.sharding import AbstractMesh, Mesh


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1 on one axis means "the rest".

    Raises ValueError for another number below 1, or -1 twice.
    """

    pipe: int = 1  # pipeline stages
    data: int = 1  # replicas of the parameters, each with its share of the batch
    fsdp: int = -1  # shards of parameters and optimizer moments, each with its share of the batch
    expert: int = 1  # shards of the experts, each with its share of the batch
    context: int = 1  # shards of the sequence
    tensor: int = 1  # shards of heads, ffn and vocabulary
    auto: bool = False  # train.py asks the planner for what is left at its default; mesh=auto says the same

    @property
    def sizes(self) -> dict[str, int]:
        """By axis, outermost first."""
        return {axis: getattr(self, axis) for axis in AXES}

    def __post_init__(self):
        sizes = self.sizes
        for axis, size in sizes.items():
            if size < 1 and size != -1:
                raise ValueError(f"mesh.{axis}={size} is no number of devices; use 1 or more, or -1 for the rest")
        rest = [axis for axis, size in sizes.items() if size == -1]
        if len(rest) > 1:
            raise ValueError(f"only one mesh axis can be -1, the rest; {' and '.join(rest)} are")


@dataclass(frozen=True)
class Requirement:
    """A dim that mesh axes split: `size` must be a multiple of the product of `axes`.

    With `or_divisor` the product may also be a multiple of `size` (key-value heads are then replicated). Where the axes
    split at all, `size` must be a multiple of `factor` times the product.
    """

    name: str
    size: int
    axes: tuple[str, ...]
    or_divisor: bool = False
    factor: int = 1

    def problem(self, sizes: Mapping[str, int]) -> str | None:
        """One clause with the arithmetic if `sizes` breaks this requirement, else None."""
        parts = math.prod(sizes[axis] for axis in self.axes)
        needed = parts * self.factor if parts > 1 else 1
        if self.size % needed == 0 or (self.or_divisor and parts % self.size == 0):
            return None
        factor = [str(self.factor)] if self.factor > 1 else []
        split = " * ".join(factor + [f"mesh.{axis}={sizes[axis]}" for axis in self.axes if sizes[axis] > 1])
        total = f" = {needed}" if "*" in split else ""
        return f"{self.name}={self.size} does not divide by {split}{total}"


@dataclass(frozen=True)
class StageRequirement:
    """Every virtual stage of a pipeline must hold a layer."""

    layers: int
    chunks: int  # virtual stages a device
    stages: int | None = None  # of the user's table, if there is one

    def problem(self, sizes: Mapping[str, int]) -> str | None:
        """As Requirement.problem."""
        stages = sizes["pipe"]
        parts = stages * self.chunks
        if stages > 1 and self.stages not in (None, stages):
            return f"mesh.pipe={stages} is not the {self.stages} stages of the pipeline's table"
        if stages == 1 or self.layers >= parts:
            return None
        product = f"mesh.pipe={stages}" + (
            f" * {self.chunks} chunks = {parts} virtual stages" if self.chunks > 1 else ""
        )
        return f"model.layers={self.layers} is less than {product}"


@dataclass(frozen=True)
class MicrobatchRequirement:
    """A pipeline cuts the sequences of each device into microbatches."""

    name: str
    size: int  # sequences over the whole mesh
    microbatches: int  # 0: as many as fit

    def problem(self, sizes: Mapping[str, int]) -> str | None:
        """As Requirement.problem."""
        axes = ACTIVATION_AXES["batch"]
        shards = math.prod(sizes[axis] for axis in axes)
        if sizes["pipe"] == 1 or not self.microbatches or self.size % (shards * self.microbatches) == 0:
            return None
        parts = [f"mesh.{a}={sizes[a]}" for a in axes if sizes[a] > 1]
        split = " * ".join([f"pipeline.microbatches={self.microbatches}", *parts])
        total = f" = {shards * self.microbatches}" if parts else ""
        return f"{self.name}={self.size} does not divide by {split}{total}"


def requirement(name: str, size: int, dim: str, *, stored: bool = False) -> Requirement:
    """What the tables ask of a config field `name` with value `size`: it becomes `dim` of activations or parameters."""
    table = PARAMETER_AXES if stored else ACTIVATION_AXES
    return Requirement(name, size, table[dim], or_divisor=dim in REPLICATED_IF_UNDIVIDED)


def resolve(config: MeshConfig, devices: int, requirements: Iterable[Requirement] = ()) -> dict[str, int]:
    """The size of every axis for `devices` devices, with -1 replaced.

    Raises ValueError with the arithmetic and the nearest legal meshes when the product differs from `devices`
    or a requirement is broken.
    """
    asked, requirements = config.sizes, tuple(requirements)
    fixed = math.prod(size for size in asked.values() if size != -1)
    sizes = {axis: devices // fixed if size == -1 else size for axis, size in asked.items()}
    shown = "*".join(str(size) for size in asked.values() if size != 1) or "1"
    if -1 in asked.values() and (sizes_rest := devices % fixed):
        problem = f"mesh {shown}: {fixed} does not divide {devices} devices (remainder {sizes_rest})"
    elif math.prod(sizes.values()) != devices:
        problem = f"mesh {shown} = {fixed} needs {fixed} devices, {devices} found"
    else:
        problems = [problem for r in requirements if (problem := r.problem(sizes))]
        if not problems:
            return sizes
        problem = "; ".join(problems)
    wanted = {axis: max(1, size) for axis, size in asked.items()}
    raise ValueError(f"{problem}; {_advice(wanted, devices, requirements)}")


def _advice(wanted: Mapping[str, int], devices: int, requirements: tuple[Requirement, ...]) -> str:
    legal = [s for s in factorizations(devices) if not any(r.problem(s) for r in requirements)]
    if not legal:
        return f"no mesh of {devices} devices is legal for these sizes: change them or the number of devices"

    def distance(sizes: Mapping[str, int]) -> tuple[float, int, int]:
        far = sum(abs(math.log(sizes[axis] / wanted[axis])) for axis in AXES)
        uncalled = sum(sizes[axis] > 1 == wanted[axis] for axis in ("pipe", "expert", "context"))
        return far, uncalled, sizes["tensor"]

    nearest = sorted(legal, key=distance)[:3]
    spelled = (" ".join(f"mesh.{a}={n}" for a, n in s.items() if n > 1 or wanted[a] != n) for s in nearest)
    return "nearest legal: " + ", or ".join(s or "all axes 1" for s in dict.fromkeys(spelled))


def factorizations(devices: int) -> Iterator[dict[str, int]]:
    """All ways to spread `devices` over the axes."""

    def spread(left: int, names: list[str]) -> Iterator[dict[str, int]]:
        if len(names) == 1:
            yield {names[0]: left}
            return
        for size in (d for d in range(1, left + 1) if left % d == 0):
            for others in spread(left // size, names[1:]):
                yield {names[0]: size} | others

    yield from spread(devices, list(AXES))


# --------------------------------------------------------------------------------------------- the order of the devices


def make_mesh(sizes: Mapping[str, int], devices: list | None = None) -> "Mesh":
    """A mesh with all six axes over `devices` (default: every device of every process), in the hardware's order.

    Outer axes cross the slow network between slices (of TPUs) or hosts (of GPUs), inner axes stay within; inside a TPU
    slice axes follow the torus. Simulated devices keep their order, process by process. Raises ValueError when slices
    differ in size.
    """
    import jax
    import numpy as np
    from jax.experimental import mesh_utils
    from jax.sharding import AxisType, Mesh

    slices: dict[int, list] = {}
    for device in jax.devices()[: math.prod(sizes.values())] if devices is None else devices:
        slices.setdefault(slice_of(device), []).append(device)
    members = [len(slices[number]) for number in sorted(slices)]
    if len(set(members)) > 1:
        unequal = ", ".join(str(n) for n in members)
        raise ValueError(f"slices or hosts of {unequal} devices cannot form one mesh: use as many devices of each")
    across = split_over_slices(sizes, len(slices))
    within = [sizes[axis] // across[axis] for axis in AXES]
    # a dimension of a torus may serve two axes: less bandwidth for either, but else many legal meshes would be refused
    parts = [
        mesh_utils.create_device_mesh(within, slices[number], allow_split_physical_axes=True)
        for number in sorted(slices)
    ]
    outer_and_inner = np.stack(parts).reshape(*across.values(), *within)
    order = [dim for axis in range(len(AXES)) for dim in (axis, len(AXES) + axis)]
    ordered = outer_and_inner.transpose(order).reshape([sizes[axis] for axis in AXES])
    return Mesh(ordered, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def slice_of(device) -> int:
    """The number of the device's group that a fast network joins: a TPU slice, or a host of GPUs."""
    if device.platform == "cpu":
        return 0
    coords = getattr(device, "coords", ())
    if device.platform == "gpu" and len(coords) == 3:  # (host or rack of one NVLink, process, GPU)
        return coords[0]
    return getattr(device, "slice_index", 0)


def split_over_slices(sizes: Mapping[str, int], slices: int) -> dict[str, int]:
    """Into how many parts each axis is cut by the slow network, when outer axes take as much of it as they can.

    An axis may be partly across: fsdp=16 over 2 hosts of 8 GPUs is cut into 2 parts.
    """
    across = {}
    for axis in AXES:
        across[axis] = math.gcd(sizes[axis], slices)
        slices //= across[axis]
    assert slices == 1, f"{slices} slices are left over by {dict(sizes)}"
    return across


def crossings(mesh: "Mesh") -> dict[str, int]:
    """The axes of `mesh` whose neighbours lie in different slices or hosts, with the number that one line spans."""
    import numpy as np

    slices, spans = np.vectorize(slice_of, otypes=[int])(mesh.devices), {}
    for dim, axis in enumerate(mesh.axis_names):
        lines = np.moveaxis(slices, dim, -1).reshape(-1, slices.shape[dim])
        spans[axis] = max(len(set(line)) for line in lines.tolist())
    return {axis: n for axis, n in spans.items() if n > 1}


def slow_network_warning(mesh: "Mesh") -> str | None:
    """One line if an axis that exchanges activations in every layer leaves its slice or host, else None."""
    spans = crossings(mesh)
    slow = " and ".join(f"mesh.{axis}={mesh.shape[axis]}" for axis in ("context", "tensor") if axis in spans)
    if not slow:
        return None
    joined = mesh.size // len({slice_of(device) for device in mesh.devices.flat})
    return (
        f"{slow}: exchanges of every layer cross the slow network between slices or hosts of {joined} devices; "
        f"keep mesh.context * mesh.tensor a divisor of {joined}"
    )


def abstract_mesh(sizes: Mapping[str, int]) -> "AbstractMesh":
    """The same mesh without devices, to trace and lower for machines that are not there."""
    from jax.sharding import AbstractMesh, AxisType

    shape = tuple(sizes[axis] for axis in AXES)
    return AbstractMesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def portable_mesh() -> "AbstractMesh":
    """One device of no particular platform: in its context a program has no form that only one platform understands."""
    from jax.sharding import AbstractDevice, AbstractMesh, AxisType

    anywhere = AbstractDevice(device_kind="any", num_cores=1, platform="any")
    types = (AxisType.Auto,) * len(AXES)
    return AbstractMesh((1,) * len(AXES), AXES, axis_types=types, abstract_device=anywhere)
