"""What devices exchange in a step, and how long it takes on the networks: the table of docs/parallelism.md, spelled out.

Volumes are those of ring algorithms; every exchange names its mesh axis, how often it happens and what may hide it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from model.config import ModelConfig
from planner.layout import Layout
from planner.machine import Lines
from planner.software import Software

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


def exchanges(
    model: ModelConfig,
    layout: Layout,
    lines: Mapping[str, Lines],
    software: Software,
    *,
    tokens: float,
    element: int,
    gradient_bytes: int,
    layer: float,
    experts: float,
    tables: float,
    rows: float,
    chunked: bool,
) -> list[Exchange]:
    """All exchanges of a layout.

    tokens: of a device in a microbatch, context shards apart. layer, experts: parameters of one layer that are no
    experts, and experts', on a device before fsdp splits them; tables: those outside the layers; rows: layers of a
    stage. element: bytes of the compute dtype; gradient_bytes: of a travelling gradient.
    """
    c, found = model, []
    full = layout.remat == "full" or (layout.remat == "attention" and not software.selective)

    def add(axis, kind, beside, times, size, seconds, overlap):
        if layout.sizes[axis] > 1 and times and size:
            found.append(Exchange(axis, kind, beside, times, size, seconds, overlap))

    stream = tokens * c.width * element
    y, line = layout.tensor, lines["tensor"]
    if y > 1:  # four gathers and four scatters a layer; remat repeats the forward ones, but for the last scatter
        once, again = line.seconds(stream), (3 if full else 0)
        part = stream * (y - 1) / y
        add("tensor", "gather and scatter", FORWARD, 4, part, once, software.overlap_tensor)
        add("tensor", "gather and scatter", BACKWARD, 4 + again, part, once, software.overlap_tensor)
        add("tensor", "gather and scatter", EACH, 4, part, once, software.overlap_tensor)
    z, line = layout.fsdp, lines["fsdp"]
    if z > 1:
        whole, share = (layer + experts) * element, (z - 1) / z
        repeated = layout.pipe == 1 or software.gathers_every_microbatch
        reduced = layout.pipe == 1 or software.reduces_every_microbatch
        gather = line.seconds(whole)
        scatter = line.seconds((layer + experts) * gradient_bytes)
        scattered = (layer + experts) * gradient_bytes * share
        if repeated:
            add("fsdp", "gather of weights", FORWARD, 1, whole * share, gather, software.overlap_fsdp)
            add("fsdp", "gather of weights", BACKWARD, 1, whole * share, gather, software.overlap_fsdp)
        else:
            add("fsdp", "gather of weights", ONCE, rows, whole * share, gather, software.overlap_fsdp)
        beside, times = (BACKWARD, 1) if reduced else (ONCE, rows)
        add("fsdp", "scatter of gradients", beside, times, scattered, scatter, software.overlap_fsdp)
        table = line.seconds(tables * element)
        times = (4 if chunked else 3) if repeated else 0
        beside = EACH if repeated else ONCE
        add("fsdp", "gather and scatter of tables", beside, max(times, 3), tables * element * share, table, software.overlap_fsdp)
    shard = (rows * layer + tables) / z
    shard_experts = rows * experts / z
    for axis, size in (("data", shard + shard_experts), ("expert", shard), ("context", shard + shard_experts)):
        n, line = layout.sizes[axis], lines[axis]
        if n == 1:
            continue
        moved = size * gradient_bytes
        every = axis != "data" and layout.pipe > 1 and software.reduces_every_microbatch or (
            layout.pipe == 1 and layout.microbatches > 1 and software.reduces_every_microbatch
        )
        travelled, taken = 2 * moved * (n - 1) / n, 2 * line.seconds(moved)
        if axis == "data" and software.moments_over_data:  # a scatter of gradients, a gather of parameters
            travelled, taken = (moved + size * element) * (n - 1) / n, line.seconds(moved) + line.seconds(size * element)
        overlap = 0.0 if layout.pipe > 1 and software.lockstep else software.overlap_data
        add(axis, "sum of gradients", EACH if every else ONCE, 1, travelled, taken, overlap)
    c_, line = layout.context, lines["context"]
    if c_ > 1:
        keys = tokens * c_ * c.kv_heads * c.head_dim / y  # of one of keys and values, all tokens
        if layout.style == "ulysses":
            sent = tokens * c.head_dim / y * element * (2 * c.heads + 2 * max(c.kv_heads, c_)) * (c_ - 1) / c_
            add("context", "all-to-all of heads", FORWARD, 1, sent, line.all_to_all(sent), software.overlap_context / 2)
            add("context", "all-to-all of heads", BACKWARD, 2, sent, line.all_to_all(sent), software.overlap_context / 2)
        else:
            part, over = (c_ - 1) / c_, software.overlap_context * (1 if layout.style == "ring" else 0.5)
            going = 2 * keys * element
            back = 2 * keys * (element + 4)
            steps = (c_ - 1) if layout.style == "ring" else 1
            late = line.latency * (steps - 1)
            forward, backward = line.seconds(going) + late, line.seconds(back) + late
            add("context", "keys and values", FORWARD, 1, going * part, forward, over)
            add("context", "keys, values, their gradients", BACKWARD, 1, back * part, backward, over)
            if full and layout.remat == "full":
                add("context", "keys and values again", BACKWARD, 1, going * part, forward, over)
    e, line = layout.expert, lines["expert"]
    if e > 1 and c.experts:
        sent = element * c.experts_per_token * stream / element * (e - 1) / e
        taken = line.all_to_all(element * c.experts_per_token * stream / element)
        add("expert", "tokens to experts and back", FORWARD, 2, sent, taken, software.overlap_expert)
        add("expert", "tokens to experts and back", BACKWARD, 4 if full else 2, sent, taken, software.overlap_expert)
    p, line = layout.pipe, lines["pipe"]
    if p > 1:
        boundary = stream / y
        taken = line.shift(boundary)
        overlap = software.overlap_pipe
        if not software.lockstep:
            add("pipe", "boundaries of stages", EACH, 2 * layout.chunks, boundary, taken, overlap)
        if software.ends_on_all_stages:  # embedded tokens, the last result, its gradient, the first gradient
            add("pipe", "sums for embedding and loss", EACH, 4, 2 * boundary * (p - 1) / p, 2 * line.seconds(boundary), 0.0)
    return found
