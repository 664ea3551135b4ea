"""What devices exchange in a step, and how long it takes on the networks: docs/parallelism.md spelled out.

Volumes are those of ring algorithms; every exchange names its mesh axis, how often it happens and what may hide it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from model.config import ModelConfig
from planner.layout import Layout
from planner.machine import Lines
from planner.software import Software

GRADIENTS = "sum of gradients"
FORWARD, BACKWARD, EACH, ONCE = "forward", "backward", "microbatch", "step"  # beside which computation it may run


@dataclass(frozen=True, slots=True)
class Exchange:
    """One kind of exchange."""

    axis: str
    kind: str
    beside: str  # FORWARD or BACKWARD of each layer and microbatch, EACH microbatch, ONCE a step
    times: float  # in each of these
    bytes: float  # that a device receives, each time
    seconds: float  # each time
    overlap: float  # share that may run beside computation

    @property
    def total(self) -> float:
        """Seconds in each of what it runs beside."""
        return self.times * self.seconds


@dataclass(frozen=True, slots=True)
class Sizes:
    """What exchanges are made of, on one device."""

    tokens: float  # of a microbatch, context shards apart
    element: int  # bytes of the compute dtype
    gradient: int  # bytes of a travelling gradient
    layer: float  # parameters of one layer that are no experts, before fsdp splits them
    experts: float  # those of its experts
    tables: float  # those outside the layers
    rows: float  # layers of a stage
    chunked: bool  # logits come in parts, and are computed again


def exchanges(
    model: ModelConfig, layout: Layout, lines: Mapping[str, Lines], software: Software, sizes: Sizes
) -> list[Exchange]:
    """All exchanges of a layout."""
    found: list[Exchange] = []
    for axis, rule in RULES.items():
        if getattr(layout, axis) > 1:
            rule(model, layout, lines[axis], software, sizes, lambda *what, at=axis: found.append(Exchange(at, *what)))
    return found


def exposed(found: list[Exchange], room: dict[str, float], often: Mapping[str, float]):
    """What computation waits for: seconds by what it runs beside, then of a step by axis; and what is hidden, by axis.

    `room` are the seconds of computation that each may hide behind, `often` how many of these a step has.
    """
    waits, shown, hidden = dict.fromkeys(room, 0.0), {}, {}
    for e in found:
        total = e.times * e.seconds
        may = min(e.overlap * total, room[e.beside])
        room[e.beside] -= may
        waits[e.beside] += total - may
        shown[e.axis] = shown.get(e.axis, 0.0) + often[e.beside] * (total - may)
        hidden[e.axis] = hidden.get(e.axis, 0.0) + often[e.beside] * may
    return waits, shown, hidden


Add = Callable[[str, str, float, float, float, float], None]


def _tensor(model: ModelConfig, layout: Layout, line: Lines, software: Software, s: Sizes, add: Add) -> None:
    """Four gathers and four scatters a layer; remat repeats the forward ones, but for the last scatter."""
    stream, y = s.tokens * model.width * s.element, layout.tensor
    again = 3 if layout.remat == "full" or (layout.remat == "attention" and not software.selective) else 0
    part, once = stream * (y - 1) / y, line.seconds(stream)
    for beside, times in ((FORWARD, 4), (BACKWARD, 4 + again), (EACH, 4)):
        add("gathers and scatters of tokens", beside, times, part, once, software.overlap_tensor)


def _fsdp(model: ModelConfig, layout: Layout, line: Lines, software: Software, s: Sizes, add: Add) -> None:
    """A gather for forward and for backward, a scatter of gradients; tables likewise, once a microbatch."""
    share, weights, over = (layout.fsdp - 1) / layout.fsdp, s.layer + s.experts, software.overlap_fsdp
    repeated = layout.pipe == 1 or software.gathers_every_microbatch
    reduced = layout.pipe == 1 or software.reduces_every_microbatch
    gather, scatter = line.seconds(weights * s.element), line.seconds(weights * s.gradient)
    for beside, times in ((FORWARD, 1), (BACKWARD, 1)) if repeated else ((ONCE, s.rows),):
        add("gathers of weights", beside, times, weights * s.element * share, gather, over)
    beside, times = (BACKWARD, 1) if reduced else (ONCE, s.rows)
    add("scatters of gradients", beside, times, weights * s.gradient * share, scatter, over)
    table, times = s.tables * s.element, 4 if s.chunked and repeated else 3
    add("tables", EACH if repeated else ONCE, times, table * share, line.seconds(table), over)


def _sum(axis: str):
    """Gradients of what an axis holds copies of, summed by a scatter and a gather."""

    def rule(model: ModelConfig, layout: Layout, line: Lines, software: Software, s: Sizes, add: Add) -> None:
        n, copied = getattr(layout, axis), s.layer + (s.experts if axis != "expert" else 0)
        held = (s.rows * copied + s.tables) / layout.fsdp
        gradients, parameters = held * s.gradient, held * s.element
        moved, seconds = 2 * gradients, 2 * line.seconds(gradients)
        if axis == "data" and software.moments_over_data:  # a scatter of gradients, a gather of parameters
            moved, seconds = gradients + parameters, line.seconds(gradients) + line.seconds(parameters)
        cut = layout.microbatches > 1 and software.reduces_every_microbatch
        every = cut and (layout.pipe == 1 or axis != "data")
        over = 0.0 if layout.pipe > 1 and software.lockstep else software.overlap_data
        add(GRADIENTS, EACH if every else ONCE, 1, moved * (n - 1) / n, seconds, over)

    return rule


def _context(model: ModelConfig, layout: Layout, line: Lines, software: Software, s: Sizes, add: Add) -> None:
    """Keys and values go round, or heads go across; and gradients are summed."""
    _sum("context")(model, layout, line, software, s, add)
    c, n, y, over = model, layout.context, layout.tensor, software.overlap_context
    if layout.style == "ulysses":
        heads = 2 * c.heads + 2 * max(c.kv_heads, n)
        sent = s.tokens * c.head_dim / y * s.element * heads
        for beside, times in ((FORWARD, 1), (BACKWARD, 3 if layout.remat == "full" else 2)):
            add("heads for tokens", beside, times, sent * (n - 1) / n, line.all_to_all(sent), over / 2)
        return
    keys = 2 * s.tokens * n * c.kv_heads * c.head_dim / y  # and values, of all tokens
    late, over = (line.latency * (n - 2), over) if layout.style == "ring" else (0.0, over / 2)
    going, back = keys * s.element, keys * (s.element + 4)
    once = line.seconds(going) + late
    add("keys and values", FORWARD, 1, going * (n - 1) / n, once, over)
    add("keys, values and their gradients", BACKWARD, 1, back * (n - 1) / n, line.seconds(back) + late, over)
    if layout.remat == "full":
        add("keys and values again", BACKWARD, 1, going * (n - 1) / n, once, over)


def _expert(model: ModelConfig, layout: Layout, line: Lines, software: Software, s: Sizes, add: Add) -> None:
    """Tokens travel to experts and back; and gradients of what is no expert are summed."""
    _sum("expert")(model, layout, line, software, s, add)
    if not model.experts:
        return
    sent, share = s.tokens * model.width * s.element * model.experts_per_token, (layout.expert - 1) / layout.expert
    taken, again = line.all_to_all(sent), 2 if layout.remat in ("full", "attention") else 0
    for beside, times in ((FORWARD, 2), (BACKWARD, 2 + again)):
        add("tokens to experts and back", beside, times, sent * share, taken, software.overlap_expert)


def _pipe(model: ModelConfig, layout: Layout, line: Lines, software: Software, s: Sizes, add: Add) -> None:
    """Boundaries (in lockstep they are a pipeline's ticks), and embedding and loss where all stages do them."""
    p, boundary = layout.pipe, s.tokens * model.width * s.element / layout.tensor
    if not software.lockstep:
        add("boundaries", EACH, 2 * layout.chunks, boundary, line.shift(boundary), software.overlap_pipe)
    if software.ends_on_all_stages:  # embedded tokens, the last result, its gradient, the first gradient
        add("sums for embedding and loss", EACH, 4, 2 * boundary * (p - 1) / p, 2 * line.seconds(boundary), 0.0)


RULES = {
    "tensor": _tensor,
    "fsdp": _fsdp,
    "data": _sum("data"),
    "expert": _expert,
    "context": _context,
    "pipe": _pipe,
}
