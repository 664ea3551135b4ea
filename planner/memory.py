"""Bytes that one device needs for a step, by part."""

from dataclasses import dataclass, fields

from model.config import GATED, ModelConfig
from planner.layout import Layout
from planner.parameters import Held
from planner.software import Software

FRAGMENTATION = 0.06  # of what is temporary, beyond the arrays themselves
QUERY_CHUNK = 1024  # model.attention.QUERY_CHUNK
MOMENTS = {"adamw": 2.0, "lion": 1.0, "sgd": 1.0, "muon": 1.2, "adafactor": 0.02}  # of each parameter


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of a device."""

    parameters: float
    moments: float
    gradients: float
    activations: float  # what layers keep for their backward pass, at the schedule's peak
    working: float  # of the layer that is being differentiated, gathered weights among it
    logits: float
    buffers: float  # of exchanges and of a pipeline's messages
    fragmentation: float

    @property
    def total(self) -> float:
        """All parts."""
        return sum(getattr(self, part.name) for part in fields(self))

    def parts(self) -> dict[str, float]:
        """By name."""
        return {part.name: getattr(self, part.name) for part in fields(self)}


@dataclass(frozen=True, slots=True)
class LayerValues:
    """Elements of one layer's values for one token on one device, by what keeps them."""

    stream: float  # what goes from layer to layer
    kept: float  # for the backward pass, beside the stream
    inside: float  # all that exists while a layer is differentiated
    scores: float  # of attention that is not fused, for all layers' kept values; elements of 4 bytes
    scores_inside: float


def layer_values(
    c: ModelConfig, seq_len: int, y: int, context: int, remat: str, fused: bool, software: Software
) -> LayerValues:
    """What one layer keeps of a token, and what it needs while it is differentiated."""
    streams = y if software.sequence_parallel else 1
    heads, kv = c.heads * c.head_dim / y, 2 * c.kv_heads * c.head_dim / min(y, c.kv_heads)
    gated = 2 if c.activation in GATED else 1
    active = (c.experts_per_token if c.experts else 1) + c.shared_experts
    inner = (gated + 1) * c.ffn / y * active
    routed = 2 * c.width * c.experts_per_token if c.experts else 0
    stream = c.width / streams
    everything = 2 * c.width + stream + 2 * heads + kv + inner + routed
    kept = {
        "none": everything,
        "full": 0.0,
        "attention": heads,
        "dots": heads * 2 + kv + inner * gated / (gated + 1) + 2 * stream + routed / 2,
    }[remat]
    scores = inside = 0.0
    if not fused:
        keys = seq_len
        chunked = seq_len > 2 * QUERY_CHUNK and seq_len % QUERY_CHUNK == 0
        parts = next(n for n in (8, 4, 2, 1) if seq_len % n == 0 and seq_len // n >= min(seq_len, 128))
        share = (parts + 1) / (2 * parts) if c.causal and context == 1 else 1.0
        each = c.heads / y * keys * share
        scores = each if remat in ("none", "dots") and not chunked and context == 1 else 0.0
        inside = c.heads / y * keys * (QUERY_CHUNK / seq_len if chunked or context > 1 else share)
    return LayerValues(stream, kept, everything + 3 * c.width + inner, scores, 2.5 * inside)


def memory(
    model: ModelConfig,
    layout: Layout,
    held: Held,
    software: Software,
    *,
    seq_len: int,
    sequences: float,
    element: int,
    param_bytes: int,
    moment_bytes: int,
    optimizer: str,
    rows: float,
    in_flight: float,
    fused: bool,
    logit_parts: int,
) -> Memory:
    """Of one device: `sequences` in a microbatch, `rows` layers of a stage, microbatches `in_flight`."""
    c, y = model, layout.tensor
    tokens = sequences * seq_len / layout.context
    v = layer_values(c, seq_len, y, layout.context, layout.remat, fused, software)
    token_bytes = element * (v.stream + v.kept) + 4 * v.scores
    activations = in_flight * rows * tokens * token_bytes
    working = tokens * (element * 1.5 * v.inside + 4 * v.scores_inside)
    gathered = (held.layer + held.experts) * (element * 2 + 4 if layout.fsdp > 1 else element)
    spread = layout.pipe if software.ends_on_all_stages else 1
    head_tokens = tokens
    vocabulary = c.vocab_size / y / spread
    logits = head_tokens * vocabulary / logit_parts * (element + 8)
    table = vocabulary * c.width * (element * 2 + 4) if layout.fsdp > 1 else vocabulary * c.width * element
    messages = (2 * layout.pipe + 2) * tokens * v.stream * element if layout.pipe > 1 else 0.0
    gradients = held.stored * (param_bytes if software.name != "megatron2021" else 4)
    if layout.microbatches > 1 and layout.pipe == 1:
        gradients *= 2  # of a microbatch, beside the sum
    temporary = activations + working + gathered + logits + table + messages + gradients
    return Memory(
        parameters=held.stored * param_bytes,
        moments=held.stored * MOMENTS[optimizer] * moment_bytes / (layout.data if software.moments_over_data else 1),
        gradients=gradients,
        activations=activations,
        working=working + gathered + table,
        logits=logits,
        buffers=messages,
        fragmentation=FRAGMENTATION * temporary,
    )
