"""Which meshes suit a run: what its sizes ask of each axis."""

from dataclasses import replace

from config.schema import Config
from model.config import ModelConfig
from parallel.mesh import MicrobatchRequirement, Requirement, StageRequirement, requirement, resolve
from parallel.pipeline.schedules import DEFAULT_CHUNKS, read_csv


def in_processes(config: Config, platform: str, processes: int) -> Config:
    """The config with its layers unrolled where several processes compute on CPUs.

    XLA for CPUs (jaxlib 0.10) may start collectives inside a scan and outside of it in another order in each process
    where arrays are large, and gloo, which counts messages, takes one for the other.
    """
    if platform != "cpu" or processes == 1:
        return config
    return replace(config, model=replace(config.model, scan_layers=False))


def mesh_sizes(config: Config, devices: int) -> dict[str, int]:
    """The size of each mesh axis on `devices` devices. Raises ValueError with the nearest legal meshes."""
    return resolve(config.mesh, devices, requirements(config))


def requirements(config: Config) -> list[Requirement]:
    """What the model and the batch ask of a mesh, by the tables of parallel/axes.py."""
    train = config.train
    microbatch = train.batch_size // train.grad_accumulation
    batch = "train.batch_size" + (f"/{train.grad_accumulation}" if train.grad_accumulation > 1 else "")
    schedule, microbatches, chunks = config.pipeline.schedule, config.pipeline.microbatches, config.pipeline.chunks
    stages = None
    if schedule.endswith(".csv"):
        read = read_csv(schedule)
        stages = read.stages
        microbatches, chunks = microbatches or read.microbatches, chunks or read.chunks
    return [
        *model_requirements(config.model),
        StageRequirement(config.model.layers, chunks or DEFAULT_CHUNKS.get(schedule, 1), stages),
        MicrobatchRequirement(batch, microbatch, microbatches),
        requirement(batch, microbatch, "batch"),
        requirement("train.seq_len", train.seq_len, "residual"),
        *context_requirements(config),
    ]


def context_requirements(config: Config) -> list[Requirement]:
    """What attention asks of a mesh whose context axis splits the sequence."""
    if config.context.style == "ring" and config.model.causal:  # an early and a late chunk for each device
        return [Requirement("train.seq_len", config.train.seq_len, ("context",), factor=2)]
    if config.context.style == "ulysses":
        return [Requirement("model.heads", config.model.heads, ("tensor", "context"))]
    return []


def model_requirements(model: ModelConfig) -> list[Requirement]:
    """What the parameters alone ask of a mesh."""
    experts = [requirement("model.experts", model.experts, "experts", stored=True)] if model.experts else []
    return [
        requirement("model.width", model.width, "width", stored=True),
        requirement("model.heads", model.heads, "heads"),
        requirement("model.kv_heads", model.kv_heads, "kv_heads"),
        requirement("model.ffn", model.ffn, "ffn"),
        *experts,
    ]
