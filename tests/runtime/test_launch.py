"""Real processes over loopback: sums, deaths, signals, exit codes. The programs are tiny and written by the tests."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from runtime import launch

ROOT = Path(__file__).resolve().parents[2]
START = """
import os, signal, sys, time
import jax, jax.numpy as jnp
from runtime.config import RuntimeConfig
from runtime.leave import exit_now
from runtime.start import start
from runtime.stop import StopSignal
start(RuntimeConfig(platform="cpu", cpu_devices=2, compile_cache=None, heartbeat_seconds=10))
rank = jax.process_index()
mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
x = jax.make_array_from_callback((jax.device_count(),), rows, lambda index: jnp.arange(jax.device_count())[index])
total = jax.jit(jnp.sum, out_shardings=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
"""


@pytest.fixture
def program(tmp_path):
    def write(text: str, prelude: str = "import os, signal, sys, time\n") -> str:
        path = tmp_path / "program.py"
        path.write_text(prelude + textwrap.dedent(text))
        return str(path)

    return write


def begin(*arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "runtime.launch", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(*arguments: str) -> tuple[int, str, str, float]:
    began = time.monotonic()
    process = begin(*arguments)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err, time.monotonic() - began


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_processes_share_a_mesh_and_their_lines_have_ranks(program):
    code, out, err, _ = run(
        "--processes", "2", program("print('sum', int(total(x)), 'of', jax.process_count(), flush=True)", START)
    )
    assert code == 0, err
    assert sorted(out.splitlines()) == ["[0] sum 6 of 2", "[1] sum 6 of 2"]


def test_a_killed_peer_ends_the_run_fast(program):
    text = """
    for step in range(100_000):
        if rank == 1 and step == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            total(x).block_until_ready()
        except Exception:
            exit_now(3)
    """
    code, _, err, seconds = run("--processes", "2", "--grace", "2", program(text, START))
    assert code in (137, 3), err  # the exit of the survivor, within 0.1 s, may be seen first
    assert seconds < 20


def test_sigterm_stops_all_at_the_same_step(program):
    text = """
    with StopSignal() as stop:
        for step in range(7, 100_000):
            if stop.requested(step):
                print(f"stop at {step}: {stop.reason}")
                sys.exit(75)
            total(x).block_until_ready()
            print("step", step)
            time.sleep(0.02 * (1 + rank))
    """
    process = begin("--processes", "2", program(text, START))
    for line in process.stdout:
        if line.endswith("step 10\n"):
            break
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    stops = sorted(line for line in out.splitlines() if "stop at" in line)
    assert process.returncode == 75, err
    assert [line[:3] for line in stops] == ["[0]", "[1]"]
    assert stops[0][3:] == stops[1][3:]
    assert "Traceback" not in err


def test_ctrl_c_reaches_every_process_once(program):
    text = """
    received = []
    signal.signal(signal.SIGINT, lambda *_: received.append(1))
    print("ready")
    while not received:
        time.sleep(0.01)
    time.sleep(0.3)
    print("interrupts", len(received))
    sys.exit(75)
    """
    process = begin("--processes", "2", program(text))
    assert sorted(process.stdout.readline() for _ in range(2)) == ["[0] ready\n", "[1] ready\n"]
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    assert sorted(out.splitlines()) == ["[0] interrupts 1", "[1] interrupts 1"]
    assert process.returncode == 75


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ("0 if rank else 0", 0),
        ("2", 2),
        ("75", 75),
        ("75 if rank else 0", 75),
        ("3 if rank else 75", 3),  # a failure counts more than a clean stop
    ],
)
def test_exit_codes_come_through(program, ends, expected):
    code, _, err, _ = run(
        "--processes", "2", program(f"rank = int(os.environ['ISOMESH_PROCESS_ID']); sys.exit({ends})")
    )
    assert code == expected, err


def test_first_failure_ends_the_others_and_gives_the_code(program):
    text = """
    if os.environ["ISOMESH_PROCESS_ID"] == "1":
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGSEGV)
    print("pid", os.getpid())
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as JAX's preemption service does, in effect
    time.sleep(60)
    """
    code, out, err, seconds = run("--processes", "3", "--grace", "0.5", program(text))
    assert code == 128 + signal.SIGSEGV
    assert "launch: process 1 ended with exit code 139; ending the others" in err
    assert seconds < 10
    assert not any(is_alive(int(line.split()[-1])) for line in out.splitlines())


def test_clean_stop_of_one_waits_for_the_others(program):
    text = """
    if os.environ["ISOMESH_PROCESS_ID"] == "1":
        time.sleep(0.7)
        print("saved")
    sys.exit(75)
    """
    code, out, _, _ = run("--processes", "2", "--grace", "0.1", program(text))
    assert (code, out) == (75, "[1] saved\n")


def test_kill_9_of_the_launcher_takes_the_processes_along(program):
    process = begin("--processes", "2", program("print(os.getpid()); time.sleep(60)"))
    pids = [int(process.stdout.readline().split()[-1]) for _ in range(2)]
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 5
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(is_alive, pids))


def test_module_form_streams_and_arguments():
    code, out, err, _ = run("--processes", "2", "-m", "timeit", "-n", "1", "-r", "1", "-s", "import sys", "print('x')")
    assert code == 0, err
    assert sum(line == "[0] x" for line in out.splitlines()) == sum(line == "[1] x" for line in out.splitlines()) == 1


def test_one_process_has_no_prefix_and_no_coordinator(program):
    text = "print(os.environ.get('ISOMESH_COORDINATOR'), sys.argv[1:]); print('no newline', end='', file=sys.stderr)"
    code, out, err, _ = run("--processes", "1", program(text), "--processes", "a b")
    assert (code, out, err) == (0, "None ['--processes', 'a b']\n", "no newline")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes", "0", "x.py"], "--processes 0 is below 1"),
        (["--processes", "2"], "no program given"),
        (["--processes", "2", "absent.py"], "no such file: absent.py"),
        (["x.py"], "--processes"),
    ],
)
def test_mistakes_on_the_command_line_exit_with_2(capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        launch.parse(arguments)
    assert message in capsys.readouterr().err
