"""Where a process finds its place among others, what start() refuses, and stop signals in one process."""

import importlib.util
import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import pytest
from jax._src import clusters

from runtime import start as runtime
from runtime.cluster import Cluster, find_cluster
from runtime.config import RuntimeConfig
from runtime.ports import free_port
from runtime.stop import StopSignal

ROOT = Path(__file__).resolve().parents[2]
PREFIXES = (
    "SLURM_",
    "ISOMESH_",
    "KUBERNETES_",
    "JOB_COMPLETION",
    "TPU_",
    "MEGASCALE_",
    "JAX_COORDINATOR",
    "CUDA_VISIBLE",
)
SLURM_STEP = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "node[007-008],other3",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_NODES": "2",
}
LAUNCHER = {"ISOMESH_COORDINATOR": "127.0.0.1:1234", "ISOMESH_PROCESSES": "2", "ISOMESH_PROCESS_ID": "1"}


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith(PREFIXES):
            monkeypatch.delenv(name)


@pytest.fixture
def setenv(monkeypatch):
    def set_all(variables: dict[str, str]) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_all


def test_a_bare_machine_is_one_process():
    assert find_cluster(RuntimeConfig()) is None


def test_flags_alone_are_enough():
    config = RuntimeConfig(coordinator="[::1]:80", processes=3, process_id=2)
    assert find_cluster(config) == Cluster("[::1]:80", 3, 2)


def test_launcher_environment(setenv):
    setenv(SLURM_STEP | LAUNCHER)  # a launcher inside a SLURM step: the nearer one counts
    assert find_cluster(RuntimeConfig()) == Cluster("127.0.0.1:1234", 2, 1)
    assert find_cluster(RuntimeConfig(process_id=0)) == Cluster("127.0.0.1:1234", 2, 0)
    assert find_cluster(RuntimeConfig(processes=1)) is None


def test_slurm_step_of_several_tasks(setenv):
    setenv(SLURM_STEP)
    found = find_cluster(RuntimeConfig())
    assert found == Cluster("node007:61441", 4, 3, device_ids=(1,))  # port: 61440 + 4097 % 4096
    assert find_cluster(RuntimeConfig(processes=4)) == found


@pytest.mark.parametrize(
    ("change", "device_ids"),
    [
        ({"SLURM_STEP_NUM_NODES": "4"}, None),  # one task a node: all its GPUs
        ({"CUDA_VISIBLE_DEVICES": "5"}, None),  # SLURM has chosen the GPU already
        ({"CUDA_VISIBLE_DEVICES": "4,5"}, (1,)),
    ],
)
def test_slurm_task_takes_its_own_gpus(setenv, change, device_ids):
    setenv(SLURM_STEP | change)
    assert find_cluster(RuntimeConfig()).device_ids == device_ids


def test_slurm_single_task_is_one_process(setenv):
    setenv(SLURM_STEP | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "absent"})
    assert find_cluster(RuntimeConfig()) is None


def test_slurm_batch_script_without_srun_is_one_process(setenv):
    setenv({name: value for name, value in SLURM_STEP.items() if name != "SLURM_STEP_NODELIST"})
    assert find_cluster(RuntimeConfig()) is None


def test_slurm_rank_completes_flags(setenv):
    setenv(SLURM_STEP)
    assert find_cluster(RuntimeConfig(coordinator="head:99", processes=4)) == Cluster("head:99", 4, 3)


def test_kubernetes_pod_outside_an_indexed_job_is_one_process(setenv, recwarn):
    setenv({"KUBERNETES_SERVICE_HOST": "10.0.0.1"})
    assert find_cluster(RuntimeConfig()) is None
    assert not recwarn.list


def test_kubernetes_index_completes_flags(setenv):
    setenv({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "2"})
    config = RuntimeConfig(coordinator="job-0.pods:55527", processes=4)
    assert find_cluster(config) == Cluster("job-0.pods:55527", 4, 2)
    assert find_cluster(RuntimeConfig(processes=1)) is None


