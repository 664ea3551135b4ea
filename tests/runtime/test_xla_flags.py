"""Which XLA flags are set: those that the installed jaxlib knows, asked for once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from runtime import xla_flags
from runtime.compiler_flags import FLAGS, WITHOUT_DEVICES
from runtime.xla_flags import known

CPU_FLAGS = FLAGS["cpu"]
UNKNOWN = ("--xla_no_such_flag=1", "--xla_nor_this")


@pytest.fixture
def children(monkeypatch):
    """The flags that child processes were asked about, one entry a child."""
    asked, real = [], subprocess.run

    def run(command, env, **options):
        asked.append(env["XLA_FLAGS"].split())
        return real(command, env=env, **options)

    monkeypatch.setattr(xla_flags.subprocess, "run", run)
    return asked


def test_unknown_flags_are_left_out_and_the_answer_is_kept(tmp_path, children):
    assert known((UNKNOWN[0], *CPU_FLAGS, UNKNOWN[1]), tmp_path) == CPU_FLAGS
    assert known((*CPU_FLAGS, *UNKNOWN), tmp_path) == CPU_FLAGS
    assert known((), tmp_path) == ()
    assert len(children) == 1
    (file,) = tmp_path.iterdir()
    file.write_text("half an ans")
    assert known(UNKNOWN[:1], tmp_path) == ()
    assert known(CPU_FLAGS[:1], tmp_path) == CPU_FLAGS[:1]  # asked about what is new alone
    assert children[1:] == [[UNKNOWN[0]], [CPU_FLAGS[0]]]


def test_another_jaxlib_is_asked_anew(tmp_path, children, monkeypatch):
    known(UNKNOWN, tmp_path)
    monkeypatch.setattr(xla_flags.importlib.metadata, "version", lambda _: "0.99")
    known(UNKNOWN, tmp_path)
    assert len(children) == 2


def test_the_flags_of_a_run_are_known(tmp_path):
    """A jaxlib that has dropped one of them needs another way to what it did."""
    flags = sum((*FLAGS.values(), *WITHOUT_DEVICES.values()), ())
    assert known(flags, tmp_path) == flags


@pytest.mark.parametrize("question", ["import os; os.abort()", "import time; time.sleep(60)"])
def test_without_an_answer_flags_count_as_known_and_nothing_is_kept(tmp_path, monkeypatch, question):
    monkeypatch.setattr(xla_flags, "QUESTION", question)
    monkeypatch.setattr(xla_flags, "PATIENCE", 2)
    assert known(UNKNOWN, tmp_path) == UNKNOWN
    assert not list(tmp_path.iterdir())


def test_a_cache_that_cannot_be_written_costs_a_question_only(tmp_path, children):
    (tmp_path / "file").touch()
    for _ in range(2):
        assert known((*UNKNOWN, *CPU_FLAGS), tmp_path / "file") == CPU_FLAGS
    assert len(children) == 2


def test_a_run_starts_where_a_flag_of_its_own_is_unknown(tmp_path):
    """And keeps the flags of the environment, whose owner is told by XLA itself."""
    code = """
import os
from runtime import compiler_flags, start
from runtime.config import RuntimeConfig
compiler_flags.FLAGS["cpu"] += ("--xla_no_such_flag=1",)
start.start(RuntimeConfig(platform="cpu", compile_cache=None))
print(os.environ["XLA_FLAGS"], end="")
"""
    theirs = "--xla_backend_optimization_level=0"
    environment = os.environ | {"XLA_FLAGS": theirs, "HOME": str(tmp_path)}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, " ".join((theirs, *CPU_FLAGS))), done.stderr
    assert list((tmp_path / ".cache" / "isomesh").glob("xla-flags-*.json"))
