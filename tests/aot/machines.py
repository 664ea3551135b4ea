"""The machines and mesh products that `make test-aot` compiles training steps for. None of them need be there."""

from dataclasses import dataclass, field

from performance import targets

GIB = 2**30


@dataclass(frozen=True)
class Machine:
    """A machine to compile for."""

    platform: str  # tpu | gpu
    topology: str  # of one slice; of GPUs how many a host has, where each host is a slice, as it is when it runs
    memory: float  # bytes a device
    slices: int = 1

    def devices(self) -> list:
        """Devices that programs can be compiled for."""
        if self.platform == "tpu":
            return targets.tpus(self.topology, self.slices)
        return targets.gpus("h200", self.slices, int(self.topology))


MACHINES = {
    "v5p-64": Machine("tpu", "v5p:4x4x4", 95 * GIB),
    "v5p-128": Machine("tpu", "v5p:4x4x8", 95 * GIB),
    "v5p-2x64": Machine("tpu", "v5p:4x4x4", 95 * GIB, slices=2),
    "h200-8x8": Machine("gpu", "8", 150e9, slices=8),
}


@dataclass(frozen=True)
class Product:
    """One program to compile: a preset on a mesh of a machine."""

    machine: str
    model: str
    mesh: dict[str, int]
    crossing: set[str] = field(default_factory=set)  # axes that are meant to cross slices or hosts
    overrides: tuple[str, ...] = ()  # of the config, beyond COMMON


COMMON = (
    *("optimizer=adamw", "train.compute_dtype=bfloat16", "train.remat=full", "train.seq_len=4096"),
    # logits that are cut into parts gather the output table once more
    *("train.loss_chunk=0", "model.scan_layers=true", "model.vocab_multiple=1024"),
)
PLAIN = ("model.attention_kernel=plain",)  # cuDNN is asked for its version when a program is traced
PRODUCTS = {
    "fsdp-tensor": Product("v5p-64", "llama3_8b", {"fsdp": 16, "tensor": 4}),
    "long": Product("v5p-64", "llama3_8b", {"fsdp": 16, "tensor": 4}, overrides=("train.seq_len=8192",)),
    "context": Product("v5p-64", "llama3_8b", {"fsdp": 16, "context": 4}, overrides=("train.seq_len=16384",)),
    "pipe": Product("v5p-64", "llama3_8b", {"pipe": 4, "fsdp": 16}),
    "slices": Product("v5p-2x64", "llama3_8b", {"data": 2, "fsdp": 64}, {"data"}),
    "slices-pipe": Product("v5p-2x64", "llama3_8b", {"pipe": 2, "fsdp": 16, "tensor": 4}, {"pipe"}),
    "experts": Product("v5p-128", "mixtral_8x7b", {"fsdp": 16, "expert": 8}),
    "experts-tensor": Product("v5p-128", "mixtral_8x7b", {"fsdp": 8, "expert": 8, "tensor": 2}),
    "experts-pipe": Product("v5p-128", "mixtral_8x7b", {"pipe": 4, "fsdp": 4, "expert": 8}),
    "hosts": Product("h200-8x8", "llama3_8b", {"data": 8, "fsdp": 8}, {"data"}, PLAIN),
    "hosts-tensor": Product("h200-8x8", "llama3_8b", {"fsdp": 8, "tensor": 8}, {"fsdp"}, PLAIN),
    "hosts-pipe": Product("h200-8x8", "llama3_8b", {"pipe": 4, "fsdp": 4, "tensor": 4}, {"pipe", "fsdp"}, PLAIN),
    "hosts-experts": Product("h200-8x8", "mixtral_8x7b", {"fsdp": 8, "expert": 8}, {"fsdp"}, PLAIN),
}
