"""The least time of a compiled program, by kernel: what each must read, write and multiply, and what need not be.

A kernel is a fusion, a matmul, a copy or a custom call of the program's text. Its least time is the larger of its bytes
over the memory's bandwidth and its FLOPs over the peak. A kernel that does what a better program would not do at all is
marked with the reason; such marks are hints to look at, found by what arrays look like. Collectives have their memory
traffic counted and not the network's.
"""

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, replace

from performance import hlo
from performance.launches import Launch, launches, repeated
from performance.trace import Program

LARGE = 8e6  # bytes: smaller arrays cost less than a launch
CUTS = ("dynamic-slice", "slice", "gather")
PASSING = ("bitcast", "convert", "select", "broadcast", "add", "multiply", "reshape", "copy")  # each element for itself
AREAS = (  # the first that is among a kernel's scopes names its row
    ("norm", "norms"), ("core", "attention kernel"), ("attention", "attention projections"), ("ffn", "ffn"),
    ("moe", "experts"), ("loss", "head and loss"), ("head", "head and loss"), ("embed", "embedding"),
    ("clip", "clipping"), ("optimizer", "optimizer"),
)  # fmt: skip


@dataclass(frozen=True)
class Machine:
    """What a device can do at best."""

    name: str
    flops: float  # FLOP/s of 16-bit matmuls
    bandwidth: float  # bytes/s of its memory
    source: str


MACHINES = {
    "h100": Machine("NVIDIA H100 SXM", 989.4e12, 3.35e12, "NVIDIA H100 data sheet"),
    "h200": Machine("NVIDIA H200 SXM", 989.4e12, 4.8e12, "NVIDIA H200 data sheet"),
    "h200-measured": Machine("NVIDIA H200, measured", 802e12, 4.3e12, "matmul of 8,192 and a copy, experiments/LOG.md"),
    "a100": Machine("NVIDIA A100 SXM 80 GB", 312e12, 2.039e12, "NVIDIA A100 data sheet"),
    "v5p": Machine("TPU v5p", 459e12, 2.765e12, "Google Cloud TPU v5p specification"),
}


@dataclass(frozen=True)
class Kernel:
    """One kernel of the program, and what it costs each time that it runs."""

    name: str
    area: str
    kind: str  # matmul | collective | copy | elementwise
    source: str  # the JAX primitive that it comes from
    bytes: float
    flops: float
    times: int  # a step
    mark: str  # what a better program would not do; empty: nothing is known
    avoidable: float = 0.0  # bytes of these that are for that

    def seconds(self, machine: Machine) -> float:
        """The least time of all its runs in a step."""
        return self.times * max(self.bytes / machine.bandwidth, self.flops / machine.flops)

    def avoidable_seconds(self, machine: Machine) -> float:
        """What of it a better program would not take."""
        rest = max((self.bytes - self.avoidable) / machine.bandwidth, self.flops / machine.flops)
        return max(self.seconds(machine) - self.times * rest, 0.0)


def kernels(text: str) -> list[Kernel]:
    """The kernels of `compiled.as_text()`, those of loops as often as the loop runs."""
    program = Program(text)
    found = list(launches(program, hlo.parse(text)[1]))
    plain = [_kernel(program, launch) for launch in found]
    logits = max(map(_logits, found, plain), default=0)
    again = repeated(found, LARGE)
    return [
        _marked(launch, kernel, logits, again.get(number, 0.0))
        for number, (launch, kernel) in enumerate(zip(found, plain, strict=True))
        if kernel is not None
    ]


def _kernel(program: Program, launch: Launch) -> Kernel | None:
    """Without a mark; None for what costs nothing."""
    body, i, inside = launch.body.lines, launch.line, launch.inside
    meaning = program.meaning(i.name)
    moved = _traffic(body, i, inside)
    flops = _flops(body, i) + sum(_flops(inside, part) for part in inside.values())
    if not moved and not flops:
        return None
    scopes = set(meaning.scope.split("/"))
    area = next((row for scope, row in AREAS if scope in scopes), "other")
    return Kernel(i.name, area, meaning.kind, meaning.source, moved, flops, launch.times, "")


