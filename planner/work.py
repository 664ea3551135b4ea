"""Seconds that one device computes for one microbatch: matmuls, attention, elementwise work, by arithmetic.

A matmul takes its FLOPs at what the machine sustains, and the time of its operands through memory beside it, so that
small ones come out slower. Attention takes its FLOPs and the exponentials of its softmax, which have units of their own
(FlashAttention-3, arXiv 2407.08608, section 3.2). The rest is counted in passes over memory. FLOPs are those of
model.counts, and what is computed again those of performance.flops.
"""

from dataclasses import dataclass

from model.config import GATED, ModelConfig
from model.counts import keys_seen
from planner.layout import Layout
from planner.machine import Machine
from planner.software import Software

ATTENTION_MATMULS = 0.85  # of what large matmuls sustain, inside attention kernels
BACKWARD_KERNEL = 0.8  # of the forward attention kernel's rate
GROUPED = 0.85  # of what large matmuls sustain, in those of experts
TILE = 64  # keys that a causal kernel computes in vain, a query
SCORE_BYTES, SCORE_BYTES_BACKWARD = (
    13.0,
    20.0,
)  # memory traffic of an unfused score in 16 bits (arXiv 2205.05198, fig. 3)
LOGIT_BYTES = 14.0  # memory traffic of a logit, forward and backward


@dataclass(frozen=True, slots=True)
class Parts:
    """Seconds by kind, and the FLOPs that they stand for."""

    matmul: float = 0.0
    attention: float = 0.0
    memory: float = 0.0  # elementwise work
    kernels: float = 0.0  # gaps between kernels
    flops: float = 0.0

    @property
    def seconds(self) -> float:
        """All of them."""
        return self.matmul + self.attention + self.memory + self.kernels

    def __add__(self, other: "Parts") -> "Parts":
        return Parts(
            self.matmul + other.matmul,
            self.attention + other.attention,
            self.memory + other.memory,
            self.kernels + other.kernels,
            self.flops + other.flops,
        )

    def times(self, n: float) -> "Parts":
        """So often."""
        return Parts(self.matmul * n, self.attention * n, self.memory * n, self.kernels * n, self.flops * n)


@dataclass(frozen=True, slots=True)
class LayerWork:
    """One layer and one microbatch on one device."""

    forward: Parts
    backward: Parts  # for inputs, with what is computed again
    weight: Parts  # gradients of the weights


