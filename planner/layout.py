"""A layout: everything that a planner may choose for a run, and the overrides that ask train.py for it."""

from dataclasses import dataclass, replace

from config.schema import Config
from parallel.mesh import MeshConfig
from parallel.pipeline.schedules import DEFAULT_CHUNKS


@dataclass(frozen=True, slots=True)
class Layout:
    """Sizes of the mesh axes, and how a batch goes through them."""

    pipe: int = 1
    data: int = 1
    fsdp: int = 1
    expert: int = 1
    context: int = 1
    tensor: int = 1
    schedule: str = "zero_bubble"  # of a pipeline
    chunks: int = 1  # virtual stages a device
    microbatches: int = 1  # of a pipeline; without one, parts of a step whose gradients are added up
    remat: str = "none"
    moment_dtype: str = ""  # "" (as the parameters) | bfloat16
    style: str = "ring"  # how attention crosses the context axis

    @property
    def devices(self) -> int:
        """The product of the axes."""
        return self.pipe * self.shards * self.context * self.tensor

    @property
    def shards(self) -> int:
        """Parts of the batch."""
        return self.data * self.fsdp * self.expert

    @property
    def sizes(self) -> dict[str, int]:
        """By axis, outermost first."""
        names = ("pipe", "data", "fsdp", "expert", "context", "tensor")
        return {name: getattr(self, name) for name in names}

    @property
    def accumulation(self) -> int:
        """train.grad_accumulation."""
        return 1 if self.pipe > 1 else self.microbatches

    def overrides(self) -> list[str]:
        """What to write after `python train.py`, defaults left out."""
        words = [f"mesh.{axis}={n}" for axis, n in self.sizes.items() if n > 1 or axis == "fsdp"]
        if self.pipe > 1:
            words += [f"pipeline.schedule={self.schedule}", f"pipeline.microbatches={self.microbatches}"]
            if self.schedule == "interleaved":
                words.append(f"pipeline.chunks={self.chunks}")
        elif self.microbatches > 1:
            words.append(f"train.grad_accumulation={self.microbatches}")
        words.append(f"train.remat={self.remat}")
        words += [f"optimizer.moment_dtype={self.moment_dtype}"] if self.moment_dtype else []
        words += [f"context.style={self.style}"] if self.context > 1 else []
        return words

    def told(self) -> str:
        """For people, in one line."""
        mesh = " ".join(f"{axis}={n}" for axis, n in self.sizes.items() if n > 1) or "one device"
        if self.pipe > 1:
            chunks = f" x {self.chunks}" if self.chunks > 1 else ""
            return f"{mesh}, {self.schedule}{chunks}, {self.microbatches} microbatches, remat {self.remat}"
        cut = f", in {self.microbatches} parts" if self.microbatches > 1 else ""
        return f"{mesh}{cut}, remat {self.remat}"

    def applied(self, config: Config) -> Config:
        """The config of a run with this layout."""
        train = replace(config.train, remat=self.remat, grad_accumulation=self.accumulation)
        optimizer = replace(config.optimizer, moment_dtype=self.moment_dtype)
        config = replace(config, mesh=MeshConfig(**self.sizes), train=train, optimizer=optimizer)
        config = replace(config, context=replace(config.context, style=self.style))
        if self.pipe == 1:
            return config
        chunks = self.chunks if self.schedule == "interleaved" else 0
        named = {"schedule": self.schedule, "microbatches": self.microbatches, "chunks": chunks}
        return replace(config, pipeline=replace(config.pipeline, **named))


def layout_of(config: Config, sizes: dict[str, int], microbatches: int | None = None) -> Layout:
    """The layout of a run's config on a mesh of these sizes; `microbatches` of its pipeline, where it does not say."""
    pipeline, train = config.pipeline, config.train
    cut = train.grad_accumulation if sizes["pipe"] == 1 else microbatches or pipeline.microbatches
    return Layout(
        **sizes,
        schedule=pipeline.schedule,
        chunks=(pipeline.chunks or DEFAULT_CHUNKS.get(pipeline.schedule, 1)) if sizes["pipe"] > 1 else 1,
        microbatches=cut,
        remat=train.remat,
        moment_dtype=config.optimizer.moment_dtype,
        style=config.context.style,
    )
