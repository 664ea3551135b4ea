"""What a layout costs: memory, seconds by part, throughput, money. The sum of work, traffic, bubble and memory.

A search weighs a hundred thousand layouts, of which most share all but their schedule: `Planner.base` keeps what these
share.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from config.schema import Config
from model.counts import flops_per_token
from planner import bubble, traffic
from planner.layout import Layout
from planner.machine import BYTES, Lines, Machine, lines
from planner.memory import Memory, MemoryModel, state_bytes
from planner.parameters import Held, Parameters
from planner.software import Software
from planner.traffic import BACKWARD, EACH, FORWARD, ONCE, Exchange
from planner.work import Work

# Of a step: stragglers, clocks that drop, the host. The median of what published tables took longer than counted.
UNCOUNTED = 0.06


@dataclass(frozen=True, slots=True)
class Prediction:
    """A layout and what it costs. `seconds` by part add up to a step."""

    layout: Layout
    memory: Memory
    limit: float  # bytes that a device has for it
    # matmul, attention, memory, kernels, optimizer, bubble, uncounted; exchanges that computation waits for, by axis
    seconds: dict[str, float]
    hidden: dict[str, float]  # seconds of exchanges that run beside computation, by axis
    exchanges: list[Exchange]
    flops: float  # of the model, a step, all devices
    hardware_flops: float  # with what is computed again
    peak: float  # FLOP/s of all devices
    tokens: float  # a step

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return sum(self.seconds.values())

    @property
    def fits(self) -> bool:
        """Whether it fits into a device."""
        return self.memory.total <= self.limit

    @property
    def mfu(self) -> float:
        """Model FLOP/s over the peak."""
        return self.flops / self.step / self.peak

    @property
    def hfu(self) -> float:
        """The same with what is computed again."""
        return self.hardware_flops / self.step / self.peak

    @property
    def tokens_per_s(self) -> float:
        """Of all devices."""
        return self.tokens / self.step

    def device_hours(self, tokens: float) -> float:
        """For a run of so many tokens, without failures."""
        return tokens / self.tokens_per_s / 3600 * self.layout.devices


@dataclass(frozen=True, slots=True)
class Base:
    """What layouts share that differ in their schedule and moments alone."""

    held: Held
    work: dict[str, float]  # seconds of a step, by kind of computation
    shown: dict[str, float]  # exchanges that computation waits for, by axis
    hidden: dict[str, float]
    together: float  # seconds of a step that the two before add up to
    stage: tuple[float, float, float]  # of one microbatch on one stage: forward, backward, gradients of weights
    tick: float  # of a pipeline's exchange between neighbours
    exchanges: list[Exchange]
    flops: float  # of the hardware, all devices
    memory: MemoryModel


class Planner:
    """Predicts layouts of one run on one kind of machine."""

    def __init__(self, config: Config, machine: Machine, devices: int, software: Software):
        self.config, self.model, self.devices, self.software = config, config.model, devices, software
        self.machine, train = machine.among(devices), config.train
        self.dtype = train.compute_dtype_on(machine.platform)
        self.element, self.param_bytes = BYTES[self.dtype], BYTES[train.param_dtype]
        self.work = Work(self.model, train.seq_len, self.dtype, self.machine, software)
        self.parameters = Parameters(self.model)
        self.tokens = float(train.batch_size * train.seq_len)
        self.flops = flops_per_token(self.model, train.seq_len) * self.tokens
        self.peak = self.machine.peak(self.dtype) * devices
        self._layer = lru_cache(1 << 14)(self.work.layer)
        self._lines = lru_cache(16)(lambda sizes: lines(self.machine, dict(sizes)))
        self._base = lru_cache(1 << 12)(self._base_of)
        self._held = lru_cache(1 << 10)(self._held_by)

    def lines(self, layout: Layout) -> Mapping[str, Lines]:
        """How the axes lie on the networks."""
        return self._lines(tuple(layout.sizes.items()))

    def rows(self, layout: Layout) -> int:
        """Layers of the fullest stage. In lockstep every chunk counts as the fullest: all wait for it, and as many rows
        are stored (parallel.pipeline.run.slots).
        """
        base, more = divmod(self.model.layers, layout.pipe * layout.chunks)
        if self.software.lockstep:
            return (base + (more > 0)) * layout.chunks
        return base * layout.chunks + -(-more // layout.pipe)

    def weigh(self, layout: Layout) -> tuple[float, float]:
        """Seconds of a step and bytes of a device: those of `predict`, quickly."""
        base = self.base(layout)
        seconds = base.together + self._update(layout, base) + self._waits(layout, base)
        return seconds * (1 + UNCOUNTED), base.memory.total(*self._kept(layout))

    def state_bytes(self, layout: Layout) -> float:
        """Bytes of a device for parameters, moments and gradients alone, on the mesh of a layout."""
        rows = -(-self.model.layers // layout.pipe)
        sizes = (layout.pipe, layout.data, layout.fsdp, layout.expert, layout.context, layout.tensor)
        return state_bytes(self, layout, self._held(sizes, rows).stored, self._moment_bytes(layout))

    def saved_by_halving(self, layout: Layout) -> float:
        """Bytes that moments in 16 bits save a device."""
        return self.base(layout).memory.halved(self._moment_bytes(layout))

    def predict(self, layout: Layout) -> Prediction:
        """The cost of a layout that is legal."""
        base = self.base(layout)
        seconds = {**base.work, "optimizer": self._update(layout, base)}
        if layout.pipe > 1:
            seconds["bubble"] = self._waits(layout, base, exchanging=False)
        seconds |= base.shown
        if layout.pipe > 1 and self.software.lockstep:
            ticks = bubble.ticks(layout.schedule, layout.pipe, layout.microbatches, layout.chunks)
            seconds["pipe"] = seconds.get("pipe", 0.0) + ticks * base.tick
        seconds["uncounted"] = UNCOUNTED * sum(seconds.values())
        memory = base.memory.of(*self._kept(layout))
        totals = (self.flops, base.flops, self.peak, self.tokens)
        return Prediction(layout, memory, self.machine.limit, seconds, base.hidden, base.exchanges, *totals)

    # ------------------------------------------------------------------------------------------- what a schedule adds

    def _update(self, layout: Layout, base: Base) -> float:
        """Seconds of the optimizer."""
        stored = base.held.stored / (layout.data * layout.context if self.software.moments_over_data else 1)
        return self.work.optimizer(stored, self._moment_bytes(layout), self.param_bytes, self.config.optimizer.name)

    def _moment_bytes(self, layout: Layout) -> int:
        return 2 if layout.moment_dtype == "bfloat16" else self.param_bytes

    def _kept(self, layout: Layout) -> tuple[bubble.Slots, int]:
        return bubble.slots(layout.schedule, layout.pipe, layout.microbatches, layout.chunks), self._moment_bytes(
            layout
        )

    def _waits(self, layout: Layout, base: Base, *, exchanging: bool = True) -> float:
        """Seconds in which a stage has nothing to do, and those of exchanges in lockstep."""
        if layout.pipe == 1:
            return 0.0
        sizes = layout.schedule, layout.pipe, layout.microbatches, layout.chunks
        idle = bubble.seconds(*sizes, *base.stage, self.software.lockstep) - layout.microbatches * sum(base.stage)
        ticks = bubble.ticks(*sizes) * base.tick if exchanging and self.software.lockstep else 0.0
        return max(idle, 0.0) + ticks

    # ---------------------------------------------------------------------------------------------- what layouts share

    def base(self, layout: Layout) -> Base:
        """All that does not depend on the schedule, nor on how moments are kept."""
        chunks = 1 if self.software.lockstep else layout.chunks
        sizes = (layout.pipe, layout.data, layout.fsdp, layout.expert, layout.context, layout.tensor)
        return self._base(sizes, layout.microbatches, layout.remat, layout.style, self.rows(layout), chunks)

    def _base_of(self, sizes, microbatches: int, remat: str, style: str, rows: int, chunks: int) -> Base:
        layout = Layout(*sizes, microbatches=microbatches, remat=remat, style=style, chunks=chunks)
        train, M = self.config.train, microbatches
        held = self._held(sizes, rows)
        sequences = train.batch_size / (layout.shards * M)
        tokens = sequences * train.seq_len / layout.context
        experts_here = self.model.experts / layout.expert if self.model.experts else 1.0
        fused = self.work.fused_on(layout)
        across = fused and self.work.ours and layout.context > 1
        layer = self._layer(tokens, layout.tensor, remat, experts_here, fused, across)
        spread = layout.pipe if self.software.ends_on_all_stages else 1
        chunked = self.logit_parts(layout) > 1
        head = self.work.head(tokens, layout.tensor * spread, chunked=chunked)
        found = self._exchanges(layout, held, tokens, rows, chunked)
        back = layer.backward + layer.weight
        room = {FORWARD: layer.forward.seconds, BACKWARD: back.seconds, EACH: head.seconds, ONCE: rows * back.seconds}
        if self.software.moments_over_data:  # parameters are gathered beside the next step's forward
            room[ONCE] += rows * layer.forward.seconds
        often = {FORWARD: M * rows, BACKWARD: M * rows, EACH: M, ONCE: 1}
        exposed, shown, hidden = traffic.exposed(found, room, often)
        work = (layer.forward + back).times(rows) + head
        copied = self._stacking(layout, tokens) * rows
        work_of = {"matmul": M * work.matmul, "attention": M * work.attention}
        work_of |= {"memory": M * (work.memory + copied), "kernels": M * work.kernels}
        stage = (
            rows * (layer.forward.seconds + exposed[FORWARD]) + copied / 2,
            rows * (layer.backward.seconds + exposed[BACKWARD]) + copied / 2,
            rows * layer.weight.seconds,
        )
        tick = self.lines(layout)["pipe"].shift(tokens * self.model.width * self.element / layout.tensor)
        flops = layer.forward.flops + back.flops
        flops = M * self.devices * (self.model.layers / layout.pipe * flops + head.flops * spread / layout.pipe)
        memory = MemoryModel(self, layout, held, sequences, rows)
        together = sum(work_of.values()) + sum(shown.values())
        return Base(held, work_of, shown, hidden, together, stage, tick, found, flops, memory)

    def _held_by(self, sizes: tuple[int, ...], rows: int) -> Held:
        """Parameters of a device, on a mesh of these sizes."""
        return self.parameters.held(self.splitting(Layout(*sizes)).sizes, rows)

    def splitting(self, layout: Layout) -> Layout:
        """The layout as parameters see it: where fsdp splits them over the ranks of context too, with all as fsdp's."""
        if not self.software.weights_over_context or layout.context == 1:
            return layout
        return replace(layout, fsdp=layout.fsdp * layout.context, context=1)

    def _stacking(self, layout: Layout, tokens: float) -> float:
        """Seconds in which a scan over layers copies what a layer keeps into a stack, and out again: on GPUs."""
        ours = self.software.name == "isomesh" and self.machine.platform == "gpu"
        if not ours or not self.model.scan_layers or layout.pipe > 1:
            return 0.0
        kept = self.work.kept(layout.tensor, layout.remat) * tokens * self.element
        return 4 * kept / self.work.bandwidth

    def logit_parts(self, layout: Layout) -> int:
        """Into how many parts the vocabulary is cut (model.heads.vocabulary_parts)."""
        chunk = self.config.train.loss_chunk
        return -(-self.config.train.seq_len // (chunk * layout.context * layout.tensor)) if chunk else 1

    def _exchanges(self, layout: Layout, held: Held, tokens: float, rows: int, chunked: bool) -> list[Exchange]:
        """What the devices exchange."""
        gradient = self.element if self.software.gradient_bytes == 2 else 4
        if layout.pipe > 1 and self.software.lockstep and layout.data > 1:  # added up over microbatches first
            gradient = 4
        job = traffic.Sizes(tokens, self.element, gradient, held.layer, held.experts, held.tables, rows, chunked)
        found = traffic.exchanges(self.model, layout, self.lines(layout), self.software, job)
        splitting = self.splitting(layout)
        if splitting is not layout:  # context's ranks share their gradients out with fsdp's
            wide = traffic.exchanges(self.model, splitting, self.lines(splitting), self.software, job)
            own = [e for e in found if e.axis != "fsdp" and (e.axis, e.kind) != ("context", traffic.GRADIENTS)]
            found = [e for e in wide if e.axis == "fsdp"] + own
        return found
