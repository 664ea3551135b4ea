"""What a run may set of its pipeline and its context axis. No JAX here: it is read before anything slow is imported."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from parallel.axes import ACTIVATION_AXES
from parallel.pipeline.schedules import DEFAULT_CHUNKS, PipelineSchedule, make, read_csv

CONTEXT_STYLES = ("ring", "ulysses", "gather")


@dataclass(frozen=True)
class PipelineConfig:
    """How microbatches go through the stages of mesh.pipe. Raises ValueError for values out of range."""

    schedule: str = "zero_bubble"  # gpipe | 1f1b | interleaved | zero_bubble | zero_bubble_v | a path to a .csv table
    microbatches: int = 0  # cut of each accumulation step's batch; 0: 2 * mesh.pipe where that divides, else the most
    chunks: int = 0  # virtual stages a device; 0: 2 for interleaved and zero_bubble_v, else 1

    def __post_init__(self):
        if self.schedule not in DEFAULT_CHUNKS and not self.schedule.endswith(".csv"):
            choices = ", ".join(DEFAULT_CHUNKS)
            raise ValueError(f"pipeline.schedule={self.schedule} is unknown; use {choices} or a path to a .csv table")
        own = DEFAULT_CHUNKS.get(self.schedule)
        if own and self.schedule != "interleaved" and self.chunks not in (0, own):
            raise ValueError(f"pipeline.chunks={self.chunks}: {self.schedule} has {own}; use {own}, or 0 to choose")
        for name in ("microbatches", "chunks"):
            if getattr(self, name) < 0:
                raise ValueError(f"pipeline.{name}={getattr(self, name)} must be 1 or more, or 0 to choose")


@dataclass(frozen=True)
class ContextConfig:
    """How attention crosses the shards of mesh.context. Raises ValueError for unknown styles."""

    style: str = "ring"  # ring | ulysses (all-to-all of heads) | gather (keys and values; for short sequences)

    def __post_init__(self):
        if self.style not in CONTEXT_STYLES:
            raise ValueError(f"context.style={self.style} is unknown; use one of {', '.join(CONTEXT_STYLES)}")


def schedule_for(config: PipelineConfig, sequences: int, sizes: Mapping[str, int]) -> PipelineSchedule | None:
    """The pipeline's schedule on a mesh of these sizes, None without stages. Raises ValueError for an illegal one.

    `sequences` are those of an accumulation step over the whole mesh, of which microbatches are cut.
    """
    if sizes["pipe"] == 1:
        return None
    stages = sizes["pipe"]
    if config.microbatches:
        microbatches = config.microbatches
    elif config.schedule.endswith(".csv"):
        microbatches = read_csv(config.schedule).microbatches
    else:
        rows = sequences // math.prod(sizes[axis] for axis in ACTIVATION_AXES["batch"])
        microbatches = max(m for m in range(1, rows + 1) if rows % m == 0 and m <= 2 * stages)
    return make(config.schedule, stages, microbatches, config.chunks)