def test_kubernetes_job_without_the_package_names_the_flags(setenv, monkeypatch):
    setenv({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "2"})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pod 2 .* set runtime.processes=N runtime.coordinator=HOST:PORT"):
        find_cluster(RuntimeConfig())


@pytest.mark.parametrize("pods", [1, 4])
def test_kubernetes_job_through_its_api(setenv, monkeypatch, pods):
    setenv({"JOB_COMPLETION_INDEX": "2"})
    kubernetes = clusters.K8sCluster
    monkeypatch.setattr(kubernetes, "is_env_present", lambda: True)
    monkeypatch.setattr(kubernetes, "get_process_count", lambda: pods)
    monkeypatch.setattr(kubernetes, "get_coordinator_address", lambda **_: "job-0.pods:55527")
    expected = Cluster("job-0.pods:55527", 4, 2) if pods == 4 else None
    assert find_cluster(RuntimeConfig()) == expected


def test_kubernetes_hints_become_one_line(setenv, monkeypatch):
    def fail():
        raise RuntimeError("Pods need\na headless\nservice")

    setenv({"JOB_COMPLETION_INDEX": "2"})
    monkeypatch.setattr(clusters.K8sCluster, "is_env_present", lambda: True)
    monkeypatch.setattr(clusters.K8sCluster, "get_process_count", fail)
    with pytest.raises(ValueError, match=r"^Pods need a headless service$"):
        find_cluster(RuntimeConfig())


