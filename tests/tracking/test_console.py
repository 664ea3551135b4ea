"""What a person and a pipe see of a run, and that the terminal is given back."""

import io
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pexpect
import pytest

from tracking.console import Console, bytes_text, duration, human, printable, sparkline

ROOT = Path(__file__).parents[2]

# A whole run in small; argv: run.log, primary, how to end.
DEMO = r"""
import logging, sys, time
from tracking.console import Console
log, primary, end = sys.argv[1], sys.argv[2] == "True", sys.argv[3]
with Console("demo", log, 1500, primary) as console:
    console.header({"parameters": "1.3M", "peak": "very long text " * 12})
    console.compiled(3.21, "54.3 MiB a device")
    console.progress(120, 2.34561, 51234.0, 0.2341, 62.0)
    logging.getLogger("isomesh.data").warning("epoch %d begins", 2)
    print("a stray print")
    console.evaluation(500, 1.5, 1.75, best=True)
    time.sleep(0.4)
    if end == "raise":
        raise SystemExit(3)
    console.progress(1500, 1.2, 51234.0, float("nan"), 0.0)
    console.samples([("def f(", "x):\n\x1b[31m    [red]return[/red]")])
    console.finish({"metrics": "runs/demo/metrics.jsonl"}, {"resume": "python train.py " + "a.b=c " * 30 + "end=1"})
"""
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"


