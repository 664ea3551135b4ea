"""Running a sweep: what is missing only, through kills of runs and of the tool; states read from files alone."""

import json
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from model.config import ModelConfig
from scaling.sweep.design import SweepConfig, design
from scaling.sweep.provenance import code_digest
from scaling.sweep.run import measured, multirun, place, probes, run_missing
from scaling.sweep.run_directories import ATTEMPTS, held, read_lines, state_of

ROOT = Path(__file__).parents[3]
# As train.py behaves towards the outside: takes the lock, goes on from its last save, writes metrics, has its codes.
FAKE = """
import fcntl, json, os, pathlib, signal, sys, time
keys = dict(argument.split("=", 1) for argument in sys.argv[1:])
directory, steps = pathlib.Path(keys["run.dir"]), int(keys["train.steps"])
behave = json.loads(pathlib.Path("behave.json").read_text()).get(keys["wandb.name"], {})
directory.mkdir(parents=True, exist_ok=True)
lock = open(directory / ".lock", "w")
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print("error: in use by another process", file=sys.stderr); sys.exit(2)
with open("started.txt", "a") as file:
    print(directory.name, file=file)
if behave.get("mistake"):
    print("error: no such thing", file=sys.stderr); sys.exit(2)
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
path = directory / "metrics.jsonl"
last = max([json.loads(line)["step"] for line in path.read_text().splitlines()]) if path.exists() else 0
with path.open("a") as file:
    for step in range(last + 1, steps + 1):
        time.sleep(behave.get("pause", 0))
        if behave.get("kill") and step % 10 == 0 and step > last + 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if behave.get("nan") == step:
            file.write(json.dumps({"step": step, "train/loss": "NaN"}) + "\\n"); file.flush(); sys.exit(3)
        line = {"step": step, "train/loss": 5 - step / steps, "perf/wall_s": step / 10, "perf/tokens_per_s": 1e3}
        file.write(json.dumps(line | ({"eval/loss": 4.0} if step == steps else {})) + "\\n"); file.flush()
        if stopped and step < steps:
            sys.exit(75)
"""


def identify(run):
    return {"seed": run.seed, "width": run.model.width}, 2


@pytest.fixture
def sweep(tmp_path):
    """A checkout with the fake train.py, and six planned runs of 20 to 100 steps."""
    (tmp_path / "train.py").write_text(textwrap.dedent(FAKE))
    (tmp_path / "behave.json").write_text("{}")
    config = SweepConfig(
        *("toy", "ladder", (8, 16, 24)), tokens_per_parameter=0.3, seeds=(2,), batch_size=(2,), eval_sequences=4
    )
    runs = design(config, ModelConfig(vocab_size=512), 32)
    root = tmp_path / "runs"
    return tmp_path, root, place(runs, identify, root, "code")


def names(planned):
    return [one.state().name for one in planned]


def started(checkout):
    return (checkout / "started.txt").read_text().split()


def go(sweep, **options):
    checkout, root, planned = sweep
    return run_missing(planned, root, checkout, lambda: None, **options)


def test_only_what_is_missing_runs(sweep):
    checkout, root, planned = sweep
    assert names(planned) == ["missing"] * 6
    assert go(sweep, jobs=3)
    assert names(planned) == ["done"] * 6
    assert sorted(started(checkout)) == sorted(one.directory.name for one in planned)
    assert go(sweep)
    assert len(started(checkout)) == 6, "a run counts once"
    event = read_lines(planned[0].directory / ATTEMPTS)[0][0]
    assert event.keys() >= {"machine", "commit", "config", "code_digest", "command", "group"}


def test_kills_of_runs_lose_nothing(sweep):
    checkout, _, planned = sweep
    label = planned[0].run.settings["wandb.name"]
    (checkout / "behave.json").write_text(json.dumps({label: {"kill": True}}))
    assert go(sweep, jobs=2)
    assert names(planned) == ["done"] * 6
    assert started(checkout).count(planned[0].directory.name) > 2
    steps = [row["step"] for row in read_lines(planned[0].directory / "metrics.jsonl")[0]]
    assert steps == list(range(1, planned[0].run.steps + 1))