def test_tpu_pod(setenv, monkeypatch):
    tpu = sys.modules["jax._src.clusters.cloud_tpu_cluster"]
    monkeypatch.setattr(tpu, "running_in_cloud_tpu_vm", True)
    slices = {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "localhost:80"}
    setenv(slices | {"TPU_WORKER_HOSTNAMES": "localhost,b", "TPU_WORKER_ID": "1"})
    assert find_cluster(RuntimeConfig()) == Cluster("localhost:8482", 4, 3)
    assert find_cluster(RuntimeConfig(platform="cpu")) is None  # the CPU of one host of the pod
    setenv({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0", "MEGASCALE_NUM_SLICES": "1"})
    assert find_cluster(RuntimeConfig()) is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"coordinator": "a:1"}, "needs runtime.processes"),
        ({"coordinator": "a:1", "processes": 2}, r"needs runtime.process_id in 0..1"),
        (
            {"coordinator": "a:1", "processes": 2, "process_id": 2},
            r"process_id=2 is out of range: 2 processes are 0..1",
        ),
        ({"coordinator": "a", "processes": 2, "process_id": 0}, "coordinator=a is not HOST:PORT"),
        ({"coordinator": "a:99999", "processes": 2, "process_id": 0}, "is not HOST:PORT"),
        ({"processes": 2}, "processes=2 but the environment has 1"),
        ({"process_id": 1}, "process_id=1 needs runtime.coordinator"),
        ({"processes": 1, "process_id": 1}, "out of range: runtime.processes=1"),
        ({"platform": "cuda"}, "platform=cuda is unknown; valid: auto, cpu, gpu, tpu"),
        ({"cpu_devices": 0}, "cpu_devices=0 is below 1"),
        ({"processes": -1}, "processes=-1 is below 0"),
        ({"heartbeat_seconds": 0}, "heartbeat_seconds=0 is below 1"),
    ],
)
def test_flags_that_do_not_fit_are_one_clear_line(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        find_cluster(RuntimeConfig(**fields))
    assert "\n" not in str(error.value)


def test_environment_that_is_no_number(setenv):
    setenv({"ISOMESH_PROCESSES": "two"})
    with pytest.raises(ValueError, match="ISOMESH_PROCESSES=two is not a number"):
        find_cluster(RuntimeConfig())


def run_python(code: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("devices", [1, 3])
def test_start_gives_devices_and_a_private_cache_without_a_service(tmp_path, devices):
    """Programs of several CPU devices are not cached: read back, their collectives may run out of order."""
    code = f"""
import jax, logging
from runtime.config import RuntimeConfig
from runtime.start import start
from runtime.leave import exit_now
start(RuntimeConfig(platform="cpu", cpu_devices={devices}, compile_cache={str(tmp_path / "cache")!r}))
jax.jit(lambda x: x @ x)(jax.numpy.ones((3, 3)))
print(jax.device_count(), jax.distributed.is_initialized(), end="")
exit_now(3)
"""
    result = run_python(code)
    assert (result.returncode, result.stdout) == (3, f"{devices} False"), result.stderr  # exit_now flushed it
    if devices > 1:
        assert not (tmp_path / "cache").exists()
        return
    (of_machine,) = (tmp_path / "cache").iterdir()
    assert of_machine.stat().st_mode & 0o777 == 0o700
    assert any(of_machine.iterdir())


@pytest.mark.parametrize("rank", [0, 1])
def test_others_that_do_not_come_are_awaited_for_so_long_and_told_in_one_line(rank):
    port = free_port()
    code = f"""
from runtime import start
from runtime.config import RuntimeConfig
start.INITIALIZATION_SECONDS = 1
place = dict(coordinator="127.0.0.1:{port}", processes=2, process_id={rank})
start.start(RuntimeConfig(platform="cpu", compile_cache=None, **place))
"""
    result = run_python(code)
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith(
        f"error: process {rank} of 2 has waited 1 s for the others at 127.0.0.1:{port}; start"
    )


def test_start_refuses_an_absent_platform(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    with pytest.raises(
        ValueError, match=r"platform=tpu but JAX found \w+ only; install with `make setup EXTRAS=tpu` or set"
    ):
        runtime._check_platform("tpu")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    with pytest.raises(ValueError, match=r"\(JAX_PLATFORMS=cpu is set\)"):
        runtime._check_platform("tpu")


@pytest.mark.parametrize("unsafe", ["cache", "cache/machine"])
def test_a_cache_that_others_can_write_is_not_used(tmp_path, monkeypatch, caplog, unsafe):
    monkeypatch.setattr(runtime, "_machine", lambda: "machine")
    monkeypatch.setattr(runtime.jax.config, "update", lambda *_: pytest.fail("the cache was turned on"))
    (tmp_path / "cache" / "machine").mkdir(parents=True)
    (tmp_path / unsafe).chmod(0o770)
    with caplog.at_level(logging.WARNING):
        runtime._use_compile_cache(tmp_path / "cache")
    assert f"others can write {tmp_path / unsafe};" in caplog.text


def test_a_cache_that_cannot_be_made_is_only_a_warning(tmp_path, caplog):
    (tmp_path / "file").touch()
    runtime._use_compile_cache(tmp_path / "file" / "cache")
    assert "no compile cache" in caplog.text


def test_transfer_guard_is_for_the_step():
    double = jax.jit(lambda x: x * 2)
    x = jax.device_put(2.0)
    with runtime.transfer_guard(RuntimeConfig(transfer_guard=True)):
        double(x)
        with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
            double(3.0)
    with runtime.transfer_guard(RuntimeConfig()):
        double(3.0)


@pytest.mark.parametrize(("number", "reason"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
def test_stop_signal_in_one_process(number, reason):
    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert not stop.requested(4)
        assert stop.reason is None
        signal.raise_signal(number)
        assert stop.requested(5)
        assert stop.requested(6)
        assert stop.reason == reason
    assert signal.getsignal(number) is before


def test_second_ctrl_c_raises_at_once_and_handlers_are_restored():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopSignal():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_ctrl_c_after_sigterm_does_not_raise():
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert stop.requested(0)


def test_outside_the_main_thread_no_handler_is_set():
    answers = []

    def loop() -> None:
        before = signal.getsignal(signal.SIGINT)
        with StopSignal() as stop:
            answers.extend([stop.requested(0), signal.getsignal(signal.SIGINT) is before])

    thread = threading.Thread(target=loop)
    thread.start()
    thread.join()
    assert answers == [False, True]