def piped(log, primary=True, end="finish", **environment):
    return subprocess.run(
        [sys.executable, "-c", DEMO, str(log), str(primary), end],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def in_terminal(log, end="finish", columns=100, **environment):
    """Runs the demo in a pseudo-terminal and returns everything it wrote, escape codes included."""
    plain = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")}
    child = pexpect.spawn(
        sys.executable,
        ["-c", DEMO, str(log), "True", end],
        cwd=str(ROOT),
        env=plain | {"TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"} | environment,
        dimensions=(40, columns),
        encoding="utf-8",
        timeout=30,
    )
    child.expect(pexpect.EOF)
    return child.before


# ---------------------------------------------------------------------------------------------------------------------
# In a pipe


def test_pipe_gets_plain_greppable_lines_even_when_colour_is_forced(tmp_path):
    run = piped(tmp_path / "run.log", FORCE_COLOR="1", TTY_COMPATIBLE="1")
    assert (run.returncode, run.stderr) == (0, "")
    assert "\x1b" not in run.stdout
    assert "\r" not in run.stdout
    lines = run.stdout.splitlines()
    assert "step 120/1500 | loss 2.3456 | 51.2k tok/s | MFU 23.4% | ETA 1 min 02 s" in lines
    assert "step 1500/1500 | loss 1.2000 | 51.2k tok/s" in lines  # no MFU without a peak, no ETA at the end
    assert "eval 500/1500 | loss 1.5000 | 1.7500 bits/byte | best" in lines
    assert "compiled the step in 3.2 s | 54.3 MiB a device" in lines
    assert "warning: epoch 2 begins" in lines
    assert "  parameters  1.3M" in lines
    assert "wrote metrics: runs/demo/metrics.jsonl" in lines
    assert any(re.fullmatch(r"to resume: python train.py (a.b=c ){30}end=1", line) for line in lines)


def test_run_log_has_every_line_with_the_time_and_is_appended_to(tmp_path):
    log = tmp_path / "new folder" / "run.log"
    once = piped(log).stdout
    first = log.read_text()
    stamped = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (.*)")
    said = [stamped.fullmatch(line).group(1) for line in first.splitlines()]
    assert said == [line for line in once.splitlines() if line != "a stray print"]
    piped(log)
    assert log.read_text().startswith(first)
    assert len(log.read_text().splitlines()) == 2 * len(said)


def test_other_processes_say_nothing(tmp_path):
    run = piped(tmp_path / "run.log", primary=False)
    assert (run.stdout, run.stderr) == ("a stray print\n", "")
    assert list(tmp_path.iterdir()) == []


def test_lines_reach_a_pipe_at_once():
    code = (
        "import sys; from tracking.console import Console\n"
        "with Console('demo', None, 10, True) as console:\n"
        "    console.progress(1, 2.0, 10.0)\n"
        "    sys.stdin.readline()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout.readline() == "step 1/10 | loss 2.0000 | 10 tok/s\n"  # while the child still waits for us
        child.communicate("go on\n")


def test_a_reader_that_goes_away_does_not_stop_the_run(tmp_path):
    log = tmp_path / "run.log"
    command = f"set -o pipefail; '{sys.executable}' -c \"$DEMO\" '{log}' True finish | head -n 1"
    run = subprocess.run(["bash", "-c", command], cwd=ROOT, env=os.environ | {"DEMO": DEMO}, capture_output=True)
    assert (run.returncode, run.stderr) == (0, b"")
    assert "wrote metrics" in log.read_text()


def test_an_unwritable_run_log_is_one_warning_and_ascii_streams_take_any_text(tmp_path):
    (tmp_path / "file").write_text("")
    run = piped(tmp_path / "file" / "run.log", PYTHONIOENCODING="ascii")
    assert run.returncode == 0
    assert run.stdout.count("warning: cannot write") == 1
    assert "    ?[31m    [red]return[/red]" in run.stdout


# ---------------------------------------------------------------------------------------------------------------------
# In a terminal


@pytest.mark.parametrize("end", ["finish", "raise"])
def test_terminal_gets_a_bar_and_its_cursor_back(tmp_path, end):
    output = in_terminal(tmp_path / "run.log", end)
    assert output.count(HIDE_CURSOR) == output.count(SHOW_CURSOR) == 1
    text = ESCAPE.sub("", output)
    assert "╭─ isomesh · demo" in text
    assert re.search(r"━+ +120/1500  loss 2.3456  51.2k tok/s  MFU 23.4%  ETA 1 min 02 s", text)
    assert "! epoch 2 begins" in text
    assert "a stray print" in text
    assert "★ best so far" in text
    assert "step 120/1500 |" not in text, "log points move the bar, they do not scroll"
    assert "step 120/1500 | loss 2.3456" in (tmp_path / "run.log").read_text()
    if end == "finish":
        assert "1500/1500" in text
        assert "\x1b[31m" not in output.split("samples")[1], "text of the model must not drive the terminal"
        assert "[red]return[/red]" in text
        assert "python train.py " + "a.b=c " * 30 + "end=1" in text, "one line, so that it can be copied whole"


def test_no_color_has_no_colours(tmp_path):
    output = in_terminal(tmp_path / "run.log", NO_COLOR="1")
    assert not re.search(r"\x1b\[[0-9;]*(3[0-7]|38;5;\d+|9[0-7])m", output)
    assert "━" in output


def test_dumb_terminal_gets_plain_lines(tmp_path):
    output = in_terminal(tmp_path / "run.log", TERM="dumb")
    assert "\x1b" not in output
    assert "step 120/1500 | loss 2.3456" in output


@pytest.mark.parametrize(
    ("columns", "kept", "dropped"),
    [
        (120, "━━ █▄▂▁ loss 51.2k MFU ETA", ""),
        (60, "loss 51.2k ETA", "MFU █"),
        (40, "loss ETA", "MFU 51.2k ━━"),
        (24, "loss", "ETA"),
        (12, "", "ETA"),
    ],
)
def test_the_bar_fits_on_one_line_of_any_width(columns, kept, dropped):
    stream = Terminal()
    console = Console("demo", None, 1500, True, stream)
    try:
        console._rich.width = columns
        for step in range(100, 700, 100):
            console.progress(step, 100.0 / step, 51234.0, 0.234, 62.0)
        console._stop_bar()
        with console._rich.capture() as capture:
            console._rich.print(console._bar())
    finally:
        console.close()
    (line,) = ESCAPE.sub("", capture.get()).splitlines()
    assert len(line) <= columns
    assert all(word in line for word in kept.split())
    assert not any(word in line for word in dropped.split())


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def _terminal_type(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")


# ---------------------------------------------------------------------------------------------------------------------
# Logger and helpers


def test_closing_restores_the_logger():
    logger = logging.getLogger("isomesh")
    before = (logger.level, logger.propagate, list(logger.handlers))
    with pytest.raises(RuntimeError), Console("demo", None, 10, True, io.StringIO()):
        raise RuntimeError
    assert (logger.level, logger.propagate, list(logger.handlers)) == before


def test_full_disk_silences_run_log_with_one_warning():
    stream = io.StringIO()
    with Console("demo", "/dev/full", 10, True, stream) as console:
        console.note("one")
        console.note("two")
    lines = stream.getvalue().splitlines()
    assert (lines[0], lines[2]) == ("one", "two")
    assert lines[1].startswith("warning: cannot write /dev/full")
    assert len(lines) == 3


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (999, "999"), (51.23, "51.2"), (999.96, "1.0k"), (1000, "1.0k"), (12_400, "12.4k"), (999_960, "1.0M"),
        (1_300_000, "1.3M"), (8.03e9, "8.0B"), (2.5e12, "2.5T"), (7e23, "7.00e+11T"), (-1500, "-1.5k"),
        (float("nan"), "unknown"),
    ],
)  # fmt: skip
def test_human(value, text):
    assert human(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(512, "512 B"), (1024, "1.0 KiB"), (1.5 * 2**30, "1.5 GiB"), (2**40 - 1, "1.0 TiB"), (141 * 2**30, "141.0 GiB")],
)
def test_bytes_text(value, text):
    assert bytes_text(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"), (0.0851, "85 ms"), (0.9999, "1.0 s"), (3.21, "3.2 s"), (9.96, "10 s"), (59.7, "1 min 00 s"),
        (125, "2 min 05 s"), (3599.6, "1 h 00 min"), (11_220, "3 h 07 min"), (187_200, "2 d 04 h"),
        (float("inf"), "unknown"),
    ],
)  # fmt: skip
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_sparkline_and_printable():
    assert sparkline([8.0, 1.0, 4.5, float("nan")]) == "█▁▅"
    assert sparkline([2.0, 2.0]) == "▁▁"
    assert sparkline([]) == ""
    assert printable("a\x1b[2Jb\r\n\tc\x00") == "a�[2Jb�\n\tc�"
