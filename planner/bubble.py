"""How long a pipeline takes, in closed form: schedules of a thousand stages are not drawn to be weighed.

tests/planner/test_bubble.py holds these against the tables of parallel.pipeline.schedules, which they stand for.
"""

from dataclasses import dataclass
from functools import lru_cache


def seconds(
    schedule: str,
    stages: int,
    microbatches: int,
    chunks: int,
    forward: float,
    backward: float,
    weight: float,
    lockstep: bool,
) -> float:
    """A step of all microbatches. The costs are those of one microbatch on one whole stage.

    `backward` is that of the inputs' gradient with what is computed again, `weight` that of the weights'. In `lockstep`
    all stages wait for each other after every tick, which lasts as its longest operation
    (parallel.pipeline.schedules.PipelineSchedule.lockstep_bubble); else each goes on as soon as its inputs are there.
    """
    P, M, v = stages, microbatches, chunks
    f, b, w = forward, backward, weight
    whole, wait = f + b + w, max(f + b - w, 0.0)
    if schedule in ("gpipe", "1f1b", "interleaved"):
        drifting = (max(M, P) + (min(M, P) - 1) / v) * whole
    else:  # the gradients of weights of so many microbatches fill the gaps; without any, stages work one by one
        full = v * P - v + 1
        filled = (min(M, full) - 1) / max(full - 1, 1)
        drifting = M * whole + (P - 1) * ((1 - filled) * (f + b) + filled * wait / v)
    if not lockstep or schedule == "gpipe":
        return drifting
    longest = max(f, b, w)
    if schedule in ("1f1b", "interleaved"):
        ticks = P * f + (2 * max(M, P) - P + 2 * (min(M, P) - 1) / v) * max(f, b + w)
    elif schedule == "zero_bubble":
        ticks = P * f + (3 * M - 1) * longest
    else:
        ticks = P * f + (6 * M - P - 1) / 2 * longest
    return max(drifting, ticks)


def ticks(schedule: str, stages: int, microbatches: int, chunks: int) -> float:
    """How often all stages exchange in lockstep."""
    P, M, v = stages, microbatches, chunks
    if schedule in ("gpipe", "1f1b", "interleaved"):
        return 2 * (v * max(M, P) + min(M, P) - 1)
    return 3 * v * M + P - 1 if M >= P else v * (2 * (P + M) - 1)


@dataclass(frozen=True, slots=True)
class Slots:
    """What a stage keeps at a schedule's peak, in microbatches of its whole share of layers."""

    kept: float  # from forward to backward, or to the gradients of weights where these are apart
    held: float  # from backward to the gradients of weights
    messages: int
    copied: int  # copies of a stage's gradients, which several chunks cost


@lru_cache(1 << 14)
def slots(schedule: str, stages: int, microbatches: int, chunks: int) -> Slots:
    """Those of the fullest stage, as parallel.pipeline.buffers allots them; one of each without a pipeline."""
    P, M, v = stages, microbatches, chunks
    if P == 1:
        return Slots(1.0, 0.0, 0, 0)
    if schedule == "gpipe":
        return Slots(M, 0.0, M + 1, 0)
    if schedule == "1f1b":
        return Slots(min(P, M), 0.0, 3, 0)
    if schedule == "interleaved":
        return Slots(min(P * v + P - 1 if v > 1 else P, v * M) / v, 0.0, 6, int(v > 1))
    if schedule == "zero_bubble":
        return Slots(min(P, M), min(P, M), 3, 0)
    return Slots(min(2 * P, 2 * M) / 2, (2 * P - 1) / 2 if M >= 2 * P - 1 else 0.5, 4, 1)
