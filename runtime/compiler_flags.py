"""What each platform's compiler is told beyond its defaults: one table, for runs and for compiling without a device.

Each flag stands with what it does; why those of GPUs are there, and what was tried and left, is in experiments/LOG.md.
Flags that the installed jaxlib does not know are left out, and those of the environment win. Nothing slow is imported.
"""

import os

from runtime.xla_flags import known

FLAGS: dict[str, tuple[str, ...]] = {
    "cpu": (
        # the first widens 16-bit all-reduces, and crashes on those of manual code ("Invalid binary instruction opcode
        # copy"); the second takes barriers away, and without them remat of unrolled layers saves no memory
        "--xla_disable_hlo_passes=all-reduce-promotion,cse_barrier_expander",
        # it may start independent collectives in a different order on each device, which then wait for each other
        "--xla_cpu_enable_concurrency_optimized_scheduler=false",
    ),
    # On without being asked are full autotuning, Triton matmuls, command buffers, a stream of high priority for
    # collectives and pipelined reduce-scatters.
    "gpu": (
        # collectives start as early, and are waited for as late, as they can
        "--xla_gpu_enable_latency_hiding_scheduler=true",
        # in a scan over layers, the next layer's weights are gathered while this one computes
        "--xla_gpu_enable_pipelined_all_gather=true",
        # and the last layer's gradients are reduced meanwhile
        "--xla_gpu_enable_pipelined_all_reduce=true",
        # 16-bit values are rounded where the program says so, and do not pass between kernels in float32, twice the
        # bytes
        "--xla_allow_excess_precision=false",
        # matmuls of queries and keys stay apart: merged, their weights and gradients are copied together and apart
        # again, and biases are added by kernels of their own
        "--xla_gpu_dot_merger_threshold_mb=0",
    ),
    # Its compiler hides collectives behind computation without being asked, and takes its flags from LIBTPU_INIT_ARGS,
    # where a run's owner sets them. None has been measured here.
    "tpu": (),
}
# Where the devices are not there, there is nothing to tune on; and Triton's matmuls are chosen by tuning.
WITHOUT_DEVICES: dict[str, tuple[str, ...]] = {
    "gpu": ("--xla_gpu_autotune_level=0", "--xla_gpu_enable_triton_gemm=false"),
}
# What a process needs that compiles for absent devices: it must not look for them.
ENVIRONMENT: dict[str, dict[str, str]] = {
    "cpu": {"JAX_PLATFORMS": "cpu"},
    # a lock file is for devices: without them several programs may compile at a time
    "tpu": {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu"},
    "gpu": {"CUDA_VISIBLE_DEVICES": "-1", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "JAX_PLATFORMS": "cpu"},
}


def without_devices(platform: str) -> None:
    """Prepares this process, before JAX is imported, to compile for devices of a platform that are not there."""
    os.environ.update(ENVIRONMENT[platform])
    add(platform, devices=False)


def add(platform: str, *, devices: bool = True) -> None:
    """Adds the flags of a platform (cpu, gpu, tpu) to XLA_FLAGS, before JAX's first client is made.

    Without `devices`, those too that a compiler needs where there is none of the platform.
    """
    wanted = FLAGS[platform] + (() if devices else WITHOUT_DEVICES.get(platform, ()))
    theirs = os.environ.get("XLA_FLAGS", "").split()
    given = {flag.partition("=")[0] for flag in theirs}
    added = [flag for flag in known(wanted) if flag.partition("=")[0] not in given]
    os.environ["XLA_FLAGS"] = " ".join(theirs + added)
