"""Signals before the loop, and several processes that end together: plain Python processes, without JAX."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# The main thread is in C code that does not come back to Python, as a compiler or a tokenizer is.
BUSY = """
import sys, time, threading, hashlib
from runtime import leave
leave.answer_signals()
from pathlib import Path
with leave.on_leaving(Path(sys.argv[1]).unlink):
    Path(sys.argv[1]).touch()
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"x", b"x", 100_000_000)
"""

# One of several: sys.argv is the folder of the store, the rank, and what process RANK does.
ONE_OF_SEVERAL = """
import os, sys, time
from pathlib import Path
from runtime import leave
from runtime.lifeline import Lifeline
leave.answer_signals()
folder, rank = Path(sys.argv[1]), int(sys.argv[2])
class Store:
    def key_value_set(self, key, value):
        (folder / "writing").write_text(value)
        (folder / "writing").rename(folder / key.replace("/", "-"))
    def blocking_key_value_get(self, key, milliseconds):
        while not (folder / key.replace("/", "-")).exists():
            time.sleep(0.01)
        return (folder / key.replace("/", "-")).read_text()
lifeline = Lifeline(Store(), rank, 3, "127.0.0.1", "127.0.0.1")
leave.tell_with(lifeline.tell)
sys.excepthook = leave.leave_by
print("ready", flush=True)
word = sys.stdin.readline().strip()
if word == "mistake":
    leave.leave(2, "error: no such text")
if word == "bug":
    {}["key"]
if word == "done":
    lifeline.goodbye()
    sys.exit(0)