def test_failed_and_diverged_runs_are_kept_and_marked(sweep):
    checkout, root, planned = sweep
    first, second = (one.run.settings["wandb.name"] for one in planned[:2])
    (checkout / "behave.json").write_text(json.dumps({first: {"mistake": True}, second: {"nan": 15}}))
    assert go(sweep, jobs=2)
    states = [one.state() for one in planned]
    assert [state.name for state in states] == ["failed", "diverged"] + ["done"] * 4
    assert "code 2: error: no such thing" in states[0].reason
    assert "train/loss is nan at step 15" in states[1].reason
    (checkout / "behave.json").write_text("{}")
    go(sweep)
    assert names(planned)[:2] == ["failed", "diverged"], "nobody asked to try again"
    assert go(sweep, retry=True)
    assert names(planned) == ["done"] * 6
    aside = Path(f"{planned[1].directory}.1")
    assert state_of(aside, planned[1].run.steps, 512).name == "diverged", "the diverged run is kept"


def tool(checkout, root, jobs=2):
    """A process that runs the sweep of the fixture, as the command does."""
    code = f"""
        import signal, sys
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job, as a test may be, ignores it
        sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests/scaling/sweep")!r}]
        import test_sweep
        from pathlib import Path
        sweep = test_sweep.sweep.__wrapped__(Path({str(checkout)!r})) 
        (Path({str(checkout)!r}) / "behave.json").write_text({(checkout / "behave.json").read_text()!r})
        sys.exit(0 if test_sweep.go(sweep, jobs={jobs}) else 130)
    """
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], cwd=checkout, start_new_session=True)


def wait_until(true, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_the_tool_goes_on_after_its_own_end(sweep, number):
    checkout, root, planned = sweep
    slow = {one.run.settings["wandb.name"]: {"pause": 0.02} for one in planned}
    (checkout / "behave.json").write_text(json.dumps(slow))
    process = tool(checkout, root)
    wait_until(lambda: any(state_of(one.directory, one.run.steps, 512).step > 5 for one in planned))
    process.send_signal(number)
    code = process.wait(timeout=30)
    if number == signal.SIGKILL:  # its runs live on, and are neither started twice nor given up
        assert any(held(one.directory) for one in planned)
    else:
        assert code == 130
        assert not any(held(one.directory) for one in planned)
        assert "partial" in names(planned)
    assert go(sweep, jobs=2)
    assert names(planned) == ["done"] * 6
    for one in planned:
        steps = [row["step"] for row in read_lines(one.directory / "metrics.jsonl")[0]]
        assert steps == list(range(1, one.run.steps + 1)), "each step once"


def test_one_call_at_a_time(sweep):
    checkout, root, planned = sweep
    seen = []

    def second():
        if not seen:
            with pytest.raises(ValueError, match="another call runs the sweep") as told:
                go(sweep)
            seen.append(told)

    run_missing(planned, root, checkout, second)
    assert seen


def test_another_code_is_another_run(sweep, tmp_path):
    _, root, planned = sweep
    others = place(
        [one.run for one in planned], lambda run: ({"seed": run.seed, "width": run.model.width}, 2), root, "new"
    )
    assert not {one.directory for one in planned} & {one.directory for one in others}
    assert len({one.directory for one in planned}) == 6
    assert [one.config_digest for one in planned] == [one.config_digest for one in others]

    for folder in ("config", "runtime", "model", "parallel", "data", "training", "checkpoint"):
        (tmp_path / folder).mkdir()
    (tmp_path / "config" / "schema.py").write_text("x = 1\n")
    before = code_digest(tmp_path)
    (tmp_path / "config" / "schema.py").write_text('"""Words."""\nx = 1  # and more words\n')
    assert code_digest(tmp_path) == before
    (tmp_path / "config" / "schema.py").write_text("x = 2\n")
    assert code_digest(tmp_path) != before


def test_multirun_lines_are_the_same_runs(sweep):
    from config.command_line import command_line

    _, _, planned = sweep
    lines = multirun(planned)
    assert len(lines) == 3
    configs = [config for line in lines for config in command_line(shlex.split(line)[2:])]
    assert [config.run.dir for config in configs] == [str(one.directory) for one in planned]
    assert [config.wandb.name for config in configs] == [one.run.settings["wandb.name"] for one in planned]


def test_speed_is_learned_from_this_machine_alone(sweep):
    checkout, root, planned = sweep
    short = probes(planned, root)
    assert [one.run.model.width for one in short] == [8, 16, 24]
    assert run_missing(short, root, checkout, lambda: None)
    found = measured(short, 1)
    assert [one.tokens_per_s for one in found] == [1e3] * 3
    path = short[0].directory / ATTEMPTS
    path.write_text(path.read_text().replace('"machine": "', '"machine": "another '))
    assert len(measured(short, 1)) == 2
