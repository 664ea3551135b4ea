"""What a layout costs: memory, seconds by part, throughput, money. The sum of work, traffic, bubble and memory."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from config.schema import Config
from model.counts import flops_per_token
from planner import bubble, traffic
from planner.layout import Layout
from planner.machine import BYTES, Lines, Machine, lines
from planner.memory import Memory, memory
from planner.parameters import Held, Parameters
from planner.software import Software
from planner.traffic import BACKWARD, EACH, FORWARD, ONCE, Exchange
from planner.work import LayerWork, Parts, Work

# Of a step: stragglers, clocks that drop, the host. The median of what published tables took longer than counted.
UNCOUNTED = 0.06


@dataclass(frozen=True, slots=True)
class Prediction:
    """A layout and what it costs. `seconds` by part add up to a step."""

    layout: Layout
    memory: Memory
    limit: float  # bytes that a device has for it
    seconds: dict[str, float]  # matmul, attention, memory, kernels, optimizer, bubble, and exposed exchanges by axis
    hidden: dict[str, float]  # seconds of exchanges that run beside computation, by axis
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
        self._layer = lru_cache(1 << 16)(self.work.layer)
        self._lines = lru_cache(1 << 14)(lambda sizes: lines(self.machine, dict(sizes)))

    def lines(self, sizes: Mapping[str, int]) -> dict[str, Lines]:
        """How the axes lie on the networks."""
        return self._lines(tuple(sizes.items()))

    def rows(self, layout: Layout) -> int:
        """Layers of the fullest stage."""
        parts = layout.pipe * layout.chunks
        return -(-self.model.layers // parts) * layout.chunks

    def logit_parts(self, layout: Layout) -> int:
        """Into how many parts the vocabulary is cut (model.heads.vocabulary_parts)."""
        chunk = self.config.train.loss_chunk
        return -(-self.config.train.seq_len // (chunk * layout.context * layout.tensor)) if chunk else 1

    def memory(self, layout: Layout, held: Held, sequences: float) -> Memory:
        """Bytes of a device."""
        train, flying = self.config.train, 1.0
        if layout.pipe > 1:
            flying = bubble.in_flight(layout.schedule, layout.pipe, layout.microbatches, layout.chunks)
        moments = 2 if layout.moment_dtype == "bfloat16" else self.param_bytes
        return memory(
            self.model,
            layout,
            held,
            self.software,
            seq_len=train.seq_len,
            sequences=sequences,
            element=self.element,
            param_bytes=self.param_bytes,
            moment_bytes=moments,
            optimizer=self.config.optimizer.name,
            rows=self.rows(layout),
            in_flight=flying,
            fused=self.work.fused,
            logit_parts=self.logit_parts(layout),
        )

    def predict(self, layout: Layout) -> Prediction:
        """The cost of a layout that is legal."""
        train, sizes = self.config.train, layout.sizes
        rows = self.rows(layout)
        held = self.parameters.held(sizes, rows)
        sequences = train.batch_size / (layout.shards * layout.microbatches)
        tokens = sequences * train.seq_len / layout.context
        experts_here = self.model.experts / layout.expert if self.model.experts else 1.0
        layer = self._layer(tokens, layout.tensor, layout.remat, experts_here)
        spread = layout.pipe if self.software.ends_on_all_stages else 1
        chunked = self.logit_parts(layout) > 1
        head = self.work.head(tokens, layout.tensor * spread, chunked=chunked)
        found = self.exchanges(layout, held, tokens, chunked)
        seconds, hidden = self._step(layout, layer, head, found, rows, tokens)
        moment_bytes = 2 if layout.moment_dtype == "bfloat16" else self.param_bytes
        stored = held.stored / (layout.data if self.software.moments_over_data else 1)
        seconds["optimizer"] = self.work.optimizer(stored, moment_bytes, self.param_bytes, self.config.optimizer.name)
        seconds["uncounted"] = UNCOUNTED * sum(seconds.values())
        each = layer.forward.flops + layer.backward.flops + layer.weight.flops
        share = layout.microbatches * self.devices
        hardware = share * (self.model.layers / layout.pipe * each + head.flops * spread / layout.pipe)
        return Prediction(
            layout,
            self.memory(layout, held, sequences),
            self.machine.limit,
            seconds,
            hidden,
            self.flops,
            hardware,
            self.peak,
            self.tokens,
        )

    def exchanges(self, layout: Layout, held: Held, tokens: float, chunked: bool) -> list[Exchange]:
        """What the devices exchange."""
        gradient = self.element if self.software.gradient_bytes == 2 else 4
        if layout.pipe > 1 and self.software.lockstep:
            gradient = 4 if layout.data > 1 else gradient
        return traffic.exchanges(
            self.model,
            layout,
            self.lines(layout.sizes),
            self.software,
            tokens=tokens,
            element=self.element,
            gradient_bytes=gradient,
            layer=held.layer,
            experts=held.experts,
            tables=held.tables,
            rows=self.rows(layout),
            chunked=chunked,
        )

    def _step(
        self, layout: Layout, layer: LayerWork, head: Parts, found: list[Exchange], rows: int, tokens: float
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Seconds of a step by part, without the optimizer; and those that are hidden, by axis."""
        M, back = layout.microbatches, layer.backward + layer.weight
        shown: dict[str, float] = {}
        hidden: dict[str, float] = {}
        room = {FORWARD: layer.forward.seconds, BACKWARD: back.seconds, EACH: head.seconds, ONCE: rows * back.seconds}
        often = {FORWARD: M * rows, BACKWARD: M * rows, EACH: M, ONCE: 1}
        exposed = dict.fromkeys(room, 0.0)
        for e in found:
            may = min(e.overlap * e.total, room[e.beside])
            room[e.beside] -= may
            exposed[e.beside] += e.total - may
            shown[e.axis] = shown.get(e.axis, 0.0) + often[e.beside] * (e.total - may)
            hidden[e.axis] = hidden.get(e.axis, 0.0) + often[e.beside] * may
        work = (layer.forward + back).times(rows) + head
        seconds = {
            "matmul": M * work.matmul,
            "attention": M * work.attention,
            "memory": M * work.memory,
            "kernels": M * work.kernels,
        }
        if layout.pipe > 1:
            forward = rows * (layer.forward.seconds + exposed[FORWARD])
            backward = rows * (layer.backward.seconds + exposed[BACKWARD])
            weight = rows * layer.weight.seconds
            whole = bubble.seconds(
                layout.schedule, layout.pipe, M, layout.chunks, forward, backward, weight, self.software.lockstep
            )
            seconds["bubble"] = max(whole - M * (forward + backward + weight), 0.0)
            if self.software.lockstep:
                line = self.lines(layout.sizes)["pipe"]
                sent = line.shift(tokens * self.model.width * self.element / layout.tensor)
                ticks = bubble.ticks(layout.schedule, layout.pipe, M, layout.chunks)
                shown["pipe"] = shown.get("pipe", 0.0) + ticks * sent
        return seconds | shown, hidden
