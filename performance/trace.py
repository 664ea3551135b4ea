"""What a profiler's trace says of a compiled step: which operation ran when, what it does, where it comes from.

The names come from the program itself: `jax.named_scope`s of the model and the step reach the trace through the text of
the compiled step. CPU traces were seen, and of a GPU the names of kernels; those of TPUs are read as their profilers
document them. A GPU runs most of a step as command buffers (CUDA graphs), whose kernels do not say what they belong to
(openxla/xprof issues 2544 and 3070): those that XLA made are known by their names, those of libraries by kind alone.
"""

import re
from bisect import bisect
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from jax.profiler import ProfileData

from performance import hlo

# The scopes that model/ and training/ open; what else stands in an operation's name is JAX's own.
SCOPES = (
    *("embed", "block", "norm", "attention", "rope", "core", "ffn", "moe", "router", "dropout", "loss", "head"),
    *("clip", "optimizer"),
)
COLLECTIVES = (
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute"),
    *("collective-broadcast", "send", "recv"),
)
MOVES = {  # of a fusion that computes nothing
    *("copy", "copy-start", "copy-done", "transpose", "reshape", "bitcast", "slice", "dynamic-slice", "concatenate"),
    *("dynamic-update-slice", "pad", "reverse", "parameter", "constant", "tuple", "get-tuple-element"),
}
COMPUTE, COLLECTIVE, THREADS, ENGINE = range(4)  # who has a device's time first
CONTAINERS = ("while", "conditional", "call")  # whose time is that of what they contain
# ---------------------------------------------------------------------------------------------------------------------
# What an instruction is


@dataclass(frozen=True)
class Meaning:
    """What an instruction of the compiled step does, and where in the code it comes from."""

    kind: str  # matmul | collective | copy | elementwise
    scope: str  # block/attention/core; empty where the code names none
    source: str  # the last part of its name: a JAX primitive

    @property
    def category(self) -> str:
        """The row of the summary that its time belongs to."""
        scopes = self.scope.split("/")
        if self.kind in ("collective", "copy"):
            return {"collective": "collectives exposed", "copy": "copies"}[self.kind]
        if "core" in scopes:
            return "attention"
        if "loss" in scopes:
            return "loss"
        if {"clip", "optimizer"} & set(scopes):
            return "optimizer"
        return "matmul" if self.kind == "matmul" else "norms, elementwise"


UNKNOWN = Meaning("elementwise", "", "")


def scope_of(op_name: str) -> str:
    """The named scopes in a name that JAX gave: `jit(f)/transpose(jvp(loss))/head/dot_general` is in loss/head.

    An operation that the compiler made of several has their names with `;` between them: the first one's count.
    """
    bare = re.sub(r"\w+\(|\)", "", re.sub(r"jit\([^()]*\)", "", op_name.partition(";")[0]))
    names = [name for name in bare.split("/") if name in SCOPES]
    half = len(names) // 2
    return "/".join(names[half:] if names[:half] == names[half:] else names)  # what is recomputed has its scopes twice


