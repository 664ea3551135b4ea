"""What a compiled program exchanges between devices, read from XLA's text of it: for CPU, GPU and TPU.

    compiled = jax.jit(step).lower(...).compile()
    print(describe(collectives(compiled.as_text(), mesh)))

Bytes are what one device receives, by the ring algorithms: what a textbook's volumes count. A collective in a loop
counts once for every trip, one in a branch of a conditional once.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from parallel.mesh import crossings
from parallel.pipeline.buffers import AT_MOST_ONCE, OPS
from performance.hlo import Array, Computation, Instruction, arrays, device_groups, parse, users

if TYPE_CHECKING:
    from jax.sharding import AbstractMesh, Mesh

# Share of the payload that one of n devices receives. The payload is the largest array of the exchange: the gathered
# output, the input that is reduced and scattered, else what goes in.
RECEIVED = {
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,  # a reduce-scatter, then an all-gather
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,  # at most: the sizes are known while running only
    "collective-permute": lambda n: 1.0,
    "collective-broadcast": lambda n: 1.0,
}


@dataclass(frozen=True)
class Collective:
    """One collective instruction of a program."""

    kind: str  # a key of RECEIVED
    axes: tuple[str, ...]  # the mesh axes along which the devices of a group differ
    group: int  # devices that take part together
    dtype: str  # of the largest operand, as XLA writes it: f32, bf16, ...
    payload: float  # bytes of the whole exchange for one group, each time
    times: int  # trips of the loops around it
    branch: str | None  # the branches around it, as conditional[number]/...; None outside of any
    scope: str  # the operation that it comes from, as JAX names it
    asynchronous: bool = False  # whether the program goes on while it is under way

    @property
    def bytes(self) -> float:
        """Bytes that one device receives in one run of the program."""
        return RECEIVED[self.kind](self.group) * self.payload * self.times

    @property
    def conditional(self) -> bool:
        """Whether it is in a branch, so that devices that take another one do not come to it."""
        return self.branch is not None


def collectives(
    text: str, mesh: "Mapping[str, int] | Mesh | AbstractMesh", *, as_accelerator: bool = False
) -> list[Collective]:
    """The collectives of a compiled program, in the order of its text; those of single devices are left out.

    `text` is `compiled.as_text()`; `mesh` the mesh that it was compiled for, or its sizes by axis. The compiler for
    CPUs leaves all-reduces as they are; with `as_accelerator` they count as what the compilers for GPUs and TPUs make
    of them: results that are only summed are reduced once, and one of which each device keeps its own slice is a
    reduce-scatter. Raises ValueError when a loop with collectives has no known number of trips.
    """
    computations, entry = parse(text)
    sizes = dict(getattr(mesh, "shape", mesh))
    across = crossings(mesh) if hasattr(mesh, "devices") else {}
    return _Walk(computations, sizes, across, as_accelerator).computation(entry, _Place(), set())


def summary(found: Sequence[Collective]) -> dict[tuple[str, tuple[str, ...]], tuple[int, float]]:
    """How often, and how many bytes a device receives, for each (kind, axes)."""
    total: dict[tuple[str, tuple[str, ...]], tuple[int, float]] = {}
    for c in found:
        count, size = total.get((c.kind, c.axes), (0, 0.0))
        total[c.kind, c.axes] = count + c.times, size + c.bytes
    return total


def describe(found: Sequence[Collective]) -> str:
    """The summary as a table, the largest first."""
    rows = sorted(summary(found).items(), key=lambda row: -row[1][1])
    lines = [f"{'collective':<20} {'axes':<24} {'times':>7} {'MB a device':>12}"]
    lines += [f"{kind:<20} {' '.join(axes):<24} {n:>7} {size / 1e6:>12,.3f}" for (kind, axes), (n, size) in rows]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------- walk of the program


@dataclass(frozen=True)
class _Place:
    """What surrounds the computation that a walk is in."""

    branch: str | None = None
    scope: str = ""
    kernel: bool = False  # the computation is one kernel
    asynchronous: bool = False  # the computation is begun, and waited for later


class _Walk:
    def __init__(self, computations: dict[str, Computation], sizes, across, as_accelerator: bool):
        self.computations, self.as_accelerator = computations, as_accelerator
        self.sizes, self.across = sizes, across  # of the mesh, and the axes that leave a slice

    def computation(self, name: str, place: _Place, begun: set) -> list[Collective]:
        """The collectives of a computation and of all that it calls.

        `begun` holds what the computation, its kernels included, has begun to exchange: a TPU's asynchronous fusions
        spread one collective over several kernels and write it in each of them.
        """
        found = []
        for instruction in self.computations[name].values():
            here = replace(place, scope=instruction.scope or place.scope)
            kind = instruction.opcode.removesuffix("-start")
            if "_xla_megascale_transfer_type" in instruction.attributes and kind == "send":
                found.append(self._between_slices(instruction, self.computations[name], here))
            elif kind in RECEIVED:
                key = kind, _channel(instruction)
                if key[1] is None or key not in begun:
                    found += self._collective(kind, instruction, self.computations[name], here)
                begun.add(key)
            elif kind == "while":
                found += self._loop(instruction, self.computations[name], here)
            elif kind == "conditional":
                called = instruction.called("branch_computations", "true_computation", "false_computation")
                for number, branch in enumerate(called):
                    label = f"{place.branch}/" if place.branch else ""
                    inside = replace(here, branch=f"{label}{instruction.name}[{number}]")
                    found += self.computation(branch, inside, set())
            elif not kind.endswith(("-done", "-update")):  # those name the computation of their start once more
                begins = here.asynchronous or instruction.opcode == "async-start"
                inside = replace(here, kernel=kind == "fusion", asynchronous=begins)
                for called in instruction.called("calls", "to_apply", "called_computations"):
                    found += self.computation(called, inside, begun if inside.kernel else set())
        return found

    def _loop(self, loop: Instruction, around: Computation, place: _Place) -> list[Collective]:
        if self._runs_once_or_not(loop):
            place = replace(place, branch=f"{place.branch}/{loop.name}" if place.branch else loop.name)
            return self.computation(loop.called("body")[0], place, set())
        once = [c for name in loop.called("condition", "body") for c in self.computation(name, place, set())]
        if not once:
            return []
        trips = self._trips(loop, around)
        if trips is None:
            raise ValueError(f"the number of trips of {loop.name} ({place.scope}), which has collectives, is unknown")
        return [replace(c, times=c.times * trips) for c in once]

    def _runs_once_or_not(self, loop: Instruction) -> bool:
        """Whether a loop is a conditional: it goes on while a flag is set, and the body clears the flag."""
        condition, body = (self.computations[loop.called(key)[0]] for key in ("condition", "body"))
        test, result = (next(i for i in of.values() if i.root) for of in (condition, body))
        if test.opcode != "get-tuple-element" or result.opcode != "tuple":
            return False
        flag = body[result.operands[test.index]]
        while flag.opcode in ("copy", "bitcast"):
            flag = body[flag.operands[0]]
        return (flag.opcode, flag.arguments) == ("constant", "false")

    def _trips(self, loop: Instruction, around: Computation) -> int | None:
        """What the compiler found out, else (TPU) from a condition `counter < bound`; None if it cannot be told."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return int(known[1])
        condition, body = (self._opened(self.computations[loop.called(key)[0]]) for key in ("condition", "body"))
        test, result = (next(i for i in of.values() if i.root) for of in (condition, body))
        carried = around[loop.operands[0]]
        if test.opcode != "compare" or "direction=LT" not in test.attributes or result.opcode != "tuple":
            return None
        counter = condition[test.operands[0]]
        while counter.opcode in ("copy", "bitcast"):
            counter = condition[counter.operands[0]]
        if counter.opcode != "get-tuple-element" or carried.opcode != "tuple":
            return None

        def constant(name: str, of: Computation) -> int | None:
            instruction = of[name]
            if instruction.opcode == "constant":
                return int(instruction.arguments)
            if instruction.opcode in ("copy", "bitcast"):
                return constant(instruction.operands[0], of)
            if instruction.opcode == "get-tuple-element" and of is not around:  # carried along unchanged
                return constant(carried.operands[instruction.index], around)
            return None

        def step(name: str) -> int | None:
            instruction = body[name]
            if instruction.opcode in ("copy", "bitcast"):
                return step(instruction.operands[0])
            if instruction.opcode == "get-tuple-element" and instruction.index == counter.index:
                return 0
            if instruction.opcode != "add":
                return None
            a, b = instruction.operands
            before, more = (step(a), constant(b, body)) if step(a) is not None else (step(b), constant(a, body))
            return None if before is None or more is None else before + more

        start, bound = constant(carried.operands[counter.index], around), constant(test.operands[1], condition)
        by = step(result.operands[counter.index])
        return None if start is None or bound is None or not by else max(0, -((start - bound) // by))

    def _opened(self, of: Computation) -> Computation:
        """With the instructions of its kernels of one number, as counters are, in the place of the kernels."""
        found = {}
        for outer in of.values():
            if outer.opcode != "fusion" or not re.match(r"\w+\[\]", outer.shape):
                found[outer.name] = outer
                continue
            inside = self.computations[outer.called("calls")[0]]
            names = {name: outer.name if i.root else f"{outer.name}.{name}" for name, i in inside.items()}
            for name, i in inside.items():
                if i.opcode == "parameter":
                    i = replace(i, opcode="bitcast", arguments=f"%{outer.operands[int(i.arguments)]}")
                elif i.operands:
                    i = replace(i, arguments=", ".join(f"%{names[operand]}" for operand in i.operands))
                found[names[name]] = replace(i, name=names[name], root=outer.root and i.root)
        return found

    def _collective(self, kind: str, instruction: Instruction, of: Computation, place: _Place) -> list[Collective]:
        """One Collective; two where only a part of a combined all-reduce is scattered."""
        axes, group = self._axes(kind, instruction)
        if not axes:
            return []
        operands = instruction.operands[:1] if kind == "ragged-all-to-all" else instruction.operands
        by_kind: dict[str, list[Array]] = {}
        for index, operand in enumerate(operands):
            became = kind
            if kind == "all-reduce" and (self.as_accelerator or place.kernel):  # a TPU's reduce-scatter is a kernel
                became = self._became(instruction, index, group, of)
            if became is not None:
                by_kind.setdefault(became, []).extend(arrays(of[operand].shape))
        return [
            Collective(
                kind,
                axes,
                group,
                max(operands, key=lambda array: array.bytes).dtype,
                sum(array.bytes for array in operands) * (group if kind == "all-gather" else 1),
                1,
                place.branch,
                place.scope,
                place.asynchronous or _begins(instruction),
            )
            for kind, operands in by_kind.items()
        ]

    def _between_slices(self, send: Instruction, of: Computation, place: _Place) -> Collective:
        """What TPU slices exchange: the runtime carries it out with what the device sends to its host."""
        assert self.across, "collectives between slices: give the mesh with its devices, not its sizes"
        kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', send.attributes)[1].lower().replace("_", "-")
        slices = re.search(r'_xla_megascale_target="\{([\d,:]+)\}', send.attributes)
        group = _numbers(slices[1]) if slices else math.prod(self.across.values())
        kind = kind if kind in RECEIVED else "collective-permute"
        array = arrays(of[send.operands[0]].shape)[0]
        payload = array.bytes * (group if kind == "all-gather" else 1)
        return Collective(kind, tuple(self.across), group, array.dtype, payload, 1, place.branch, place.scope, True)

    def _axes(self, kind: str, instruction: Instruction) -> tuple[tuple[str, ...], int]:
        """The mesh axes that a collective runs along, and how many devices take part together."""
        groups = device_groups(instruction.attributes, math.prod(self.sizes.values()))
        differ = np.zeros(len(self.sizes), bool)
        for group in groups:
            places = np.array(np.unravel_index(group, tuple(self.sizes.values())))
            differ |= (places != places[:, :1]).any(axis=1)
        axes = tuple(axis for axis, used in zip(self.sizes, differ, strict=True) if used)
        return axes, 2 if kind == "collective-permute" else max(len(group) for group in groups)

    # --------------------------------------------------------------------- what an accelerator makes of an all-reduce

    def _became(self, reduce: Instruction, index: int, group: int, of: Computation) -> str | None:
        """The kind of output `index` of an all-reduce, or None where it is summed with another that counts for both."""
        outputs = [reduce.name]
        if reduce.shape.startswith("("):
            outputs = [user.name for user in users(reduce.name, of) if user.index == index]
        fate = _Fate(self.computations)
        for name in outputs:
            fate.follow(name, of, ())
        everywhere = math.prod(self.sizes.values())
        if len({str(device_groups(of[name].attributes, everywhere)) for name, _ in fate.terms}) > 1:
            return "all-reduce"
        if fate.terms and (reduce.name, index) != min(fate.terms):
            return None
        whole = arrays(of[reduce.operands[index]].shape)[0].size
        return "reduce-scatter" if fate.kept == {whole // group} and whole % group == 0 else "all-reduce"


def _begins(instruction: Instruction) -> bool:
    """Whether a collective is only begun here: GPUs' `-start` that is not marked as waited for at once, and kernels of
    TPUs that carry a part of it beside their own work."""
    if "async_collective_fusion_config" in instruction.attributes:
        return True
    return instruction.opcode.endswith("-start") and '"is_sync":true' not in instruction.attributes


def _channel(instruction: Instruction) -> str | None:
    """What identifies one of the kernels over which a collective is spread; None for a collective that is not."""
    if "async_collective_fusion_config" not in instruction.attributes:
        return None
    return re.search(r"channel_id=(\d+)", instruction.attributes)[1]


def _numbers(text: str) -> int:
    """How many numbers there are in a list such as 1,2,5:8."""
    ranges = [part.split(":") for part in text.split(",")]
    return sum(int(ends[-1]) - int(ends[0]) + 1 for ends in ranges)


class _Fate:
    """What happens to a value: which part of it is kept, and with which other reduced values it is summed before.

    A place in the program is a computation and the fusions that lead to it: a tuple ((fusion, its computation), ...).
    """

    SAME = ("bitcast", "copy", "convert", "reshape", "transpose")

    def __init__(self, computations: dict[str, Computation]):
        self.computations = computations
        self.kept: set[int | None] = set()  # numbers of elements that users take out of it; None: they take it whole
        self.terms: set[tuple[str, int]] = set()  # all-reduces and their outputs, of the sums that it is part of

    def follow(self, name: str, of: Computation, outside: tuple) -> None:
        """Goes on to all users of `name`."""
        if of[name].root and outside:
            (fusion, computation), *others = outside
            self.follow(fusion.name, computation, tuple(others))
            return
        for user in users(name, of):
            if user.opcode == "dynamic-slice" and user.operands[0] == name:
                self.kept.add(arrays(user.shape)[0].size)
            elif user.opcode in self.SAME:
                self.follow(user.name, of, outside)
            elif user.opcode == "add" and (terms := self._terms(user.name, of, outside)):
                self.terms |= terms
                self.follow(user.name, of, outside)
            elif user.opcode == "fusion":
                body = self.computations[user.called("calls")[0]]
                numbers = [str(number) for number, operand in enumerate(user.operands) if operand == name]
                for inner in [i.name for i in body.values() if i.opcode == "parameter" and i.arguments in numbers]:
                    self.follow(inner, body, ((user, of), *outside))
            else:
                self.kept.add(None)

    def _terms(self, name: str, of: Computation, outside: tuple) -> set[tuple[str, int]] | None:
        """The outputs of all-reduces that a value is the sum of; None where it is anything else."""
        value = of[name]
        if value.opcode == "all-reduce":
            return {(name, 0)}
        if value.opcode == "get-tuple-element" and of[value.operands[0]].opcode == "all-reduce":
            return {(value.operands[0], value.index)}
        if value.opcode in self.SAME:
            return self._terms(value.operands[0], of, outside)
        if value.opcode == "add":
            a, b = (self._terms(operand, of, outside) for operand in value.operands)
            return a | b if a and b else None
        if value.opcode == "parameter" and outside:
            (fusion, computation), *others = outside
            return self._terms(fusion.operands[int(value.arguments)], computation, tuple(others))
        return None


def check_pipeline(text: str, mesh: "Mesh") -> None:
    """Raises ValueError if a compiled step (its text) makes stages wait for each other inside an operation.

    The partitioner may move data between devices by a permutation where a program did not ask for one. Among stages
    that take different ways, XLA for CPUs then mixes up messages, silently.
    """
    operations = [f"{AT_MOST_ONCE}.{kind}" for kind in OPS]
    for c in collectives(text, mesh):
        if any(name in c.scope for name in operations) and (c.kind == "collective-permute" or "pipe" in c.axes):
            raise ValueError(
                f"this mesh cannot be pipelined on a CPU: the compiler put a {c.kind} over {' '.join(c.axes)} into an "
                f"operation of a stage ({c.scope}); use another mesh"
            )
