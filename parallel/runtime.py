"""Starting and stopping one process of a run: platform, compile cache, joining the other processes, stop signals.

`start` comes before any JAX computation. Nothing here knows of meshes: one process with one device and a pod take the
same path, and `jax.distributed` is started only where there is more than one process.
"""

import contextlib
import importlib.util
import io
import logging
import os
import platform
import signal
import stat
import sys
import threading
import zlib
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import jax

# Private, because the public door (`jax.distributed.initialize()`) starts the service before it tells how many
# processes there are, and a single process must start without one. These classes are the same in jax 0.10 to 0.12.
from jax._src import clusters
from jax.experimental import multihost_utils

from parallel import heap
from parallel.config import ACCELERATORS, GPU_PLUGINS, RuntimeConfig

logger = logging.getLogger(__name__)

INITIALIZATION_SECONDS = 300  # how long a process waits for the others at start-up
CPU_FLAGS = (
    # it widens 16-bit all-reduces, and crashes on those of manual code ("Invalid binary instruction opcode copy")
    "--xla_disable_hlo_passes=all-reduce-promotion",
    # it may start independent collectives in a different order on each device, which then wait for each other
    "--xla_cpu_enable_concurrency_optimized_scheduler=false",
)
# All known to jaxlib 0.10.2 to 0.12: an unknown flag would end the process. On without being asked are full autotuning,
# Triton matmuls, command buffers, a stream of high priority for collectives and pipelined reduce-scatters.
GPU_FLAGS = (
    # collectives start as early, and are waited for as late, as they can
    "--xla_gpu_enable_latency_hiding_scheduler=true",
    # in a scan over layers, the next layer's weights are gathered while this one computes
    "--xla_gpu_enable_pipelined_all_gather=true",
    # and the last layer's gradients are reduced meanwhile
    "--xla_gpu_enable_pipelined_all_reduce=true",
)
GPU_MEMORY = "0.92"  # share of a GPU that JAX takes; its default of 0.75 would leave 35 GB of an H200 idle


@dataclass(frozen=True)
class Cluster:
    """This process among several. `device_ids`: the local GPUs that are its own, None for all that it sees."""

    coordinator: str
    processes: int
    process_id: int
    device_ids: tuple[int, ...] | None = None


def start(config: RuntimeConfig) -> None:
    """Sets JAX up for this process and joins the others, if any. Call it once, before any JAX computation.

    Raises ValueError where the flags are incomplete or the platform that was asked for is absent.
    """
    cluster = find_cluster(config)
    if config.platform == "cpu":
        jax.config.update("jax_platforms", "cpu")
    cpu = config.platform == "cpu" or not any(map(importlib.util.find_spec, ACCELERATORS))
    gpu = not cpu and any(map(importlib.util.find_spec, GPU_PLUGINS))
    _add_flags(CPU_FLAGS if cpu else GPU_FLAGS if gpu else ())
    if cpu:
        heap.keep_freed_memory()
    if gpu and "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:  # the older name; both at once are refused
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", GPU_MEMORY)
    if jax.config.jax_num_cpu_devices != config.cpu_devices:  # JAX refuses even the same value once it has begun
        jax.config.update("jax_num_cpu_devices", config.cpu_devices)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # a cached program of several CPU devices may run its collectives out of order: wrong numbers, or a hang
    if config.compile_cache and not (cpu and (config.cpu_devices > 1 or cluster is not None)):
        _use_compile_cache(Path(config.compile_cache).expanduser())
    if cluster is not None:
        jax.distributed.initialize(
            coordinator_address=cluster.coordinator,
            num_processes=cluster.processes,
            process_id=cluster.process_id,
            local_device_ids=cluster.device_ids,
            cluster_detection_method="deactivate",  # find_cluster has looked already
            initialization_timeout=INITIALIZATION_SECONDS,
            heartbeat_timeout_seconds=config.heartbeat_seconds,
        )
    _check_platform(config.platform)
    if cluster is not None and jax.default_backend() == "cpu":
        _keep_gloo_quiet()


def transfer_guard(config: RuntimeConfig) -> AbstractContextManager:
    """The guard for the training step: inside it an implicit transfer raises, where `config.transfer_guard` asks so.

    It is for the step and not for the whole process: even `jax.random.key(0)` transfers its seed implicitly.
    """
    return jax.transfer_guard("disallow") if config.transfer_guard else contextlib.nullcontext()