class Program:
    """The compiled step's text, asked for the meaning of its instructions by name."""

    def __init__(self, text: str):
        self.module = re.match(r"HloModule ([\w.\-]+)", text)[1]
        self.computations, _ = hlo.parse(text)
        self.instructions = {name: i for body in self.computations.values() for name, i in body.items()}
        self._functions = {re.sub(r"\W", "_", name): name for name in self.instructions}
        self._meanings: dict[str, Meaning] = {}

    def named(self, kernel: str) -> str:
        """The instruction that a kernel was made for, by its name as a C function: loop_add_fusion_7 is of
        loop_add_fusion.7; the name itself where there is none.
        """
        return kernel if kernel in self.instructions else self._functions.get(kernel, kernel)

    def meaning(self, name: str) -> Meaning:
        """Of an instruction; UNKNOWN where the program has none of that name."""
        if name not in self._meanings:
            known = name in self.instructions
            self._meanings[name] = self._meaning(self.instructions[name]) if known else _unlisted(name)
        return self._meanings[name]

    def contained(self, name: str) -> set[str]:
        """The instructions of the computations that `name` runs, if it is a loop, a conditional or a call."""
        instruction = self.instructions.get(name)
        if instruction is None or instruction.opcode not in CONTAINERS:
            return set()
        return {inner.name for inner in self._inside(instruction)}

    def _inside(self, instruction: hlo.Instruction) -> list[hlo.Instruction]:
        keys = ("calls", "to_apply", "body", "condition", "branch_computations", "true_computation")
        called = instruction.called(*keys, "false_computation", "called_computations")
        return [inner for name in called for inner in self.computations.get(name, {}).values()]

    def _meaning(self, instruction: hlo.Instruction) -> Meaning:
        wraps = instruction.opcode in ("fusion", "call") or instruction.opcode.startswith("async-")
        parts = [instruction, *(self._inside(instruction) if wraps else ())]
        # a fusion may have lost its own name; its parts have theirs
        names = [part.scope for part in parts if part.scope and part.opcode != "parameter"]
        scoped = [name for name in names if scope_of(name)]
        name = instruction.scope if instruction.scope in scoped else next(iter(scoped[:1] or names[:1]), "")
        source = name.partition(";")[0].rpartition("/")[2].rstrip(")")
        return Meaning(self._kind(instruction, parts), scope_of(name), source)

    def _kind(self, instruction: hlo.Instruction, parts: list[hlo.Instruction]) -> str:
        opcodes = {part.opcode.removesuffix("-start").removesuffix("-done") for part in parts}
        targets = "".join(re.findall(r'custom_call_target="([^"]*)"', " ".join(part.attributes for part in parts)))
        if opcodes & {"dot", "convolution"} or re.search(r"matmul|gemm|fmha|conv|dot", targets, re.IGNORECASE):
            return "matmul"
        if opcodes & set(COLLECTIVES):
            return "collective"
        moves = opcodes - {"fusion", "call"} <= MOVES and instruction.opcode != "parameter"
        return "copy" if moves else "elementwise"


def _unlisted(name: str) -> Meaning:
    """Of an event that names no instruction, as the kernels of a GPU may: by its own name."""
    if re.match("|".join(("nccl", *COLLECTIVES)), name, re.IGNORECASE):
        return Meaning("collective", "", name)
    if re.search("sdpa|fmha|flash|dot_do_o|convert_dq", name):  # before matmuls, whose words they have, too
        return Meaning("matmul", "attention/core", name)
    if re.search("nvjet|gemm|cutlass|cublas|splitk", name, re.IGNORECASE):
        return Meaning("matmul", "", name)
    return Meaning("copy", "", name) if re.match("memcpy|memset", name, re.IGNORECASE) else UNKNOWN


# ---------------------------------------------------------------------------------------------------------------------
# What the trace holds


@dataclass(frozen=True)
class Event:
    """An operation that ran on a device of this process, from `start` to `end`, in ns."""

    device: str
    name: str  # the instruction's
    start: float
    end: float
    module: str = ""  # the program's; empty where the trace does not say
    beside: str = ""  # "engine": on one of its own, beside compute; "threads": after its call has returned


def read_events(path: Path) -> list[Event]:
    """The operations in a profiler's file (.xplane.pb): of its accelerators if it has some, else of the CPU's devices.

    A CPU's operation may go on in other threads, or wait for one, after its call has returned: an event `end: NAME`
    tells until when. That part is beside "threads", since other operations may run meanwhile.
    """
    planes = list(ProfileData.from_file(str(path)).planes)
    accelerators = [plane for plane in planes if plane.name.startswith("/device:")]
    events = [event for plane in accelerators for event in _accelerator_events(plane)]
    if events:
        return events
    begun, ended = [], {}
    for line in (line for plane in planes if plane.name == "/host:CPU" for line in plane.lines):
        for event in line.events:
            name = event.name
            if name.startswith("end: "):
                ended[dict(event.stats).get("_c")] = event.start_ns
            elif "::" not in name and " " not in name:  # the runtime's own events, of which there are many
                stats = dict(event.stats)
                if "hlo_op" in stats:
                    begun.append((stats, event.start_ns, event.end_ns))
    for stats, start, end in begun:
        device, name, module = f"CPU:{stats['device_ordinal']}", stats["hlo_op"], stats["hlo_module"]
        events.append(Event(device, name, start, end, module))
        if (late := ended.get(stats.get("_p"), 0)) > end:
            events.append(Event(device, name, end, late, module, "threads"))
    return events


