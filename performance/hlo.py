"""XLA's text of a compiled program as Python objects: computations, instructions, shapes, groups of devices."""

import math
import re
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Instruction:
    """One line of a computation: `%name = shape opcode(arguments), attributes`."""

    name: str
    shape: str
    opcode: str
    arguments: str
    attributes: str
    root: bool  # whether it is the result of its computation

    @property
    def operands(self) -> list[str]:
        """The names of the instructions that it reads."""
        return re.findall(r"%([\w.\-]+)", self.arguments)

    @property
    def scope(self) -> str | None:
        """The operation that it comes from, as JAX names it."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found and found[1]

    @property
    def index(self) -> int:
        """Which element a get-tuple-element takes."""
        return int(re.search(r"\bindex=(\d+)", self.attributes)[1])

    def called(self, *keys: str) -> list[str]:
        """The computations that the attributes `keys` name."""
        found = re.findall(rf"\b(?:{'|'.join(keys)})=(?:{{([^}}]*)}}|%([\w.\-]+))", self.attributes)
        return [name.strip().lstrip("%") for several, one in found for name in (several or one).split(",")]


Computation = dict[str, Instruction]


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """The computations of `compiled.as_text()` by name, and the name of the entry."""
    computations, entry, current = {}, "", None
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%([\w.\-]+) \(.*\{$", line):
            current = computations.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
        elif current is not None and (item := re.match(r"\s+(ROOT )?%([\w.\-]+) = (.*)$", line)):
            current[item[2]] = _instruction(item[2], item[3], root=bool(item[1]))
    assert entry, "the text has no ENTRY computation: is it compiled.as_text()?"
    return computations, entry


def _instruction(name: str, text: str, *, root: bool) -> Instruction:
    shape_end = _closing(text, 0) if text.startswith("(") else text.index(" ")
    start = text.index("(", shape_end)
    end = _closing(text, start)
    return Instruction(
        name, text[:shape_end], text[shape_end:start].strip(), text[start + 1 : end - 1], text[end:], root
    )


def _closing(text: str, start: int) -> int:
    """The position after the parenthesis that closes the one at `start`."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, start):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.end()
    raise AssertionError(f"unbalanced parentheses in {text[:80]}")


def users(name: str, computation: Computation) -> list[Instruction]:
    """The instructions that read `name`."""
    return [instruction for instruction in computation.values() if name in instruction.operands]


@dataclass(frozen=True)
class Array:
    """One array of a shape: XLA's dtype, and its dims."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many elements it has."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        """Bytes without padding; tokens have none, int4 halves."""
        bits = re.search(r"\d+", self.dtype)  # f8e4m3fn: 8, bf16: 16, c64: 64
        return self.size * (int(bits[0]) / 8 if bits else float(self.dtype == "pred"))


def arrays(shape: str) -> list[Array]:
    """The arrays of a shape, which may be a tuple of them."""
    found = re.findall(r"\b([a-z]\w*)\[([\d,<=]*)\]", shape)
    return [Array(dtype, tuple(int(n.lstrip("<=")) for n in dims.split(",") if n)) for dtype, dims in found]


# ----------------------------------------------------------------------------------------------------- device groups


def device_groups(attributes: str, devices: int) -> list[list[int]]:
    """The groups of devices of a collective, by their places in the mesh; of a permutation its (source, target)s."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", attributes):
        return [[int(n) for n in pair.split(",")] for pair in re.findall(r"\d+,\d+", pairs[1])]
    if listed := re.search(r"replica_groups=\{(\{.*?\})\}", attributes):
        return [[int(n) for n in group.split(",")] for group in re.findall(r"\d+(?:,\d+)*", listed[1])]
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", attributes):
        return _iota(iota[2]).reshape([int(n) for n in iota[1].split(",")]).tolist()
    if axes := re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?\)?)\))? \{(.*?)\}", attributes):
        return _groups_of_axes(*axes.groups(default=""))
    assert "replica_groups={}" in attributes, f"unknown form of replica groups: {attributes[:120]}"
    return [list(range(devices))]


def _iota(text: str) -> np.ndarray:
    """[4,2]T(1,0): the numbers from 0 in an array of shape (4, 2), transposed."""
    dims, order = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
    shape = [int(n) for n in dims.split(",")]
    ids = np.arange(math.prod(shape)).reshape(shape)
    return ids.transpose([int(n) for n in order.split(",")]) if order else ids


def _groups_of_axes(mesh: str, device_ids: str, axes: str) -> list[list[int]]:
    """Groups along some axes of the compiler's own mesh: 'x'=4,'y'=2 with 'x', or with a part of it, 'x':(1)2."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    if not device_ids:
        ids = np.arange(math.prod(sizes.values()))
    elif device_ids.startswith("["):
        ids = _iota(device_ids)
    else:
        ids = np.array([int(n) for n in device_ids.split(",")])
    used = {name: (before, part) for name, before, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)}
    shape, dims = [], []
    for name, size in sizes.items():  # each axis in three: what comes before the part that is used, it, what is after
        before, part = (int(n) for n in used[name]) if used.get(name, ("", ""))[0] else (1, size)
        if name in used:
            dims.append(len(shape) + 1)
        shape += [before, part, size // (before * part)]
    ids = np.moveaxis(ids.reshape(shape), dims, range(-len(dims), 0))
    return ids.reshape(-1, math.prod(shape[dim] for dim in dims)).tolist()
