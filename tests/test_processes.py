"""Several real processes: the same run as one process with as many devices, stopped together, resumed by any number."""

import shutil
import signal
import subprocess
import time

import runs

DONE, PREEMPTED = 0, 75
DEVICES = 4  # in all


def test_two_processes_equal_one_and_stop_together(tmp_path):
    text, one, two = runs.corpus(tmp_path / "text"), tmp_path / "one", tmp_path / "two"
    assert runs.run(runs.overrides(text, one, "mesh.data=2"), DEVICES) == DONE

    # SIGTERM to the launcher: both stop at the same step, after a checkpoint that both wrote
    arguments = runs.overrides(text, two, "mesh.data=2")
    process = subprocess.Popen(
        runs.command(arguments, DEVICES, processes=2),
        cwd=runs.ROOT,
        env=runs.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    metrics, deadline = two / "metrics.jsonl", time.monotonic() + 120
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < 3:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=90)
    assert process.returncode == PREEMPTED, output
    assert "Traceback" not in output
    assert "[0] step 3/24" in output
    assert "[1] step 3/24" not in output  # only process 0 speaks
    stopped = runs.steps(two)[-1]
    assert 3 <= stopped < runs.STEPS
    assert list(runs.losses(two)) == list(range(1, stopped + 1))

    # one process goes on from what two wrote
    alone = tmp_path / "alone"
    shutil.copytree(two, alone)
    assert runs.run(runs.overrides(text, alone, "mesh.data=2"), DEVICES) == DONE
    runs.assert_near(runs.losses(alone), runs.losses(one))
    runs.assert_near(runs.evaluations(alone), runs.evaluations(one))

    # and so do two, by the same command
    ended = runs.outside(arguments, devices=DEVICES, processes=2)
    assert ended.returncode == DONE, ended.stdout + ended.stderr
    assert f"resumed after step {stopped}" in ended.stdout
    runs.assert_near(runs.losses(two), runs.losses(one))
    runs.assert_near(runs.evaluations(two), runs.evaluations(one))
    assert runs.record(two, runs.STEPS)["data"] == runs.record(one, runs.STEPS)["data"]


def test_mistake_is_told_and_ends_all_processes(tmp_path):
    text = runs.corpus(tmp_path / "text")
    arguments = runs.overrides(text, tmp_path / "run", "checkpoint.resume=require")
    ended = runs.outside(arguments, devices=DEVICES, processes=2)
    assert ended.returncode == 2
    assert "[0] error: checkpoint.resume=require" in ended.stderr
    assert "Traceback" not in ended.stdout + ended.stderr
