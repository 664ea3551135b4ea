"""How long a pipeline takes, in closed form: schedules of a thousand stages are not drawn to be weighed.

tests/planner/test_bubble.py holds these against the tables of parallel.pipeline.schedules, which they stand for.
"""


def seconds(
    schedule: str, stages: int, microbatches: int, chunks: int, forward: float, backward: float, weight: float, lockstep: bool
) -> float:
    """A step of all microbatches. The costs are those of one microbatch on one whole stage.

    `backward` is that of the inputs' gradient with what is computed again, `weight` that of the weights'. In `lockstep`
    all stages wait for each other after every tick, which lasts as its longest operation
    (parallel.pipeline.schedules.PipelineSchedule.lockstep_bubble); else each goes on as soon as its inputs are there.
    """
    P, M, v = stages, microbatches, chunks
    f, b, w = forward, backward, weight
    whole, wait = f + b + w, max(f + b - w, 0.0)
    drifting = {
        "gpipe": M * whole + (P - 1) * whole,
        "1f1b": M * whole + (P - 1) * whole,
        "interleaved": M * whole + (P - 1) / v * whole,
        "zero_bubble": M * whole + (P - 1) * wait,
        "zero_bubble_v": M * whole + (P - 1) * wait / 2,
    }[schedule]
    if not lockstep or schedule == "gpipe":
        return drifting
    longest = max(f, b, w)
    if schedule in ("1f1b", "interleaved"):
        ticks = P * f + (2 * M - P + 2 * (P - 1) / v) * max(f, b + w)
    elif schedule == "zero_bubble":
        ticks = P * f + (3 * M - 1) * longest
    else:
        ticks = P * f + (6 * M - P - 1) / 2 * longest
    return max(drifting, ticks)


def ticks(schedule: str, stages: int, microbatches: int, chunks: int) -> float:
    """How often all stages exchange in lockstep."""
    P, M, v = stages, microbatches, chunks
    return {
        "gpipe": 2 * (M + P - 1),
        "1f1b": 2 * (M + P - 1),
        "interleaved": 2 * (v * M + P - 1),
        "zero_bubble": 3 * M + P - 1,
        "zero_bubble_v": 6 * M + P - 1,
    }[schedule]


def in_flight(schedule: str, stages: int, microbatches: int, chunks: int) -> float:
    """Most microbatches whose activations the fullest stage holds, of its whole share of layers; the docs' table."""
    P, M, v = stages, microbatches, chunks
    most = {
        "gpipe": M,
        "1f1b": P,
        "interleaved": P + (P - 1) / v if v > 1 else P,
        "zero_bubble": P,
        "zero_bubble_v": P,
    }[schedule]
    return min(most, M)