class Work:
    """Times of one model on one machine by one program; sizes are those of a device's share."""

    def __init__(self, model: ModelConfig, seq_len: int, dtype: str, machine: Machine, software: Software):
        c, self.model, self.machine, self.software = model, model, machine, software
        self.seq_len, self.element = seq_len, 4 if dtype == "float32" else 2
        self.rate = machine.peak(dtype) * machine.sustained.matmul
        self.bandwidth = 1e9 * machine.memory_gb_s * machine.sustained.memory
        fast = "float8" if c.matmul_dtype == "float8" and "float8" in machine.peak_tflops else dtype
        self.block_rate, self.narrow = machine.peak(fast) * machine.sustained.matmul, fast == "float8"
        gated = 2 if c.activation in GATED else 1
        self.into, self.out = c.width * c.head_dim * (c.heads + 2 * c.kv_heads), c.width * c.heads * c.head_dim
        self.ffn_in, self.down = gated * c.width * c.ffn, c.width * c.ffn
        self.gated, self.keys = gated, keys_seen(c, seq_len) / c.layers
        self.ours = software.name == "isomesh"
        self.fused = software.fused_attention and c.attention_kernel != "plain" and machine.platform != "cpu"
        if self.ours and machine.platform == "gpu":  # what cuDNN's kernel does not cover (model.attention_kernels)
            self.fused &= c.head_dim % 8 == 0 and c.head_dim <= 128 and not c.attention_softcap

    @property
    def keeps_core(self) -> bool:
        """Whether remat=dots keeps what a fused attention kernel gives: on GPUs, where it has a name for it."""
        return self.machine.platform == "gpu"

    def fused_on(self, layout: Layout) -> bool:
        """Whether attention runs in a fused kernel; this project has none for its ring."""
        return self.fused and not (self.ours and layout.context > 1 and layout.style == "ring")

    def layer(
        self, n: float, y: int, remat: str, experts_here: float = 1.0, fused: bool = True, across: bool = False
    ) -> LayerWork:
        """`n` tokens, `y` shards of heads and ffn; `experts_here` whole experts whose weights are read. `fused`: in an
        attention kernel; `across`: which runs again where its heads or keys have come from other devices.
        """
        weights = Parts() + self._attention_weights(n, y) + self._ffn(n, y, experts_here)
        core, core_backward = self._core(n, y, fused)
        core_backward = core_backward + core if across else core_backward
        memory = self._passes(n, y)
        kernels = Parts(kernels=(14 if not self.model.experts else 24) * self.software.kernel_us * 1e-6)
        kernels = kernels if self.machine.platform != "cpu" else Parts()
        forward = weights + core + memory + kernels
        backward = weights + core_backward + memory.times(1.2) + kernels
        weight = weights + memory.times(0.4) + kernels.times(0.5)
        again = Parts()
        if remat == "full":
            again = weights.times(1 - self._idle_share()) + core + memory + kernels
        elif remat == "attention" and self.software.selective:
            again = core
        elif remat == "attention":
            again = weights.times(1 - self._idle_share()) + memory + kernels
        elif remat == "dots":
            kept = self.keeps_core and fused
            again = weights.times(self.software.dots_again) + (Parts() if kept else core) + memory.times(0.8)
            if self.model.experts:  # the policy keeps products with one matrix, not those with a stack of them
                again = again + self._ffn(n, y, experts_here)
        return LayerWork(forward, backward + again, weight)

    def head(self, n: float, parts: int, *, chunked: bool) -> Parts:
        """Logits and loss, forward and backward, of `n` tokens with the vocabulary in so many parts."""
        c, times = self.model, 4 if chunked else 3
        flops = 2.0 * n * c.vocab_size * c.width / parts
        traffic = n * c.vocab_size / parts * LOGIT_BYTES * self.element / 2 * (4 / 3 if chunked else 1)
        moved = times * self.element * (c.vocab_size * c.width / parts + n * c.width)
        return Parts(
            times * flops / self.rate + moved / self.bandwidth, 0.0, traffic / self.bandwidth, 0.0, times * flops
        )

    def optimizer(self, stored: float, moment_bytes: int, param_bytes: int, name: str) -> float:
        """Seconds of clipping and updating `stored` parameters of a device."""
        moments = {"adamw": 2, "lion": 1, "sgd": 1, "muon": 1.2, "adafactor": 0.05}[name]
        moved = stored * (4 * param_bytes + 2 * moments * moment_bytes + 4)
        seconds = moved / self.bandwidth
        if name == "muon":  # five iterations of three matmuls on each matrix (arXiv 2502.16982)
            seconds += 5 * 6 * stored * min(self.model.width, self.model.ffn) / self.rate
        return seconds

    # ----------------------------------------------------------------------------------------------------- the parts

    def _matmul(self, flops: float, elements: float, rate: float) -> Parts:
        return Parts(matmul=flops / rate + self.element * elements / self.bandwidth, flops=flops)

    def _attention_weights(self, n: float, y: int) -> Parts:
        c, into = self.model, self.into / self.model.width
        moved = (self.into + self.out) / y + n * (2 * c.width + (into + c.heads * c.head_dim) / y)
        return self._matmul(2 * n * (self.into + self.out) / y, moved, self.block_rate)

    def _ffn(self, n: float, y: int, experts_here: float) -> Parts:
        c = self.model
        active, rate = (c.experts_per_token, GROUPED * self.rate) if c.experts else (1, self.block_rate)
        flops = 2 * n * active * (self.ffn_in + self.down) / y
        act = (self.gated + 1) * (c.width + c.ffn / y)
        moved = experts_here * (self.ffn_in + self.down) / y + n * active * act
        found = self._matmul(flops, moved, rate)
        if c.shared_experts:
            shared = 2 * n * c.shared_experts * (self.ffn_in + self.down) / y
            found = found + self._matmul(shared, n * c.shared_experts * act, self.block_rate)
        return found

    def _core(self, n: float, y: int, fused: bool) -> tuple[Parts, Parts]:
        """Attention without its projections, forward and backward."""
        c, m = self.model, self.machine
        pairs = n * c.heads / y * self.keys
        flops = 4 * pairs * c.head_dim
        if not fused:  # ours leaves out keys after a part of the queries, and has scores in float32
            every = pairs if self.ours else n * c.heads / y * self.seq_len
            scale = (1.5 if self.ours else 1) * self.element / 2
            forward = 4 * every * c.head_dim / self.rate + every * SCORE_BYTES * scale / self.bandwidth
            backward = 8 * every * c.head_dim / self.rate + every * SCORE_BYTES_BACKWARD * scale / self.bandwidth
            return Parts(attention=forward, flops=flops), Parts(attention=backward, flops=2 * flops)
        seen = pairs * (1 + TILE / self.keys if c.causal else 1)
        rate = (
            self.rate
            * ATTENTION_MATMULS
            * self.software.attention
            * min(1.0, c.head_dim / m.matrix_unit if m.matrix_unit > 1 else 1.0)
        )
        exponentials = seen / (1e12 * m.exponentials_tera_s * self.software.attention)
        forward = 4 * seen * c.head_dim / rate + exponentials
        backward = 10 * seen * c.head_dim / (rate * BACKWARD_KERNEL) + exponentials
        return Parts(attention=forward, flops=flops), Parts(attention=backward, flops=2.5 * flops)

    def _passes(self, n: float, y: int) -> Parts:
        """Elementwise work of a layer's forward: norms, residuals, activation, rotation, routing."""
        c, streams = self.model, y if self.software.sequence_parallel else 1
        halves = 2 if c.norm_position in ("pre", "post", "output") else 4
        residual = (2 * halves + 6) * c.width / streams
        heads = 2 * (c.heads + c.kv_heads) * c.head_dim / y * (c.positions == "rotary")
        active = c.experts_per_token if c.experts else 1
        inner = (self.gated + 1) * c.ffn / y * (active + c.shared_experts if c.experts else 1)
        routed = 6 * c.experts_per_token * c.width if c.experts else 0
        narrowed = 1.5 * (2 * c.width + c.heads * c.head_dim / y + c.ffn / y) if self.narrow else 0
        elements = self.software.passes * (residual + heads + inner + routed) + narrowed
        return Parts(memory=n * elements * self.element / self.bandwidth)

    def kept(self, y: int, remat: str) -> float:
        """Elements of a token that a layer's scan puts into stacks for the backward pass."""
        c = self.model
        heads, inner = (c.heads + 2 * c.kv_heads) * c.head_dim / y, self.gated * c.ffn / y
        queries = c.heads * c.head_dim / y
        everything = 2 * c.width + heads + queries + inner + c.ffn / y
        more = {"none": everything, "full": 0.0, "attention": queries, "dots": heads + queries + inner}[remat]
        return c.width / y + more

    def _idle_share(self) -> float:
        """Share of a layer's matmuls that full remat leaves out: what ends a residual branch (performance.flops)."""
        c = self.model
        if c.norm_position != "pre" or c.experts:
            return 0.0
        return self.down / (self.into + self.out + self.ffn_in + self.down)