time.sleep(60)
"""


def start(code, *arguments):
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, text=True, **pipes)


def ready(process):
    assert process.stdout.readline() == "ready\n", process.communicate()[1]
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_is_answered_while_the_main_thread_is_busy_elsewhere(tmp_path, number, code):
    process = ready(start(BUSY, tmp_path / "temporary"))
    time.sleep(0.2)
    assert (tmp_path / "temporary").exists()
    began = time.monotonic()
    process.send_signal(number)
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)  # a second one changes nothing
    _, said = process.communicate(timeout=10)
    assert time.monotonic() - began < 2
    assert process.returncode == code
    assert said.count("\n") == 1
    assert not (tmp_path / "temporary").exists()


def test_nothing_is_said_after_the_line_that_says_why(tmp_path):
    """By a thread that is still at work, and would fail for want of what the clean-up has removed."""
    talking = "while True: print('at work', file=sys.stderr)"
    process = ready(
        start(BUSY.replace('hashlib.pbkdf2_hmac("sha256", b"x", b"x", 100_000_000)', talking), tmp_path / "x")
    )
    while "at work" not in process.stderr.readline():
        pass
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=10)
    assert "intact" in said.splitlines()[-1]
    assert process.returncode == 75


def test_what_is_begun_while_a_process_leaves_is_cleaned_up_too(tmp_path):
    """As where a lock becomes free because the process that had it was stopped as well."""
    late = (
        "while not leave._leaving.locked(): time.sleep(0.01)\n"
        "    Path(sys.argv[2]).touch()\n"
        "    with leave.on_leaving(Path(sys.argv[2]).unlink):\n"
        "        Path(sys.argv[3]).touch()"
    )
    code = BUSY.replace("Path(sys.argv[1]).unlink", "lambda: (time.sleep(0.5), Path(sys.argv[1]).unlink())")
    code = code.replace('hashlib.pbkdf2_hmac("sha256", b"x", b"x", 100_000_000)', late)
    process = ready(start(code, *(tmp_path / name for name in ("first", "second", "third"))))
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=10)
    assert (process.returncode, said.count("\n")) == (75, 1)
    assert list(tmp_path.iterdir()) == []


def test_in_the_loop_the_second_ctrl_c_ends_a_process_whose_step_takes_long(tmp_path):
    """There the first is a flag, which Python sets when the main thread comes back to it."""
    of_the_loop = "import signal\nsignal.signal(signal.SIGINT, lambda *_: None)\nwith leave.on_leaving"
    process = ready(start(BUSY.replace("with leave.on_leaving", of_the_loop), tmp_path / "temporary"))
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert (process.returncode, time.monotonic() - began < 2) == (130, True)


def test_a_clean_up_that_hangs_is_left_after_two_seconds(tmp_path):
    hangs = BUSY.replace("Path(sys.argv[1]).unlink", "lambda: time.sleep(60)")
    process = ready(start(hangs, tmp_path / "temporary"))
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=10)
    assert (process.returncode, time.monotonic() - began < 2) == (75, True)


@pytest.fixture
def three(tmp_path):
    processes = [start(ONE_OF_SEVERAL, tmp_path, rank) for rank in range(3)]
    for process in processes:
        ready(process)
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


def tell(process, word):
    process.stdin.write(f"{word}\n")
    process.stdin.flush()


def ends(processes, within=2.0):
    """The exit codes and what was said, of processes that all end in time."""
    began = time.monotonic()
    said = [process.communicate(timeout=30)[1] for process in processes]
    assert time.monotonic() - began < within
    return [process.returncode for process in processes], said


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_mistake_in_one_ends_all_with_its_line_and_code(three, rank):
    tell(three[rank], "mistake")
    codes, said = ends(three)
    assert codes == [2, 2, 2]
    told = f"process {rank}: error: no such text\n"
    assert said == ["error: no such text\n" if other == rank else told for other in range(3)]


@pytest.mark.parametrize("rank", [0, 2])
def test_a_killed_one_ends_all(three, rank):
    three[rank].kill()
    codes, said = ends(three)
    assert codes == [-signal.SIGKILL if other == rank else 3 for other in range(3)]
    told = f"process {rank}: ended without a word: it was killed, or has crashed\n"
    assert said == ["" if other == rank else told for other in range(3)]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_to_one_ends_all(three, number, code):
    three[1].send_signal(number)
    assert ends(three)[0] == [code] * 3


def test_an_unexpected_exception_ends_all_and_keeps_its_traceback(three):
    tell(three[1], "bug")
    codes, said = ends(three, within=4.0)
    assert codes == [3, 3, 3]
    assert "Traceback" in said[1]
    assert said[0] == said[2] == "process 1: error: KeyError: 'key'\n"


@pytest.mark.parametrize("rank", [0, 1])
def test_one_that_is_done_leaves_the_others_alone(three, rank):
    tell(three[rank], "done")
    assert three[rank].wait(timeout=10) == 0
    others = [process for process in three if process is not three[rank]]
    time.sleep(0.5)
    assert [process.poll() for process in others] == [None, None]
    if rank == 1:  # and process 0 still hears of the rest
        tell(others[1], "mistake")
        assert ends(others)[0] == [2, 2]


def test_a_stranger_on_the_port_is_shown_out(three, tmp_path):
    port = int((tmp_path / "isomesh-lifeline").read_text().split()[0])
    for hello in (b"GET / HTTP/1.1\r\n\r\n", b'{"token": "wrong", "rank": 1}\n', b'{"token": 1}\n', b"[]\n"):
        with socket.create_connection(("127.0.0.1", port), timeout=5) as stranger:
            stranger.sendall(hello)
            assert stranger.recv(1) == b""
    assert [process.poll() for process in three] == [None] * 3


def test_leaving_needs_no_jax():
    code = "import sys, runtime.leave, runtime.lifeline; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ).returncode == 0


@pytest.mark.parametrize("name", ["compile ahead", "another"])
def test_the_end_does_not_wait_for_what_compiles_ahead(name):
    """Its clean-ups run, what was printed is there, and the exit code is the program's."""
    program = f"""
import atexit, threading, time
from runtime import leave
atexit.register(lambda: print("cleaned"))
if {name == "compile ahead"}:
    threading.Thread(target=time.sleep, args=(60,), name={name!r}, daemon=True).start()
print("done")
leave.finish(75)
"""
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stdout.split(), done.stderr) == (75, ["done", "cleaned"], "")
    assert time.monotonic() - began < 30
