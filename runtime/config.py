"""What a run may set of its processes. No JAX here: a mistake is told before anything slow is imported."""

from dataclasses import dataclass

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
