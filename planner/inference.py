"""Plans of serving: how many shards, how many sequences at once, how long to the first token and to each next.

Reading the prompt is bound by matmuls, each next token by what has to be read for it: all weights once for a step, and
every sequence's keys and values (How to Scale Your Model, Austin et al., 2025, chapter 7).
"""

from dataclasses import dataclass

from config.schema import Config
from model.config import ModelConfig
from model.counts import parameter_count
from planner.machine import BYTES, Machine, lines
from planner.search import divisors
from planner.software import Software
from planner.work import Work

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
LAUNCH_US = 3.0  # of a kernel of a decoding step, of which a layer has about eight
WORKING = 0.08  # of the memory, for activations and fragmentation


@dataclass(frozen=True)
class ServingPlan:
    """One way to serve: `replicas` of `tensor` shards, `batch` sequences at once on each."""

    tensor: int
    replicas: int
    batch: int
    memory: float  # bytes of a device
    limit: float
    first_s: float  # to the first token of a prompt that is read alone
    next_s: float  # to each next one, with the whole batch decoding
    tokens_per_s: float  # answered by all devices, prompts included in the time

    @property
    def fits(self) -> bool:
        """Whether it fits into a device."""
        return self.memory <= self.limit


def cache_bytes(model: ModelConfig, tokens: int, element: float = 2.0) -> float:
    """Keys and values of one sequence; local layers keep their window."""
    kept = sum(min(window, tokens) if window else tokens for window in model.windows())
    return 2 * model.kv_heads * model.head_dim * element * kept


def serving_plans(
    config: Config,
    machine: Machine,
    devices: int,
    software: Software,
    *,
    prompt: int,
    answer: int,
    weight_bytes: float = 2.0,
    cache_element: float = 2.0,
) -> list[ServingPlan]:
    """All plans, the most tokens a second first; `weight_bytes` of a parameter as it is kept."""
    model, plans = config.model, []
    for tensor in divisors(devices):
        if model.heads % tensor or model.ffn % tensor:
            continue
        for batch in BATCHES:
            plans.append(
                _plan(config, machine, devices, software, tensor, batch, prompt, answer, weight_bytes, cache_element)
            )
    return sorted(plans, key=lambda plan: -plan.tokens_per_s)


def _plan(
    config, machine, devices, software, tensor, batch, prompt, answer, weight_bytes, cache_element
) -> ServingPlan:
    model, keep = config.model, machine.sustained
    count = parameter_count(model)
    held = count.total * weight_bytes / tensor
    shards = min(tensor, model.kv_heads)  # fewer kv heads than shards are copied
    cache = cache_bytes(model, prompt + answer, cache_element) / shards
    memory = held + batch * cache + WORKING * machine.memory_gib * 2**30
    axes = {"pipe": 1, "data": devices // tensor, "fsdp": 1, "expert": 1, "context": 1, "tensor": tensor}
    line = lines(machine, axes)["tensor"]
    first = _first(config, machine, software, line, tensor, prompt)
    # a step reads the active weights of each token, of a batch at most all, and half of the answers' caches on average
    touched = min(count.total, count.active * batch) * weight_bytes / tensor
    middle = cache_bytes(model, prompt + answer // 2, cache_element) / shards
    read = (touched + batch * middle) / (1e9 * machine.memory_gb_s * keep.memory)
    computed = 2 * count.active * batch / tensor / (machine.peak(_dtype(machine)) * keep.matmul)
    exchanged = 2 * model.layers * 2 * line.seconds(batch * model.width * 2)
    launched = 0.0 if machine.platform == "cpu" else model.layers * 8 * LAUNCH_US * 1e-6
    following = max(read, computed) + exchanged + launched
    replicas = devices // tensor
    rate = replicas * batch * answer / (batch * first + answer * following)
    return ServingPlan(tensor, replicas, batch, memory, machine.limit, first, following, rate)


def _first(config: Config, machine: Machine, software: Software, line, tensor: int, prompt: int) -> float:
    """Seconds to read one prompt."""
    work = Work(config.model, prompt, _dtype(machine), machine, software)
    layer = work.layer(prompt, tensor, "none", config.model.experts or 1.0).forward
    exchanges = 0.0 if tensor == 1 else 4 * line.seconds(prompt * config.model.width * BYTES[_dtype(machine)])
    return config.model.layers * (layer.seconds + exchanges)


def _dtype(machine: Machine) -> str:
    return "float32" if machine.platform == "cpu" else "bfloat16"


def table(plans: list[ServingPlan]) -> str:
    """For people."""
    head = f"{'':>3}{'tensor':>8}{'replicas':>10}{'batch':>7}{'tokens/s':>12}{'first':>12}{'next':>11}{'GB':>8}"
    lines_of = [head]
    for place, p in enumerate(plans, 1):
        times = f"{1e3 * p.first_s:>9,.1f} ms{1e3 * p.next_s:>8,.2f} ms"
        lines_of.append(
            f"{place:>3}{p.tensor:>8}{p.replicas:>10}{p.batch:>7}{p.tokens_per_s:>12,.0f}{times}{p.memory / 1e9:>8.1f}"
        )
    return "\n".join(lines_of)
