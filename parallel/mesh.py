"""The device mesh: six axes that always exist, outermost first, and the arithmetic that says which meshes are legal.

JAX is imported where a mesh is made, not here: an impossible mesh is told before anything slow is imported.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jax.sharding import AbstractMesh, Mesh

# Outermost first: neighbours along the last axis sit closest, so the chattiest axis (tensor) comes last.
AXES = ("pipe", "data", "fsdp", "expert", "context", "tensor")
NOT_YET = ("pipe", "expert", "context")


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1 on one axis means "the rest"."""

    pipe: int = 1  # pipeline stages
    data: int = 1  # replicas of the parameters, each with its share of the batch
    fsdp: int = -1  # shards of parameters and optimizer moments, each with its share of the batch
    expert: int = 1  # shards of the experts, each with its share of the batch
    context: int = 1  # shards of the sequence
    tensor: int = 1  # shards of heads, ffn and vocabulary

    def __post_init__(self):
        sizes = asdict(self)
        for axis, size in sizes.items():
            if size < 1 and size != -1:
                raise ValueError(f"mesh.{axis}={size} is no number of devices; use 1 or more, or -1 for the rest")
        rest = [axis for axis, size in sizes.items() if size == -1]
        if len(rest) > 1:
            raise ValueError(f"only one mesh axis can be -1, the rest; {' and '.join(rest)} are")
        for axis in NOT_YET:
            if sizes[axis] != 1:
                raise ValueError(f"mesh.{axis}={sizes[axis]} is not supported yet; use data, fsdp and tensor")


@dataclass(frozen=True)
class Requirement:
    """A dim that mesh axes split: `size` must be a multiple of the product of `axes`.

    With `or_divisor` the product may also be a multiple of `size` (key-value heads are then replicated).
    """

    name: str
    size: int
    axes: tuple[str, ...]
    or_divisor: bool = False

    def problem(self, sizes: Mapping[str, int]) -> str | None:
        """One clause with the arithmetic if `sizes` breaks this requirement, else None."""
        parts = math.prod(sizes[axis] for axis in self.axes)
        if self.size % parts == 0 or (self.or_divisor and parts % self.size == 0):
            return None
        split = " * ".join(f"mesh.{axis}={sizes[axis]}" for axis in self.axes if sizes[axis] > 1)
        total = f" = {parts}" if "*" in split else ""
        return f"{self.name}={self.size} does not divide by {split}{total}"


def resolve(config: MeshConfig, devices: int, requirements: Iterable[Requirement] = ()) -> dict[str, int]:
    """The size of every axis for `devices` devices, with -1 replaced.

    Raises ValueError with the arithmetic and the nearest legal meshes when the product differs from `devices`
    or a requirement is broken.
    """
    asked, requirements = asdict(config), tuple(requirements)
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

    def distance(sizes: Mapping[str, int]) -> float:
        return sum(abs(math.log(sizes[axis] / wanted[axis])) for axis in AXES)

    nearest = sorted(legal, key=lambda s: (distance(s), s["tensor"]))[:3]
    spelled = (" ".join(f"mesh.{a}={n}" for a, n in s.items() if n > 1 or wanted[a] != n) for s in nearest)
    return "nearest legal: " + ", or ".join(s or "all axes 1" for s in dict.fromkeys(spelled))


def factorizations(devices: int) -> Iterator[dict[str, int]]:
    """All ways to spread `devices` over the axes that are supported."""
    axes = [axis for axis in AXES if axis not in NOT_YET]

    def spread(left: int, names: list[str]) -> Iterator[dict[str, int]]:
        if len(names) == 1:
            yield {names[0]: left}
            return
        for size in (d for d in range(1, left + 1) if left % d == 0):
            for others in spread(left // size, names[1:]):
                yield {names[0]: size} | others

    for sizes in spread(devices, axes):
        yield {axis: sizes.get(axis, 1) for axis in AXES}


def make_mesh(sizes: Mapping[str, int], devices: list | None = None) -> "Mesh":
    """A mesh with all six axes over `devices` (default: every device of every process, in hardware order)."""
    import jax
    from jax.sharding import AxisType

    shape = tuple(sizes[axis] for axis in AXES)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def abstract_mesh(sizes: Mapping[str, int]) -> "AbstractMesh":
    """The same mesh without devices, to trace and lower for machines that are not there."""
    from jax.sharding import AbstractMesh, AxisType

    shape = tuple(sizes[axis] for axis in AXES)
    return AbstractMesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))