def exit_now(code: int) -> NoReturn:
    """Ends the process at once. For when its peers are gone: a normal exit waits for them at a barrier for 100 s."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


# --- Which processes are there? ---------------------------------------------------------------------------------------


def find_cluster(config: RuntimeConfig) -> Cluster | None:
    """The place of this process among several, or None where it is alone.

    In this order:
    1. the flags, each missing one taken from the launcher's ISOMESH_COORDINATOR, ISOMESH_PROCESSES, ISOMESH_PROCESS_ID;
    2. a SLURM step, a TPU pod, an indexed Kubernetes Job, as JAX knows them.
    One process, asked for or found, needs no coordinator. Raises ValueError where the flags do not fit together.
    """
    coordinator = config.coordinator or os.environ.get("ISOMESH_COORDINATOR")
    processes = config.processes or _environment_int("ISOMESH_PROCESSES", default=0)
    if processes == 1:
        if config.process_id > 0:
            raise ValueError(f"runtime.process_id={config.process_id} is out of range: runtime.processes=1")
        return None
    if coordinator is not None:
        return _from_flags(coordinator, processes, config.process_id)
    cluster = _from_environment(config.platform)
    found = cluster.processes if cluster else 1
    if processes not in (0, found):
        raise ValueError(
            f"runtime.processes={processes} but the environment has {found}; "
            "give runtime.coordinator=HOST:PORT and runtime.process_id too, or use python -m parallel.launch"
        )
    if config.process_id not in (-1, cluster.process_id if cluster else 0):
        raise ValueError(
            f"runtime.process_id={config.process_id} needs runtime.coordinator=HOST:PORT and runtime.processes"
        )
    return cluster


def _from_flags(coordinator: str, processes: int, process_id: int) -> Cluster:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"runtime.coordinator={coordinator} is not HOST:PORT with a port in 1..65535")
    if processes == 0:
        raise ValueError(f"runtime.coordinator={coordinator} needs runtime.processes (how many processes there are)")
    if process_id < 0:
        process_id = _environment_int("ISOMESH_PROCESS_ID", "SLURM_PROCID", "JOB_COMPLETION_INDEX", default=-1)
    if process_id < 0:
        raise ValueError(f"runtime.coordinator={coordinator} needs runtime.process_id in 0..{processes - 1}")
    if process_id >= processes:
        raise ValueError(
            f"runtime.process_id={process_id} is out of range: {processes} processes are 0..{processes - 1}"
        )
    return Cluster(coordinator, processes, process_id)


def _from_environment(asked_platform: str) -> Cluster | None:
    # TPU first: its pods run under Kubernetes too. On the CPU of a TPU host the other hosts are not waited for.
    candidates = [] if asked_platform == "cpu" else [clusters.GkeTpuCluster, clusters.GceTpuCluster]
    candidates.append(clusters.SlurmCluster)
    if "JOB_COMPLETION_INDEX" in os.environ:  # a pod that is no part of an indexed Job is alone
        _require_kubernetes_package()
        candidates.append(clusters.K8sCluster)
    try:
        found = next((candidate for candidate in candidates if candidate.is_env_present()), None)
        if found is None or found.get_process_count() == 1:
            return None
        return Cluster(
            coordinator=found.get_coordinator_address(
                timeout_secs=INITIALIZATION_SECONDS, override_coordinator_port=os.environ.get("JAX_COORDINATOR_PORT")
            ),
            processes=found.get_process_count(),
            process_id=found.get_process_id(),
            device_ids=_slurm_device_ids() if found is clusters.SlurmCluster else None,
        )
    except RuntimeError as error:  # JAX's own hints run over many lines
        raise ValueError(" ".join(str(error).split())) from error


def _slurm_device_ids() -> tuple[int, ...] | None:
    """JAX gives each SLURM task the one GPU of its local id; that wastes the rest of a node that runs a single task."""
    alone_on_node = os.environ["SLURM_NTASKS"] == os.environ.get("SLURM_STEP_NUM_NODES")
    visible = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    bound_by_slurm = len(visible) == 1  # as with --gpus-per-task: the task sees its own GPU only, as number 0
    return None if alone_on_node or bound_by_slurm else (int(os.environ["SLURM_LOCALID"]),)


def _require_kubernetes_package() -> None:
    if "KUBERNETES_SERVICE_HOST" in os.environ and importlib.util.find_spec("kubernetes") is None:
        raise ValueError(
            f"pod {os.environ['JOB_COMPLETION_INDEX']} of a Kubernetes Job cannot tell the number of pods; set "
            "runtime.processes=N runtime.coordinator=HOST:PORT (processes=1: each pod alone), or install `kubernetes`"
        )


def _environment_int(*names: str, default: int) -> int:
    """The first of the environment variables that is set, as an integer."""
    for name in names:
        if value := os.environ.get(name):
            if not value.isdigit():
                raise ValueError(f"environment variable {name}={value} is not a number")
            return int(value)
    return default


# --- Platform and compile cache ---------------------------------------------------------------------------------------


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


def _add_flags(flags: tuple[str, ...]) -> None:
    """Adds XLA flags to those of the environment, which win."""
    theirs = os.environ.get("XLA_FLAGS", "").split()
    given = {flag.partition("=")[0] for flag in theirs}
    os.environ["XLA_FLAGS"] = " ".join(theirs + [flag for flag in flags if flag.partition("=")[0] not in given])


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


# --- Stopping ---------------------------------------------------------------------------------------------------------


class StopSignal:
    """Turns Ctrl-C and SIGTERM into an answer of `requested(step)`, the same on all processes at the same step.

    with StopSignal() as stop:
        for step in ...:
            if stop.requested(step): save and leave the loop

    One process: Python handlers set a flag; a second Ctrl-C raises KeyboardInterrupt at once; the handlers before are
    restored on leaving. Several: JAX's preemption service catches SIGTERM (that handler is left alone) and lets all
    agree on a step, so all must ask at every step, from the same first step. Outside the main thread, where Python
    allows no handlers, no handler is set.
    """

    def __init__(self):
        self.reason: str | None = None  # for the log, once a stop was requested
        self._several = jax.distributed.is_initialized()
        self._received: str | None = None
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            handlers = {signal.SIGINT: self._on_interrupt}
            if not self._several:
                handlers[signal.SIGTERM] = self._on_terminate
            self._previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def requested(self, step: int) -> bool:
        """True from the step on at which all processes stop. Call it once a step, on every process."""
        if self.reason is None:
            if not self._several:
                self.reason = self._received
            elif multihost_utils.reached_preemption_sync_point(step):
                self.reason = self._received or "SIGTERM to one of the processes"
        return self.reason is not None

    def _on_interrupt(self, number, frame) -> None:
        if self._received == "Ctrl-C":
            raise KeyboardInterrupt
        self._received = "Ctrl-C"
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)  # the preemption service knows SIGTERM only

    def _on_terminate(self, number, frame) -> None:
        self._received = self._received or "SIGTERM"