def _traffic(body: hlo.Computation, i: hlo.Instruction, inside: hlo.Computation) -> float:
    """Bytes that a kernel must read and write: of an array that it cuts or updates, the part that it touches."""
    parameters = {int(part.arguments): name for name, part in inside.items() if part.opcode == "parameter"}
    read, updated = 0.0, 0.0
    for place, name in enumerate(i.operands):
        if name not in body or body[name].shape.startswith("(") or name in i.operands[:place]:
            continue
        whole = _bytes(body[name].shape)
        within, seen = (inside, parameters[place]) if place in parameters else ({**body, i.name: i}, name)
        users = [i] if within is not inside else hlo.users(seen, inside)
        if users and all(user.opcode == "dynamic-update-slice" and user.operands[0] == seen for user in users):
            updated += whole  # only the update is written, and the rest not even read
            read += sum(_bytes(within[user.operands[1]].shape) for user in users if user.operands[1] in within)
        else:
            cuts = _cuts(seen, users, within) if within is inside or i.opcode in CUTS else None
            read += whole if cuts is None else min(whole, cuts)
    return read + max(_written(i) - updated, 0)


def _cuts(name: str, users: list[hlo.Instruction], inside: hlo.Computation) -> float | None:
    """The bytes that a fusion takes out of an array, if all that it does with it ends in cuts; else None."""
    total = 0.0
    for user in users:
        if user.opcode in CUTS:
            total += _bytes(user.shape)
        elif user.opcode in PASSING and (more := _cuts(user.name, hlo.users(user.name, inside), inside)) is not None:
            total += more
        else:
            return None
    return total if users else None


def _written(i: hlo.Instruction) -> float:
    shape = i.shape
    if i.opcode.endswith("-start"):  # (what goes in, what comes out, how far it is)
        shape = _second(shape)
    if i.opcode == "custom-call" or "custom-call" in i.attributes or "kCustom" in i.attributes:
        shape = re.sub(r"\b[su]8\[\d+\]", "", shape)  # where it works
    return _bytes(shape)


def _second(shape: str) -> str:
    """The second element of a tuple's shape."""
    depth, parts = 0, [""]
    for character in shape[1:-1]:
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(character, 0)
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts[1] if len(parts) > 1 else shape


def _bytes(shape: str) -> float:
    return sum(array.bytes for array in hlo.arrays(shape))


def _dims(computation: hlo.Computation, name: str) -> tuple[int, ...]:
    found = hlo.arrays(computation[name].shape) if name in computation else []
    return found[0].dims if found else ()


def _product(numbers) -> int:
    total = 1
    for number in numbers:
        total *= number
    return total


def _flops(computation: hlo.Computation, i: hlo.Instruction) -> float:
    """Of a matmul or an attention kernel; elementwise work is not what a kernel waits for."""
    target = re.search(r'custom_call_target="([^"]*)"', i.attributes)
    if i.opcode == "convolution":
        return _flops_of_convolution(computation, i)
    if i.opcode not in ("dot", "custom-call") or not i.operands:
        return 0.0
    first = _dims(computation, i.operands[0])
    if target and "fmha" in target[1]:  # cuDNN's attention: scores and their product with the values
        scores = re.search(r'"intermediate_tensor_shape":\s*{[^\[{]*"dimensions":\s*\[([^\]]*)\]', i.attributes)
        size = _product(int(n) for n in re.findall(r"\d+", scores[1])) if scores else 0
        causal = 0.5 if "CAUSAL" in i.attributes else 1.0
        return causal * (10 if "Backward" in target[1] else 4) * size * (first[-1] if first else 0)
    contracted = re.search(r'lhs_contracting_dim(?:s|ensions)"?[=:]\s*[{\[]([^}\]]*)[}\]]', i.attributes)
    if not contracted or (target and "matmul" not in target[1] and "gemm" not in target[1]):
        return 0.0
    result = hlo.arrays(i.shape)[0].size
    return 2.0 * result * _product(first[int(n)] for n in re.findall(r"\d+", contracted[1]) if int(n) < len(first))


