"""Devices that programs are compiled for without being there: TPU slices and NVIDIA GPUs.

    devices = gpus("h200", hosts=8, gpus=8)        # in an environment with jax[cuda13]
    devices = tpus("v5p:4x4x4")                    # in one with jax[tpu]

A process loads the compiler of one platform only; what it needs in its environment is runtime.compiler_flags.
"""

from dataclasses import dataclass

import jax

HOPPER = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: {bandwidth} l2_cache_size: {l2_cache}
  clock_rate_ghz: 1.98 device_memory_size: {memory} shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 }} registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 12 }} runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{name}"
"""


@dataclass(frozen=True)
class Gpu:
    """What the compiler is told of a GPU, beyond what all of its architecture share."""

    name: str
    memory: int  # bytes
    bandwidth: int  # bytes/s
    l2_cache: int = 62914560


GPUS = {
    "h100": Gpu("NVIDIA H100 80GB HBM3", 85_000_000_000, 3_350_000_000_000, 52428800),
    "h200": Gpu("NVIDIA H200", 150_000_000_000, 4_800_000_000_000),
}


def gpus(kind: str = "h200", hosts: int = 1, gpus: int = 1, *, memory: float | None = None) -> list:
    """GPUs of a kind of `GPUS`, `gpus` in each of `hosts`, where JAX's CUDA plugin is installed and no GPU need be.

    A host is what a fast network joins, as parallel.mesh.slice_of has it. `memory`: bytes of a device, where they are
    not as usual. Raises ValueError without the plugin.
    """
    what = GPUS[kind]
    bytes_ = int(memory or what.memory)
    text = HOPPER.format(name=what.name, memory=bytes_, bandwidth=what.bandwidth, l2_cache=what.l2_cache)
    return _devices("gpu", f"{hosts}x1x{gpus}", platform="cuda", target_config=text, topology=f"{hosts}x1x{gpus}")


def tpus(topology: str, slices: int = 1) -> list:
    """Chips of TPU slices such as v5e:16x16, where libtpu is installed. Raises ValueError where it is not, and where a
    slice has no such sides."""
    return _devices("tpu", topology, topology, platform="tpu", num_slices=slices)


def _devices(extra: str, named: str, *topology: str, **options) -> list:
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(*topology, **options).devices
    except (RuntimeError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"no compiler for {extra.upper()}s here that knows {named} ({type(error).__name__}: {reason}): run it in "
            f"the environment that `make aot-{extra}` makes, .venv-aot-{extra}, or read a program's text with --text "
            "FILE"
        ) from None
