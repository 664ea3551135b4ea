"""Two processes, started by hand, of which one meets with something before or in the loop: both end, and say why."""

import signal
import subprocess
import time

import pytest
import runs

FAULT, PREEMPTED, INTERRUPTED = 3, 75, 130
DEEP = ("model.layers=16", "model.scan_layers=false")  # compiles for ten seconds

# train.py, but for one function that raises what no one expects
BROKEN = """
import runpy, sys
import {module} as module
original = {where}
def broken(*arguments, **named):
    if {when}:
        raise RuntimeError("the shelf fell down")
    return original(*arguments, **named)
{where} = broken
sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")
"""
BEFORE_THE_LOOP = BROKEN.format(module="training.job", where="module.make_job", when="True")
IN_THE_LOOP = BROKEN.format(module="data.loader", where="module.Loader.batch", when="arguments[1] == 9")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return runs.corpus(tmp_path_factory.mktemp("corpus") / "text")


def arguments_of(text, tmp_path, *more):
    return runs.overrides(text, tmp_path / "run", "mesh.data=2", f"data.cache={tmp_path}/cache", *more)


def until(process, word):
    """Reads what a process says, up to a line with this word."""
    said = []
    while not said or word not in said[-1]:
        said.append(process.stdout.readline())
        assert said[-1], said


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("program", [BEFORE_THE_LOOP, IN_THE_LOOP], ids=["before the loop", "in the loop"])
def test_an_unexpected_exception_in_one(text, tmp_path, rank, program):
    programs = [["-c", program] if rank == other else ["train.py"] for other in (0, 1)]
    codes, said = runs.ended(runs.by_hand(arguments_of(text, tmp_path), [], [], programs=programs))
    assert codes == [FAULT, FAULT], said
    assert "Traceback" in said[rank]
    assert "Traceback" not in said[1 - rank]
    assert f"process {rank}: error: RuntimeError: the shelf fell down" in said[1 - rank]
    assert runs.steps(tmp_path / "run") == ([4, 8] if program == IN_THE_LOOP else [])


@pytest.mark.parametrize("rank", [0, 1])
def test_a_mistake_on_one_command_line(text, tmp_path, rank):
    own = [["optimizer.lrr=1"] if rank == other else [] for other in (0, 1)]
    codes, said = runs.ended(runs.by_hand(arguments_of(text, tmp_path), *own), within=20)
    assert codes == [2, 2], said
    assert said[rank].startswith("error: unknown optimizer.lrr")
    assert said[1 - rank].startswith(f"process {rank}: error: unknown optimizer.lrr")


def test_a_run_directory_that_is_not_shared(text, tmp_path):
    homes = [tmp_path / "host0", tmp_path / "host1"]
    for home in homes:
        home.mkdir()
    arguments = [*arguments_of(text, tmp_path), "run.dir=run"]
    codes, said = runs.ended(runs.by_hand(arguments, [], [], cwd=homes))
    assert codes == [2, 2], said
    assert "error: process 1 does not see what process 0 writes to run" in said[1]
    assert not (homes[0] / "run" / "checkpoints").exists()
    assert list((homes[0] / "run").glob(".shared*")) == []


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_one_while_both_compile(text, tmp_path, rank):
    processes = runs.by_hand(arguments_of(text, tmp_path, *DEEP), [], [])
    wait_for_config(tmp_path / "run", processes)
    processes[rank].kill()
    codes, said = runs.ended(processes, within=10)
    assert codes[rank] == -signal.SIGKILL
    if rank == 1:
        assert codes[0] == FAULT, said
        assert said[0].splitlines()[-1] == "process 1: ended without a word: it was killed, or has crashed"
    else:  # JAX may abort a process whose coordinator has gone before we can end it
        assert codes[1] in (FAULT, -signal.SIGABRT), said


def wait_for_config(directory, processes):
    """config.yaml is written right before the step is compiled."""
    while not (directory / "config.yaml").exists():
        assert [process.poll() for process in processes] == [None] * len(processes)
        time.sleep(0.01)
    time.sleep(1)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, PREEMPTED), (signal.SIGINT, INTERRUPTED)])
def test_a_signal_while_the_step_is_compiled(text, tmp_path, processes, number, code):
    arguments = arguments_of(text, tmp_path, *DEEP)
    environment = runs.environment(JAX_COMPILATION_CACHE_DIR="")
    command = runs.command(arguments, 4, processes=processes)
    run = subprocess.Popen(
        command, cwd=runs.ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for_config(tmp_path / "run", [run])
    began = time.monotonic()
    run.send_signal(number)
    said, _ = run.communicate(timeout=60)
    assert (run.returncode, time.monotonic() - began < 2) == (code, True), said
    assert "Traceback" not in said


@pytest.mark.parametrize("delay", [0.5, 1.0, 2.0, 4.0])
def test_a_signal_while_modules_are_imported(text, tmp_path, delay):
    run = subprocess.Popen(
        runs.command([*arguments_of(text, tmp_path), "train.steps=100000"], 4),
        cwd=runs.ROOT,
        env=runs.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    time.sleep(delay)
    run.send_signal(signal.SIGTERM)
    said, _ = run.communicate(timeout=60)
    assert run.returncode == PREEMPTED, said
    assert "Traceback" not in said


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_one_in_the_loop(text, tmp_path, rank):
    arguments = arguments_of(text, tmp_path, "train.steps=100000", "checkpoint.every=0")
    processes = runs.by_hand(arguments, [], [])
    until(processes[0], "step 5/")
    processes[rank].kill()
    codes, said = runs.ended(processes, within=10)
    assert codes[rank] == -signal.SIGKILL
    assert codes[1 - rank] in ((FAULT,) if rank == 1 else (FAULT, -signal.SIGABRT)), said