def _accelerator_events(plane) -> Iterable[Event]:
    """Of a GPU the kernels and copies of its streams, of a TPU its core's operations and those started ahead."""
    lines = list(plane.lines)
    modules = sorted(
        (event.start_ns, event.end_ns, event.name.partition("(")[0])
        for line in lines
        if line.name == "XLA Modules"
        for event in line.events
    )
    for line in lines:
        if not line.name.startswith(("Stream", "XLA Ops", "Async XLA Ops")):
            continue
        if line.name == "XLA Ops" and ":GPU:" in plane.name:  # drawn from the streams: it would count twice
            continue
        for event in line.events:
            stats = dict(event.stats)
            whole = str(stats.get("hlo_op") or event.name)
            if whole.startswith("command_buffer"):
                whole = event.name
            name = re.match(r"%?([^\s=]*)", whole)[1]  # a TPU's are whole lines: %fusion.1 = f32[8] fusion(...)
            apart = line.name.startswith("Async") or re.match("memcpy|memset", event.name, re.IGNORECASE)
            module = str(stats.get("hlo_module") or _running(modules, event.start_ns)).partition("(")[0]
            yield Event(plane.name, name, event.start_ns, event.end_ns, module, "engine" if apart else "")


def _running(modules: list[tuple[float, float, str]], time: float) -> str:
    """The program that a TPU's core ran at a time; empty between programs, and where the trace does not say."""
    place = bisect(modules, time, key=lambda module: module[0]) - 1
    return modules[place][2] if place >= 0 and time < modules[place][1] else ""


# ---------------------------------------------------------------------------------------------------------------------
# What both say together


@dataclass
class Shares:
    """Device time in ns, over all devices; every instant of every device's window is counted once."""

    devices: int
    window: float  # from the first operation of the step's program to its last, the same for all devices
    operations: Counter  # by instruction; of other programs under None
    counts: Counter  # how often each ran
    idle: float
    overlapped: float  # of collectives while the device computes: part of what it computes, and not counted again


def shares(events: list[Event], program: Program) -> Shares:
    """Splits the devices' time among operations, as `_sweep` does. Raises ValueError if none is the program's."""
    events = [replace(event, name=program.named(event.name)) for event in events]
    # a kernel of which the trace does not say more is the program's, too
    ours = [e for e in events if e.module in (program.module, "")]
    named = [e for e in ours if e.name in program.instructions]
    if not named:
        raise ValueError(f"it has no operation of {program.module}")
    begin, end = min(e.start for e in named), max(e.end for e in named)
    seen = {e.name for e in named}
    hollow = {name for name in seen if program.contained(name) & seen}
    by_device, counts = defaultdict(list), Counter()
    for event in events:
        known = event.module in (program.module, "")
        if event.start < end and event.end > begin and not (known and event.name in hollow):
            collective = known and program.meaning(event.name).kind == "collective"
            rank = COLLECTIVE if collective else {"": COMPUTE, "engine": ENGINE, "threads": THREADS}[event.beside]
            span = max(event.start, begin), min(event.end, end), rank, event.name if known else None
            by_device[event.device].append(span)
            counts[span[3]] += not event.beside
    total = Shares(len(by_device), end - begin, Counter(), counts, 0.0, 0.0)
    for spans in by_device.values():
        _sweep(spans, begin, end, total)
    return total


def _sweep(spans: list[tuple[float, float, int, str | None]], begin: float, end: float, total: Shares) -> None:
    """Adds one device's spans (start, end, rank, name) to the total.

    What computes comes before collectives, these before the rest. What runs on in threads shares with what computes,
    but hides no collective: it may only wait for the thread that the collective holds.
    """
    edges = [(start, True, i) for i, (start, *_) in enumerate(spans)]
    edges += [(stop, False, i) for i, (_, stop, *_) in enumerate(spans)]
    active, now = {rank: set() for rank in (COMPUTE, COLLECTIVE, THREADS, ENGINE)}, begin
    for time, starts, i in [*sorted(edges, key=lambda edge: edge[0]), (end, False, None)]:
        running = next((those for those in active.values() if those), ())
        running = running | active[THREADS] if active[COMPUTE] else running
        for j in running:
            total.operations[spans[j][3]] += (time - now) / len(running)
        total.idle += 0 if running else time - now
        total.overlapped += time - now if active[COMPUTE] and active[COLLECTIVE] else 0
        now = time
        if i is not None:
            (active[spans[i][2]].add if starts else active[spans[i][2]].discard)(i)
