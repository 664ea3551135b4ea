"""Several real processes: the same run as one process with as many devices, stopped together, resumed by any number."""

import random
import re
import shutil
import signal
import subprocess
import time

import pytest
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
    assert re.search(r"\[[01]\] error: checkpoint.resume=require", ended.stderr)
    assert "Traceback" not in ended.stdout + ended.stderr


def folders(tmp_path, change):
    """A home folder for each of two processes: the same text, but for what `change` does to that of the second."""
    homes = [tmp_path / "host0", tmp_path / "host1"]
    for home in homes:
        runs.corpus(home / "text")
    change(homes[1] / "text")
    return homes


def other_words(text):
    file = text / "07.txt"
    file.write_text(file.read_text()[::-1])  # as long as before


@pytest.mark.parametrize(
    ("change", "own", "line"),
    [
        (shutil.rmtree, (), r"data.path=~/text/\*.txt matches no file"),
        (
            other_words,
            (),
            r"data \(digest of the text\) is \w{12} in process 0 and \w{12} in process 1; "
            r"data \(digest of the tokens\) is \w{12} in process 0 and \w{12} in process 1: all processes",
        ),
        (bool, ["optimizer.lr=0"], r"optimizer.lr is 0.002 in process 0 and 0.0 in process 1: all processes"),
    ],
    ids=["a text that one has", "texts of one length", "settings"],
)
def test_processes_that_were_not_given_the_same_all_end_with_one_line(tmp_path, change, own, line):
    arguments = runs.overrides(tmp_path / "text", tmp_path / "run", "data.path='~/text/*.txt'", "mesh.data=2")
    own = [[f"data.cache={tmp_path}/cache0"], [f"data.cache={tmp_path}/cache1", *own]]
    codes, said = runs.ended(runs.by_hand(arguments, *own, homes=folders(tmp_path, change)))
    assert codes == [2, 2], said
    assert re.search(f"^error: {line}", said[1], re.MULTILINE), said
    assert re.search(f"^process 1: error: {line}", said[0], re.MULTILINE), said
    assert "Traceback" not in "".join(said)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_signal_while_the_tokenizer_is_trained_ends_both_and_leaves_nothing(tmp_path):
    words = random.Random(0).choices([f"w{number}" for number in range(30_000)], k=3_000_000)
    (tmp_path / "text.txt").write_text(" ".join(words) + "\n\n" + " ".join(words[:1000]))
    arguments = runs.overrides(tmp_path / "text", tmp_path / "run", f"data.path={tmp_path}/text.txt", "tokenizer=bpe")
    process = subprocess.Popen(
        runs.command(arguments, DEVICES, processes=2),
        cwd=runs.ROOT,
        env=runs.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said = []
    # process 0 alone speaks, and the other may be the one that prepares what they share
    while not re.search("training the tokenizer|waiting for another", line := process.stdout.readline()):
        said.append(line)
        assert line, said
    time.sleep(0.5)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=90)
    assert time.monotonic() - began < 2
    assert process.returncode == PREEMPTED, output
    assert "stopped by SIGTERM" in output
    assert "Traceback" not in output
    assert list((tmp_path / "cache").glob(".tmp*")) == []
