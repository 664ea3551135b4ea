"""What a run may set of its processes and its mesh. No JAX here: a mistake is told before anything slow is imported."""

from dataclasses import dataclass

from parallel.schedules import DEFAULT_CHUNKS

PLATFORMS = ("auto", "cpu", "gpu", "tpu")
GPU_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")  # packages
ACCELERATORS = (*GPU_PLUGINS, "libtpu")


@dataclass(frozen=True)
class RuntimeConfig:
    """How this process starts. Raises ValueError for values out of range."""

    platform: str = "auto"  # auto | cpu | gpu | tpu; auto takes the accelerator if there is one
    cpu_devices: int = 1  # simulated devices of this process where it runs on the CPU
    coordinator: str | None = None  # host:port of process 0; null: found from the environment
    processes: int = 0  # number of processes; 0: found from the environment, else 1
    process_id: int = -1  # rank of this process; -1: found from the environment
    compile_cache: str | None = "~/.cache/isomesh/xla"  # folder of compiled programs; null: off
    transfer_guard: bool = False  # an implicit transfer between host and device in the training step raises
    heartbeat_seconds: int = 30  # silence after which another process counts as dead

    def __post_init__(self):
        if self.platform not in PLATFORMS:
            raise ValueError(f"runtime.platform={self.platform} is unknown; valid: {', '.join(PLATFORMS)}")
        for name, least in (("cpu_devices", 1), ("processes", 0), ("process_id", -1), ("heartbeat_seconds", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"runtime.{name}={getattr(self, name)} is below {least}")


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
