"""Which processes does a run have, and which is this one? From flags, the launcher, or the machine's scheduler."""

import importlib.util
import os
from dataclasses import dataclass

# Private, because the public door (`jax.distributed.initialize()`) starts the service before it tells how many
# processes there are, and a single process must start without one. These classes are the same in jax 0.10 to 0.12.
from jax._src import clusters

from runtime.config import RuntimeConfig

INITIALIZATION_SECONDS = 300  # how long a process waits for the others at start-up


@dataclass(frozen=True)
class Cluster:
    """This process among several. `device_ids`: the local GPUs that are its own, None for all that it sees."""

    coordinator: str
    processes: int
    process_id: int
    device_ids: tuple[int, ...] | None = None


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
            "give runtime.coordinator=HOST:PORT and runtime.process_id too, or use python -m runtime.launch"
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
