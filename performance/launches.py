"""What a compiled program launches, and which values its kernels convert: what performance/roofline.py counts with."""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from performance import hlo
from performance.trace import Program

FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"),
    *("iota", "opt-barrier", "fusion-done", "copy-done", "async-done", "async-update", "all-gather-done"),
    *("all-reduce-done", "collective-permute-done"),
}
SAME = ("bitcast", "reshape", "copy", "opt-barrier", "copy-start", "copy-done")  # the values stay what they are
CUTS = ("dynamic-slice", "slice")


class Body:
    """A computation that kernels are launched from: the entry, or what a loop or a call runs."""

    def __init__(self, program: Program, name: str, outer: "Body | None" = None, loop: hlo.Instruction | None = None):
        """`loop` is the instruction of `outer` that runs it over and over, if it is a loop's."""
        self.program, self.lines, self.outer, self.loop = program, program.computations[name], outer, loop

    @cached_property
    def users(self) -> dict[str, list[hlo.Instruction]]:
        """Who reads each value, seen through what only renames it."""
        direct = defaultdict(list)
        for instruction in self.lines.values():
            for name in dict.fromkeys(instruction.operands):
                direct[name].append(instruction)
        found = {}
        for name in reversed(self.lines):
            renamed = lambda user: user.opcode in ("bitcast", "get-tuple-element")
            found[name] = [u for user in direct[name] for u in (found.get(user.name, []) if renamed(user) else [user])]
        return found

    @cached_property
    def unchanged(self) -> set[int]:
        """The elements of its argument that a loop's body hands on as they are."""
        root = next(line for line in self.lines.values() if line.root)
        if root.opcode != "tuple":
            return set()
        return {n for n, name in enumerate(root.operands) if self._argument(name) == n}

    def _argument(self, name: str) -> int | None:
        """Which element of the argument a value is."""
        line = self.lines.get(name)
        while line is not None and line.opcode in SAME:
            line = self.lines.get(line.operands[0])
        if line is None or line.opcode != "get-tuple-element":
            return None
        whole = self.lines.get(line.operands[0])
        return line.index if whole is not None and whole.opcode == "parameter" else None

    def origin(self, name: str) -> tuple["Body", str]:
        """Where a value was computed: seen through renaming, and out of loops that hand it on as it is."""
        line = self.lines.get(name)
        if line is None:
            return self, name
        if line.opcode in SAME:
            return self.origin(line.operands[0])
        if line.opcode == "get-tuple-element":
            whole = self.lines.get(line.operands[0])
            if whole is not None and whole.opcode == "while":
                (name_of_body,) = whole.called("body")
                if line.index in Body(self.program, name_of_body).unchanged:
                    whole = self.lines.get(whole.operands[0])
            if whole is not None and whole.opcode == "tuple":
                return self.origin(whole.operands[line.index])
            if self._argument(name) is not None and self.loop is not None and line.index in self.unchanged:
                whole = self.outer.lines[self.loop.operands[0]]
                if whole.opcode == "tuple":
                    return self.outer.origin(whole.operands[line.index])
        return self, name


@dataclass(frozen=True)
class Launch:
    """A kernel, and how often it runs."""

    body: Body
    line: hlo.Instruction
    inside: hlo.Computation  # of a fusion, what is fused; else empty
    times: int


def launches(program: Program, entry: str) -> Iterator[Launch]:
    """All kernels of the program, those of loops as often as the loop runs."""
    yield from _of(program, Body(program, entry), 1)


def _of(program: Program, body: Body, times: int) -> Iterator[Launch]:
    for line in body.lines.values():
        if line.opcode == "while":
            count = re.search(r'known_trip_count[^\d}]*"?n"?[^\d}]*(\d+)', line.attributes)
            for name in line.called("body"):
                inner = Body(program, name, body, line)
                yield from _of(program, inner, times * int(count[1] if count else 1))
        elif line.opcode in ("call", "conditional"):
            # one branch runs, and which is not known: the first stands for all
            for name in line.called("to_apply", "branch_computations", "true_computation")[:1]:
                yield from _of(program, Body(program, name), times)
        elif line.opcode not in FREE:
            called = line.called("calls")
            yield Launch(body, line, program.computations.get(called[0], {}) if called else {}, times)


