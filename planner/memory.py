"""Bytes that one device needs for a step, by part: what the compiler's account of the same step comes to.

The parts are added up as if all lived at once, because compilers place them so: what one phase has freed is rarely
where the next one wants it. tests/planner and tests/long hold the sum against compiled steps.
"""

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from model.config import GATED, ModelConfig
from planner.bubble import Slots
from planner.layout import Layout
from planner.parameters import Held
from planner.software import Software

if TYPE_CHECKING:
    from planner.cost import Planner

# Of what is temporary, kept free: the most that compilers of a platform needed beyond the arrays counted.
FRAGMENTATION = {"cpu": 0.6, "gpu": 0.2, "tpu": 0.2}
SCORES = 1.7  # arrays as large as scores, while unfused attention is differentiated
# Of a ring: arrays as large as the scores of a tile, and float32 ones as large as its queries, beside each other.
RING_TILES = {"cpu": 3.4, "gpu": 3.7, "tpu": 0.7}
RING_SUMS = {"cpu": 0.0, "gpu": 17.0, "tpu": 6.5}
# Vectors of whole width that tensor parallelism gathers, and makes in float32 to be scattered, in the compute dtype.
GATHERED = {"cpu": 8.0, "gpu": 6.0, "tpu": 0.0}
# The share of the smaller of two phases, the loss and a layer that is differentiated, that lies where the larger one
# has been.
REUSED = {"cpu": 0.0, "gpu": 0.0, "tpu": 0.65}
UNROLLED_REUSED = 0.6  # the same share where layers are unrolled
# Of unrolled layers, others that are differentiated beside one (model.in_turn).
UNDER_WAY, UNDER_WAY_IN_PIPELINES = {"cpu": 1.0, "gpu": 0.0, "tpu": 1.0}, 1.5
BLOCK_ROWS = {"cpu": 64, "gpu": 128}  # parallel.experts.BLOCKS
QUERY_CHUNK = 1024  # model.attention.QUERY_CHUNK
MOST_SCORES, SMALLEST_CHUNK = 2**28, 128  # parallel.context
HELD = {"cpu": 1.0, "gpu": 1.0, "tpu": 1.95}  # of what B leaves for W: TPUs' compiler copies what a branch writes to
MOMENTS = {"adamw": 2.0, "lion": 1.0, "sgd": 1.0, "muon": 1.2, "adafactor": 0.02}  # of each parameter


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of a device."""

    parameters: float
    moments: float
    gradients: float
    activations: float  # what layers keep for their backward pass, at the schedule's peak
    working: float  # of the layer that is being differentiated
    weights: float  # in the compute dtype, whole where fsdp splits them
    logits: float
    buffers: float  # of sums of gradients, and of a pipeline's messages
    fragmentation: float

    @property
    def total(self) -> float:
        """All parts."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        """By name."""
        return {part.name: getattr(self, part.name) for part in fields(self)}


@dataclass(frozen=True, slots=True)
class LayerValues:
    """Elements that one layer has of each token, on one device."""

    stream: float  # goes from layer to layer, and is kept by all
    kept: float  # from forward to backward, beside the stream
    held: float  # from backward to the gradients of weights, where a schedule has these apart
    everything: float  # while the layer is differentiated
    scores: float  # float32, kept: of attention that has no fused kernel
    scores_now: float  # float32, while the layer is differentiated
    left: float  # from a layer's backward to the end, where layers are unrolled, but for GPUs


def layer_values(
    c: ModelConfig, seq_len: int, layout: Layout, software: Software, platform: str, *, fused: bool, kept_core: bool
) -> LayerValues:
    """Of one layer, routed experts apart. What a remat policy keeps is that of model.transformer.REMAT_POLICIES;
    `kept_core`: under `dots` it keeps what the attention kernel gives.
    """
    y, remat, context = layout.tensor, layout.remat, layout.context
    stream = c.width / (y if software.sequence_parallel else 1)
    queries, keys = c.heads * c.head_dim / y, 2 * c.kv_heads * c.head_dim / min(y, c.kv_heads)
    for_all = c.shared_experts if c.experts else 1
    hidden = c.ffn / y * for_all
    opened = hidden * (2 if c.activation in GATED else 1)
    inputs = 2 * (c.width if software.keeps_gathered else stream) + queries + hidden  # of all matmuls
    everything = inputs + stream + queries + keys + opened
    kept = {
        "none": everything,
        "full": 0.0,
        "attention": queries,
        "dots": queries * (2 if kept_core else 1) + keys + stream + opened,
    }[remat]
    again = 0.0 if remat == "none" else inputs  # computed again in B
    held = queries + keys + opened + 2 * c.width + again
    left = 0.35 * kept if remat == "none" else (1.2 * queries + 0.3 * hidden) * (platform == "cpu")
    if fused or context > 1:  # for context see `ring`
        return LayerValues(stream, kept, held, everything, 0.0, 0.0, left)
    in_turn = seq_len > 2 * QUERY_CHUNK and seq_len % QUERY_CHUNK == 0
    parts = next(n for n in (8, 4, 2, 1) if seq_len % n == 0 and seq_len // n >= min(seq_len, 128))
    seen = seq_len * ((parts + 1) / (2 * parts) if c.causal else 1.0)
    at_once = QUERY_CHUNK if in_turn else seen
    kept_scores = c.heads / y * seen if remat == "none" and not in_turn else 0.0
    return LayerValues(stream, kept, held, everything, kept_scores, SCORES * c.heads / y * at_once, left)


def ring(c: ModelConfig, sequences: float, seq_len: int, layout: Layout, platform: str) -> float:
    """Bytes that a ring of attention has in a layer that is differentiated, in tiles as parallel.context cuts them."""
    heads, piece = c.heads / layout.tensor, seq_len / layout.context / 2
    chunk = QUERY_CHUNK
    while chunk > SMALLEST_CHUNK and sequences * heads * chunk * piece > MOST_SCORES:
        chunk /= 2
    tile = sequences * heads * min(chunk, piece) * piece
    sums = 2 * sequences * piece * heads * c.head_dim
    return 4 * (RING_TILES[platform] * tile + RING_SUMS[platform] * sums)


@dataclass(frozen=True, slots=True)
class Routed:
    """What routed experts have on one device in a layer, in elements."""

    kept: float  # for the backward pass, without remat
    now: float  # while the layer is differentiated


def routed(c: ModelConfig, tokens: float, layout: Layout, platform: str, *, ours: bool) -> Routed:
    """Rows of assignments and what experts make of them, with the room of parallel.experts: that for the worst case
    where tokens travel, blocks of one expert each, and on CPUs and GPUs a copy of its matrices for each block.
    """
    if not c.experts:
        return Routed(0.0, 0.0)
    gated, chosen, here = 2 if c.activation in GATED else 1, c.experts_per_token, c.experts / layout.expert
    rows = tokens * chosen
    moved = rows if layout.expert > 1 else 0.0
    inner, copied = (gated + 1) * c.ffn / layout.tensor, 0.0
    if ours:
        if layout.expert > 1:
            rows = moved = layout.expert * tokens * min(chosen, here)
        if platform != "tpu":
            a_pass = BLOCK_ROWS[platform]
            size = max(8, 2 ** math.floor(math.log2(max(math.sqrt(a_pass * rows / here), 1))))
            blocks = (rows + here * (size - 1)) // size
            rows, copied = blocks * size, blocks * (gated + 1) * c.width * c.ffn / layout.tensor
    assigned = tokens * chosen * c.width
    return Routed(rows * inner + assigned, rows * (inner + 2 * c.width) + 2 * moved * c.width + copied)


def state_bytes(planner: "Planner", layout: Layout, stored: float, moment_bytes: float) -> float:
    """Bytes of a device for its `stored` parameters, their moments and their gradients."""
    software, spread = planner.software, layout.data * layout.context
    moments = MOMENTS[planner.config.optimizer.name] * moment_bytes + software.master_bytes
    moments /= spread if software.moments_over_data else 1
    gradients = (software.held_gradient_bytes or planner.param_bytes) / (spread if software.gradients_over_data else 1)
    return stored * ((software.state_bytes or planner.param_bytes) + moments + gradients)


class MemoryModel:
    """What a layout needs; what its schedule and its moments add is told by `of`."""

    def __init__(self, planner: "Planner", layout: Layout, held: Held, sequences: float, rows: int):
        """`sequences` in a microbatch of a device, `rows` layers of a stage."""
        on = planner.machine.platform
        self.fragmentation = FRAGMENTATION[on]
        # of layers that are not scanned, compilers order the work otherwise
        self.unrolled = planner.software.name == "isomesh" and not planner.model.scan_layers
        self._state(planner, layout, held)
        self._layers(planner, layout, sequences, rows)
        self._weights_and_logits(planner, layout, held, sequences, rows)
        if planner.software.name == "isomesh":
            apart = self.unrolled and layout.pipe == 1
            reused = UNROLLED_REUSED if apart else 1.0 if layout.context > 1 else REUSED[on]
            saved = reused * min(self.working + self.weights, self.logits)
            self.weights -= max(saved - self.working, 0.0)
            self.working = max(self.working - saved, 0.0)

    def _state(self, planner: "Planner", layout: Layout, held: Held) -> None:
        """Parameters, moments, gradients and their sums."""
        software, param_bytes, replicas = planner.software, planner.param_bytes, layout.data * layout.context
        copies = replicas if software.moments_over_data else 1
        self.stored, self.moments = held.stored, held.stored * MOMENTS[planner.config.optimizer.name] / copies
        self.masters = held.stored * software.master_bytes / copies
        self.state_bytes = software.state_bytes or param_bytes
        self.gradients = held.stored * (software.held_gradient_bytes or param_bytes)
        self.gradients /= replicas if software.gradients_over_data else 1
        self.lasting = self.gradients if software.in_place else 0.0  # of what is not kept from step to step elsewhere
        of_layers = (held.stored - held.tables / layout.fsdp) * param_bytes
        self.a_stage = of_layers * software.lockstep
        again = layout.microbatches > 1 and layout.pipe == 1
        self.added = held.stored * 4 * again * (not software.in_place)  # the sum over microbatches, beside one's
        self.sums = of_layers * (replicas * layout.expert > 1) * (not software.in_place)
        self.sums = max(self.sums - self.added, 0.0)

    def _layers(self, planner: "Planner", layout: Layout, sequences: float, rows: int) -> None:
        """What layers keep and hold in a slot, and what one works with."""
        c, train, software, on = planner.model, planner.config.train, planner.software, planner.machine.platform
        ours, element = software.name == "isomesh", planner.element
        tokens = sequences * train.seq_len / layout.context
        fused = planner.work.fused_on(layout)
        kept_core = fused and planner.work.keeps_core
        v = layer_values(c, train.seq_len, layout, software, on, fused=fused, kept_core=kept_core)
        r = routed(c, tokens, layout, on, ours=ours)
        kept = v.kept * (1 - software.dots_again if layout.remat == "dots" else 1.0)
        left = v.left * (self.unrolled and layout.pipe == 1 and on != "gpu")
        of_experts = r.kept if layout.remat == "none" else 0.0
        self.a_slot = rows * (tokens * (element * (v.stream + kept + left) + 4 * v.scores) + element * of_experts)
        self.a_held = rows * element * (tokens * v.held + (r.kept if layout.remat != "none" else r.kept / 2))
        self.a_held *= HELD[on] if ours else 1.0
        self.a_message = tokens * v.stream * element
        others = self.unrolled * (UNDER_WAY_IN_PIPELINES if layout.pipe > 1 else UNDER_WAY[on])
        gathered = GATHERED[on] * c.width * (layout.tensor > 1 and ours)
        now = element * v.everything * (1 + others) + max(4 * v.scores_now, element * gathered)
        self.working = tokens * now + element * r.now
        if layout.context > 1 and not fused:
            self.working += ring(c, sequences, train.seq_len, layout, on)

    def _weights_and_logits(self, planner: "Planner", layout: Layout, held: Held, sequences: float, rows: int) -> None:
        """In the compute dtype, and what a loss makes of one part of the logits."""
        c, software, element = planner.model, planner.software, planner.element
        spread = layout.pipe if software.ends_on_all_stages else 1
        vocabulary, parts = c.vocab_size / layout.tensor / spread, planner.logit_parts(layout)
        # with their gradient, in float32, but for GPUs (model.platforms.narrow_logits); TPUs' compiler narrows it
        by_platform = {"cpu": 8, "gpu": 2 * element, "tpu": 4 + element}
        logit_bytes = software.logit_bytes or by_platform[planner.machine.platform]
        self.logits = sequences * planner.config.train.seq_len / layout.context * vocabulary / parts * logit_bytes
        one_layer, split = held.layer + held.experts, planner.splitting(layout).fsdp > 1
        if layout.pipe > 1 and not software.gathers_every_microbatch and split:  # whole for all microbatches (ZeRO-2)
            self.weights = rows * one_layer * (element + 4)
        else:
            self.weights = (vocabulary * c.width + one_layer) * element * split

    def of(self, slots: Slots, moment_bytes: int) -> Memory:
        """With a schedule's slots, and moments of so many bytes."""
        activations = slots.kept * self.a_slot + slots.held * self.a_held
        buffers = self.added + max(self.sums - activations / 2, 0.0)
        buffers += slots.messages * self.a_message + slots.copied * self.a_stage
        temporary = self.gradients + activations + self.working + self.weights + self.logits + buffers
        parameters, moments = self.stored * self.state_bytes + self.masters, self.moments * moment_bytes
        parts = (self.gradients, activations, self.working, self.weights, self.logits, buffers)
        return Memory(parameters, moments, *parts, self.fragmentation * (temporary - self.lasting))

    def halved(self, moment_bytes: int) -> float:
        """Bytes that moments of 2 bytes save."""
        return self.moments * (moment_bytes - 2)

    def total(self, slots: Slots, moment_bytes: int) -> float:
        """Of `of`, quickly."""
        temporary = self.gradients + self.working + self.weights + self.logits
        activations = slots.kept * self.a_slot + slots.held * self.a_held
        # sums of gradients come when half of the activations are gone
        temporary += self.added + max(activations, self.sums + activations / 2)
        temporary += slots.messages * self.a_message + slots.copied * self.a_stage
        freed = self.fragmentation * (temporary - self.lasting)
        state = self.stored * self.state_bytes + self.masters + self.moments * moment_bytes
        return state + temporary + freed
