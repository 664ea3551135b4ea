"""Starts one process of a run: its platform and XLA flags, the compile cache, joining the other processes.

`start` comes before any JAX computation. Nothing here knows of meshes: one process with one device and a pod take the
same path, and `jax.distributed` is started only where there is more than one process.
"""

import atexit
import contextlib
import importlib.util
import io
import logging
import os
import platform
import stat
import sys
import threading
import zlib
from contextlib import AbstractContextManager
from pathlib import Path

import jax
from jax._src.distributed import global_state  # the public door hides the client of the key-value store

from runtime import compiler_flags, heap, leave
from runtime.cluster import INITIALIZATION_SECONDS, Cluster, find_cluster
from runtime.config import ACCELERATORS, GPU_PLUGINS, RuntimeConfig
from runtime.exit_codes import MISTAKE
from runtime.lifeline import Lifeline

logger = logging.getLogger(__name__)

THREADS_A_DEVICE = 4  # that may wait in collectives at once
PATIENCE_SECONDS = 10  # of a process that has nothing to do but to tell the others of a mistake
GPU_MEMORY = "0.92"  # share of a GPU that JAX takes; its default of 0.75 would leave 35 GB of an H200 idle


def start(config: RuntimeConfig) -> None:
    """Sets JAX up for this process and joins the others, if any. Call it once, before any JAX computation.

    Raises ValueError where the flags are incomplete or the platform that was asked for is absent.
    """
    cluster = find_cluster(config)
    if config.platform == "cpu":
        jax.config.update("jax_platforms", "cpu")
    cpu = config.platform == "cpu" or not any(map(importlib.util.find_spec, ACCELERATORS))
    gpu = not cpu and any(map(importlib.util.find_spec, GPU_PLUGINS))
    compiler_flags.add("cpu" if cpu else "gpu" if gpu else "tpu")
    if cpu:
        heap.keep_freed_memory()
    if cpu and (config.cpu_devices > 1 or cluster is not None):
        # XLA takes its threads from one pool, of as many as there are cores. What follows a large copy runs in one of
        # them and may be a collective that waits there: with all threads waiting, the others never come.
        os.environ.setdefault("NPROC", str((os.cpu_count() or 1) + THREADS_A_DEVICE * config.cpu_devices))
    if gpu and "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:  # the older name; both at once are refused
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", GPU_MEMORY)
    if jax.config.jax_num_cpu_devices != config.cpu_devices:  # JAX refuses even the same value once it has begun
        jax.config.update("jax_num_cpu_devices", config.cpu_devices)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # a cached program of several CPU devices may run its collectives out of order: wrong numbers, or a hang
    if config.compile_cache and not (cpu and (config.cpu_devices > 1 or cluster is not None)):
        _use_compile_cache(Path(config.compile_cache).expanduser())
    if cluster is not None:
        _join(cluster, config.heartbeat_seconds)
    _check_platform(config.platform)
    if cluster is not None and jax.default_backend() == "cpu":
        _keep_gloo_quiet()


def join_and_leave(config: RuntimeConfig, line: str) -> None:
    """Ends all processes of a run because of a mistake that this one has said: the others would wait for it.

    Where they do not come within ten seconds, or this process does not know its place, nothing is told.
    """
    with contextlib.suppress(ValueError):
        if cluster := find_cluster(config):
            threading.Timer(PATIENCE_SECONDS, os._exit, (MISTAKE,)).start()
            _join(cluster, config.heartbeat_seconds)
            leave.leave(MISTAKE, line, said=True)


def _join(cluster: Cluster, heartbeat_seconds: int) -> None:
    """Waits for the other processes; from here on each learns at once when another ends."""
    if jax.distributed.is_initialized():  # a second job of a multirun
        return
    late = (
        f"error: process {cluster.process_id} of {cluster.processes} has waited {INITIALIZATION_SECONDS} s for the "
        f"others at {cluster.coordinator}; start all with the same runtime.coordinator and runtime.processes, each "
        f"with its own runtime.process_id in 0..{cluster.processes - 1}"
    )
    jax.config.update("jax_enable_preemption_service", False)  # runtime.stop starts it, when the training loop begins
    with leave.unless_within(INITIALIZATION_SECONDS, MISTAKE, late):
        jax.distributed.initialize(
            coordinator_address=cluster.coordinator,
            num_processes=cluster.processes,
            process_id=cluster.process_id,
            local_device_ids=cluster.device_ids,
            cluster_detection_method="deactivate",  # find_cluster has looked already
            initialization_timeout=2 * INITIALIZATION_SECONDS,  # JAX would abort the process from C++
            heartbeat_timeout_seconds=heartbeat_seconds,
        )
    host, _, _ = cluster.coordinator.rpartition(":")
    bind, _, _ = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", "").rpartition(":")
    lifeline = Lifeline(global_state.client, cluster.process_id, cluster.processes, host.strip("[]"), bind.strip("[]"))
    leave.tell_with(lifeline.tell)
    atexit.register(lifeline.goodbye)  # runs before JAX's own, which waits for all
    sys.excepthook = leave.leave_by


def transfer_guard(config: RuntimeConfig) -> AbstractContextManager:
    """The guard for the training step: inside it an implicit transfer raises, where `config.transfer_guard` asks so.

    It is for the step and not for the whole process: even `jax.random.key(0)` transfers its seed implicitly.
    """
    return jax.transfer_guard("disallow") if config.transfer_guard else contextlib.nullcontext()


def _check_platform(asked: str) -> None:
    found = jax.default_backend()
    if asked in ("auto", found):
        return
    extra = {"gpu": "cuda"}.get(asked, asked)
    forced = f" (JAX_PLATFORMS={os.environ['JAX_PLATFORMS']} is set)" if os.environ.get("JAX_PLATFORMS") else ""
    raise ValueError(
        f"runtime.platform={asked} but JAX found {found} only{forced}; "
        f"install with `make setup EXTRAS={extra}` or set runtime.platform={found}"
    )


def _use_compile_cache(folder: Path) -> None:
    """Turns the persistent cache on, unless others can write there: they could make this user run their code."""
    of_machine = folder / _machine()
    for part in (folder, of_machine):
        try:
            part.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = part.stat()
        except OSError as error:
            logger.warning("no compile cache: %s", error)
            return
        if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            logger.warning("no compile cache: others can write %s; chmod 700 it or set runtime.compile_cache", part)
            return
    jax.config.update("jax_compilation_cache_dir", str(of_machine))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _machine() -> str:
    """A folder name by CPU type. JAX's cache key has none, and a home folder is often shared by unlike machines."""
    features = ""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as cpuinfo:
        features = next((line for line in cpuinfo if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()}-{zlib.crc32(features.encode()):08x}"


def _keep_gloo_quiet() -> None:
    """Leaves stdout to Python: gloo's C++ code announces each connection there, in fragments from several threads.

    Python's stdout moves to a copy of file descriptor 1 (in place, so that references to it stay good), and 1 itself
    goes nowhere, for this process and for programs that it starts.
    """
    buffer = getattr(sys.stdout, "buffer", None)
    raw = getattr(buffer, "raw", buffer)  # with python -u there is no buffer between
    if not isinstance(raw, io.FileIO) or raw.fileno() != 1:
        return  # somebody has captured stdout
    sys.stdout.flush()
    raw.__init__(os.dup(1), "wb", closefd=False)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