def _flops_of_convolution(computation: hlo.Computation, i: hlo.Instruction) -> float:
    """What TPUs make of a matmul. A dim of a batch becomes one of a window: of its places only one meets a number, the
    others the zeros between."""
    labels = re.search(r"dim_labels=\w+_(\w+)->", i.attributes)
    if not labels or len(i.operands) < 2:
        return 0.0
    weights = _dims(computation, i.operands[1])
    if len(weights) != len(labels[1]):
        return 0.0
    met = _product(size for label, size in zip(labels[1], weights, strict=True) if label != "o")
    spread = re.search(r"lhs_dilate=([\dx]+)", i.attributes)
    batches = _product(int(n) for n in spread[1].split("x")) if spread else 1
    return 2.0 * hlo.arrays(i.shape)[0].size * max(met // batches, 1)


# ----------------------------------------------------------------------------------- what a better program would not do


def _logits(launch: Launch, kernel: Kernel | None) -> int:
    """The elements of the logits that a matmul of the forward pass writes; 0 for other kernels."""
    if kernel is None or (kernel.area, kernel.kind) != ("head and loss", "matmul"):
        return 0
    if any(map(_backward, (launch.line, *launch.inside.values()))):
        return 0
    return max((array.size for array in _arrays_written(launch.line) if array.dtype not in ("s8", "u8")), default=0)


def _backward(line: hlo.Instruction) -> bool:
    return "transpose(" in (line.scope or "")


def _marked(launch: Launch, kernel: Kernel, logits: int, again: float) -> Kernel:
    """The kernel with what speaks against it; `logits` are the elements of the logits, `again` see `repeated`."""
    whole = lambda mark: replace(kernel, mark=mark, avoidable=kernel.bytes)
    i, written = launch.line, _arrays_written(launch.line)
    opcodes = {part.opcode for part in launch.inside.values()} | {i.opcode}
    large = any(array.bytes >= LARGE for array in written)
    if large and opcodes <= {"fusion", "broadcast", "constant", "copy"} and not i.operands:
        return whole("zeros that are filled later")
    if again:
        return replace(kernel, mark="converted a second time", avoidable=min(again, kernel.bytes))
    if large and kernel.kind == "copy":
        return whole(_moved(launch, opcodes))
    if kernel.area == "head and loss":
        wide = [a for a in (*written, *_arrays_read(launch)) if a.dtype == "f32" and a.size == logits]
        bytes_of_wide = sum(array.bytes for array in wide)
        return replace(kernel, mark="logits in float32", avoidable=bytes_of_wide / 2) if bytes_of_wide else kernel
    if not large or kernel.kind != "elementwise" or kernel.area in ("optimizer", "clipping"):
        return kernel
    if any(array.dtype == "f32" and array.bytes >= LARGE for array in written):
        return whole("float32 between kernels")
    return whole("written and read again") if _only_passed_on(launch) else kernel


def _moved(launch: Launch, opcodes: set[str]) -> str:
    """The mark of a kernel that computes nothing."""
    if "transpose" in opcodes:
        return "transposed"
    source = launch.body.lines.get(launch.line.operands[0]) if launch.line.operands else None
    order = lambda shape: re.findall(r"\]\{([\d,]+)", shape)[:1]
    if launch.line.opcode == "copy" and source is not None and order(source.shape) != order(launch.line.shape):
        return "laid out anew"
    return "copied"


def _only_passed_on(launch: Launch) -> bool:
    """Whether one elementwise kernel of the same pass is all that reads what this one writes: they could be one."""
    readers = launch.body.users[launch.line.name]
    if len(readers) != 1 or launch.line.shape.startswith("("):
        return False
    (reader,) = readers
    backward = lambda line: "transpose(" in (line.scope or "")
    fused = reader.opcode == "fusion" and "kind=kLoop" in reader.attributes
    return (
        fused
        and "reduce" not in {part.opcode for part in launch.inside.values()}
        and backward(reader) == backward(launch.line)
    )


def _arrays_written(i: hlo.Instruction) -> list[hlo.Array]:
    return hlo.arrays(_second(i.shape) if i.opcode.endswith("-start") else i.shape)


def _arrays_read(launch: Launch) -> list[hlo.Array]:
    lines = launch.body.lines
    named = [name for name in dict.fromkeys(launch.line.operands) if name in lines]
    return [array for name in named if not lines[name].shape.startswith("(") for array in hlo.arrays(lines[name].shape)]


# -------------------------------------------------------------------------------------------------------- the tables


def by_area(found: list[Kernel], machine: Machine) -> dict[str, dict[str, float]]:
    """Milliseconds, gigabytes, teraFLOPs and kernels a step by area; `avoidable` of them in marked kernels."""
    rows: dict[str, Counter] = defaultdict(Counter)
    for kernel in found:
        ms = 1e3 * kernel.seconds(machine)
        rows[kernel.area].update(
            {
                "ms": ms,
                "GB": kernel.times * kernel.bytes / 1e9,
                "TFLOP": kernel.times * kernel.flops / 1e12,
                "matmul ms": ms if kernel.flops else 0.0,
                "avoidable ms": 1e3 * kernel.avoidable_seconds(machine),
                "kernels": kernel.times,
            }
        )
    return dict(sorted(rows.items(), key=lambda row: -row[1]["ms"]))


def by_mark(found: list[Kernel], machine: Machine) -> dict[str, tuple[float, float]]:
    """Milliseconds and gigabytes a step that each mark says a better program would not have."""
    ms, size = Counter(), Counter()
    for kernel in found:
        if kernel.mark:
            ms[kernel.mark] += 1e3 * kernel.avoidable_seconds(machine)
            size[kernel.mark] += kernel.times * kernel.avoidable / 1e9
    return {mark: (ms[mark], size[mark]) for mark, _ in ms.most_common()}


def table(found: list[Kernel], machine: Machine, dearest: int = 10) -> str:
    """For people: by area, by mark, and the dearest kernels."""
    rows = by_area(found, machine)
    total = sum((Counter(row) for row in rows.values()), Counter())
    columns = ("ms", "matmul ms", "avoidable ms", "GB", "TFLOP", "kernels")
    head = f"{'':24}" + "".join(f"{column:>14}" for column in columns)
    line = lambda name, row: (
        f"{name:24}" + "".join(f"{row[c]:14.2f}" if c != "kernels" else f"{row[c]:14.0f}" for c in columns)
    )
    peak = f"{machine.flops / 1e12:.0f} TFLOP/s, {machine.bandwidth / 1e12:.2f} TB/s"
    lines = [f"least time of a step on {machine.name} ({peak}; {machine.source})", head]
    lines += [line(name, row) for name, row in rows.items()] + [line("a step", total)]
    lines += ["", f"{'a better program would not have':32}{'ms':>8}{'GB':>8}"]
    lines += [f"{mark:32}{ms:8.2f}{size:8.2f}" for mark, (ms, size) in by_mark(found, machine).items()]
    lines += ["", f"{'dearest kernels':48}{'ms':>8}{'times':>7}{'GB':>8}{'TFLOP':>8}  from"]
    for k in sorted(found, key=lambda k: -k.seconds(machine))[:dearest]:
        told = f"{k.area}, {k.source}" + (f": {k.mark}" if k.mark else "")
        figures = f"{1e3 * k.seconds(machine):8.2f}{k.times:7}{k.bytes / 1e9:8.2f}{k.flops / 1e12:8.2f}"
        lines.append(f"{k.name[:47]:48}{figures}  {told}")
    return "\n".join(lines)
