"""Programs pass, fail, take too long or too much; nothing else happens."""

import os
import time

import pytest

from evaluation.humaneval import program, read_problems
from evaluation.sandbox import Limits, run_program

QUICK = Limits(seconds=2, megabytes=256)


@pytest.mark.parametrize(
    ("source", "end"),
    [
        ("assert 1 + 1 == 2", "passed"),
        ("assert 1 + 1 == 3, 'no'", "failed: AssertionError: no"),
        ("import sys; sys.exit(0)", "failed: it left with 0 before its end"),
        ("import os; os._exit(0)", "failed: it left with 0 before its end"),
        ("print('passed')\nraise SystemExit", "failed: passed"),
        ("x = [0] * 10**9", "failed: MemoryError"),
        ("def f(:", "failed: SyntaxError: invalid syntax"),
        ("open('big', 'wb').write(bytes(1 << 21))", "failed: OSError: [Errno 27] File too large"),
    ],
)
def test_ends(source, end):
    assert run_program(source, QUICK) == end


@pytest.mark.parametrize("source", ["while True: pass", "import time; time.sleep(60)"])
def test_endless_ones_are_ended(source):
    began = time.monotonic()
    assert run_program(source, Limits(seconds=1)) == "timed out"
    assert time.monotonic() - began < 8


def test_what_it_started_ends_with_it(tmp_path):
    mark = tmp_path / "alive"
    child = f"import time\nwhile True:\n    open({str(mark)!r}, 'w').write('x'); time.sleep(0.05)"
    parent = f"import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', {child!r}])\ntime.sleep(1)"
    assert run_program(parent, Limits(seconds=5)) == "passed"
    assert mark.exists()
    time.sleep(0.3)
    mark.unlink(missing_ok=True)
    time.sleep(0.4)
    assert not mark.exists()


def test_it_sees_nothing_of_our_environment(monkeypatch):
    monkeypatch.setenv("ISOMESH_SECRET", "x")
    assert run_program("import os; assert 'ISOMESH_SECRET' not in os.environ", QUICK) == "passed"
    assert run_program("import os; assert os.listdir() == ['program.py']", QUICK) == "passed"
    assert "ISOMESH_SECRET" in os.environ


def test_the_problems_are_solved_by_their_own_solutions_and_not_without():
    problems = read_problems()
    assert len(problems) == 164
    for problem in problems[::40]:
        assert run_program(program(problem, problem["canonical_solution"])) == "passed"
        assert run_program(program(problem, "    return None\n")).startswith("failed")
