"""Devices that programs are compiled for without being there."""

import jax

H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 62914560
  clock_rate_ghz: 1.98 device_memory_size: 150000000000 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 12 } runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H200"
"""


def h200(hosts: int = 1, gpus: int = 1) -> list:
    """H200s, where JAX's CUDA plugin is installed and no GPU need be. Raises ValueError where it is not."""
    from jax.experimental import topologies

    try:
        topology = f"1x{hosts}x{gpus}"
        return topologies.get_topology_desc(platform="cuda", target_config=H200, topology=topology).devices
    except (RuntimeError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
        raise ValueError(
            f"no compiler for GPUs here ({type(error).__name__}): run it in an environment with jax[cuda13], as "
            "`make test-aot-gpu` makes one in .venv-aot-gpu, or read a program's text with --text FILE"
        ) from None