# -------------------------------------------------------------------------------------------------------- conversions


@dataclass(frozen=True)
class Conversion:
    """A kernel's conversion of a value to another dtype."""

    launch: Launch
    value: tuple  # which one: where it was computed, and what part of it
    dtype: str  # that it becomes
    before: float  # bytes, of one run
    after: float
    written: bool  # the kernel writes the result, rather than only computing with it
    alone: bool  # the kernel does nothing else


def conversions(launch: Launch) -> Iterator[Conversion]:
    """Those of a kernel, fused ones included."""
    inside = launch.inside or {launch.line.name: launch.line}
    outputs = set(_outputs(inside)) if launch.inside else {launch.line.name}
    arrays = [line for line in inside.values() if any(array.size > 1 for array in hlo.arrays(line.shape))]
    alone = {line.opcode for line in arrays} <= {"convert", "parameter", "constant", "tuple", *SAME, *CUTS}
    for line in inside.values():
        if line.opcode != "convert":
            continue
        name, part = _source(inside, line.operands[0], launch)
        if name is None:
            continue
        body, name = launch.body.origin(name)
        (result,), source = hlo.arrays(line.shape), body.lines.get(name)
        whole = hlo.arrays(source.shape) if source is not None else []
        if len(whole) != 1 or whole[0].dtype == result.dtype:
            continue
        every = launch.times * result.size >= whole[0].size and (part is None or "dynamic" in part)
        value = (id(body.lines), name, "all" if part is None or every else part)
        before = result.size * whole[0].bytes / max(whole[0].size, 1)
        yield Conversion(launch, value, result.dtype, before, result.bytes, line.name in outputs, alone)


def _outputs(inside: hlo.Computation) -> Iterator[str]:
    """What a fusion writes, seen through what only renames it."""
    waiting = [line.name for line in inside.values() if line.root]
    while waiting:
        line = inside.get(waiting.pop())
        if line is not None:
            yield line.name
            waiting += line.operands if line.opcode in ("tuple", *SAME) else []


def _source(inside: hlo.Computation, name: str, launch: Launch) -> tuple[str | None, str | None]:
    """The operand of a kernel that a value inside of it is, or is cut out of: its name, and how it is cut."""
    part = None
    while True:
        line = inside.get(name)
        if line is None:
            return (name, part) if not launch.inside else (None, None)
        if line.opcode == "parameter":
            return (launch.line.operands[int(line.arguments)], part) if launch.inside else (name, part)
        if line.opcode in CUTS and part is None:
            cut = re.search(r"slice=\{[^}]*\}", line.attributes)
            part = cut[0] if cut else f"dynamic {line.shape} {line.operands[1:]}"
        elif line.opcode not in SAME:
            return None, None
        name = line.operands[0]


def repeated(found: list[Launch], least: float) -> dict[int, float]:
    """Bytes that a kernel need not move because the program has the converted value already, by its place in `found`.

    Where some kernel writes a value of at least `least` bytes in the other dtype, no other need do that; and what
    computes with it in the narrower dtype need not read the wider one.
    """
    groups = defaultdict(list)
    for number, launch in enumerate(found):
        for conversion in conversions(launch):
            if max(conversion.before, conversion.after) >= least:
                groups[conversion.value, conversion.dtype].append((number, conversion))
    saved: dict[int, float] = {}
    for group in groups.values():
        first = next((number for number, conversion in group if conversion.written), None)
        for number, c in group if first is not None else ():
            if number == first:
                continue
            if c.alone:
                saved[number] = c.before + c.after
            elif c.written or c.after < c.before:
                saved[number] = saved.get(number, 0.0) + (c.after if c.written else c.before - c.after)
    return saved
