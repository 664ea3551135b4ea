"""Hydra's launchers: each run once through kills, requeues and second calls, here and on a SLURM made of files."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import runs
import slurm
from test_sweep import FAKE, identify

from model.config import ModelConfig
from scaling.__main__ import main
from scaling.sweep import batch, submitted
from scaling.sweep.batch import JOB_LOCK
from scaling.sweep.design import SweepConfig, design
from scaling.sweep.provenance import code_digest
from scaling.sweep.run import place
from scaling.sweep.run_directories import ATTEMPTS, held, read_lines
from scaling.sweep.submitted import Queue, run_on_launcher, submit

ROOT = Path(__file__).parents[3]
DONE, MISTAKE, STOPPED = 0, 2, 75
PATIENCE_S = 60.0


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """A checkout with the stand-in for train.py, and three planned runs."""
    (tmp_path / "train.py").write_text(textwrap.dedent(FAKE))
    (tmp_path / "behave.json").write_text("{}")
    (tmp_path / "config.py").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(submitted, "ASK_S", 0.3)
    monkeypatch.setattr(submitted, "WAIT_S", 0.1)
    monkeypatch.setattr(batch, "LOCK_S", 0.3)
    config = SweepConfig(
        *("toy", "ladder", (8, 16, 24)), tokens_per_parameter=0.3, seeds=(1,), batch_size=(2,), eval_sequences=4
    )
    made = design(config, ModelConfig(vocab_size=512), 32)
    root = tmp_path / "runs" / "toy"
    return tmp_path, root, place(made, identify, root, code_digest(tmp_path))


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    fake = slurm.Slurm(tmp_path / "slurm").install(monkeypatch)
    yield fake
    fake.end_all()


def go(sweep, launcher, *settings, show=lambda: None, **options):
    checkout, root, planned = sweep
    return run_on_launcher(planned, root, checkout, Queue(planned), show, launcher, list(settings), **options)


def names(planned):
    return [state.name for state in Queue(planned).states()]


def behave(sweep, *each):
    checkout, _, planned = sweep
    wanted = {one.run.settings["wandb.name"]: what for one, what in zip(planned, each, strict=True)}
    (checkout / "behave.json").write_text(json.dumps(wanted))


def started(sweep):
    path = sweep[0] / "started.txt"
    return sorted(path.read_text().split()) if path.exists() else []


def once(sweep):
    return sorted(one.directory.name for one in sweep[2])


def attempts(one, key):
    return [event[key] for event in read_lines(one.directory / ATTEMPTS)[0] if key in event]


def wait_for(true):
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def submit_and_die(sweep, *settings):
    """What is left when the command and its launcher are killed after they submitted three runs."""
    checkout, root, planned = sweep
    launcher = submit(planned, root, checkout, "submitit_slurm", list(settings))
    wait_for(lambda: len(list(root.rglob("*_submitted.pkl"))) == 3)
    os.killpg(launcher.pid, signal.SIGKILL)
    launcher.wait()


@pytest.mark.long
def test_hydra_multirun_on_joblib_trains_and_returns_the_worst_code(tmp_path):
    """Two processes at once: one trains two steps, the other asks for a checkpoint that is not there."""
    words = runs.overrides(runs.corpus(tmp_path / "text"), tmp_path / "unused", "train.steps=2", "train.eval_every=2")
    words[-3] = f"run.dir={tmp_path}/${{checkpoint.resume}}"
    words += ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "checkpoint.resume=require,never"]
    command = [sys.executable, "train.py", "-m", *words]
    ended = subprocess.run(command, cwd=ROOT, env=runs.environment(), capture_output=True, text=True, timeout=120)
    assert ended.returncode == MISTAKE, ended.stderr
    where, *told = ended.stdout.splitlines()
    shutil.rmtree(ROOT / Path(where.split(": ")[1]).parents[1])
    first, second = sorted(told)
    assert "exit code 2: error: checkpoint.resume=require" in first
    assert second.endswith("exit code 0")
    assert sorted(runs.losses(tmp_path / "never")) == [1, 2]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["hydra/launcher=ray", "seed=1,2"], ["hydra/launcher=ray", "joblib, submitit_local, submitit_slurm"]),
        (["hydra/launcher=joblib", "hydra.launcher.jobs=2"], ["hydra.launcher.jobs", "hydra.launcher.n_jobs"]),
        (["hydra/launcher=submitit_local", "hydra.launcher.submitit_folder=x"], ["hydra.launcher.timeout_min"]),
        (["hydra/launcher=joblib", "hydra.launcher.n_jobs=two"], ["n_jobs", "two"]),
        (["hydra/launcher=joblib", "modell.width=3"], ["unknown modell.width"]),
        (["hydra.launcher.n_jobs=2"], ["which launcher?", "joblib"]),
        (["hydra/launcher=submitit_slurm"], ["sbatch, srun, squeue"]),
    ],
)
def test_mistakes_are_one_line(words, told, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["launch", *words]) == MISTAKE
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert all(word in said for word in told), said


def test_a_package_that_is_missing_is_named(capsys, monkeypatch):
    from hydra.core.config_store import ConfigStore
    from hydra.core.plugins import Plugins

    Plugins.instance()
    monkeypatch.delitem(ConfigStore.instance().repo["hydra"]["launcher"], "joblib.yaml")
    assert main(["launch", "hydra/launcher=joblib", "seed=1,2"]) == MISTAKE
    said = capsys.readouterr().err
    assert "needs hydra-joblib-launcher" in said
    assert "EXTRAS=launchers" in said


def test_submitit_local_loses_nothing_by_kills_and_ctrl_c(sweep):
    """One run is killed with -9, one is under way when Ctrl-C comes, one fails; the same command goes on."""
    _, _, planned = sweep
    behave(sweep, {"kill": True}, {"pause": 0.1}, {"mistake": True})
    seen = []

    def interrupt():
        if seen:
            return
        if attempts(planned[0], "code") and attempts(planned[2], "code") and planned[1].state().step > 2:
            seen.append(True)
            raise KeyboardInterrupt

    assert not go(sweep, "submitit_local", show=interrupt)
    assert names(planned) == ["partial", "partial", "failed"]
    assert [attempts(one, "code") for one in planned] == [[-signal.SIGKILL], [STOPPED], [MISTAKE]]
    behave(sweep, {}, {}, {})
    assert go(sweep, "submitit_local")
    assert names(planned) == ["done", "done", "failed"]
    assert started(sweep) == sorted([*once(sweep), *(one.directory.name for one in planned[:2])])
    steps = [row["step"] for row in read_lines(planned[0].directory / "metrics.jsonl")[0]]
    assert steps == list(range(1, planned[0].run.steps + 1)), "the second attempt went on"
    event = next(event for event in read_lines(planned[1].directory / ATTEMPTS)[0] if "began" in event)
    assert event.keys() >= {"machine", "cores", "commit", "config", "code_digest", "command", "group", "steps"}


def test_an_array_is_submitted_once_and_failures_are_marked(sweep, cluster):
    """The command is killed with -9 after it submitted, and its launcher too; the same command waits for the array."""
    planned = sweep[2]
    behave(sweep, {"mistake": True}, {"nan": 5}, {})
    cluster.hold.touch()
    submit_and_die(sweep, "hydra.launcher.partition=gpu")
    assert names(planned) == ["queued"] * 3
    assert [state.reason for state in Queue(planned).states()] == [f"SLURM 100_{n} PENDING" for n in range(3)]
    assert go(sweep, "submitit_slurm", show=lambda: cluster.hold.unlink(missing_ok=True))
    assert names(planned) == ["failed", "diverged", "done"]
    (given,) = cluster.submitted()
    assert (given["array"], given["partition"], given["signal"]) == (3, "gpu", "USR2@120")
    assert started(sweep) == once(sweep)


def test_a_job_whose_time_is_up_saves_and_goes_on_by_itself(sweep, cluster):
    """The signal reaches train.py as well, as SLURM's do; it may not harm it."""
    checkout, root, planned = sweep
    alone = (checkout, root, planned[:1])
    behave(sweep, {"pause": 0.05}, {}, {})
    seen = []

    def preempt():
        if not seen and planned[0].state().step > 2:
            seen.append(planned[0].state().step)
            cluster.signal_step("100", signal.SIGUSR2)

    assert go(alone, "submitit_slurm", show=preempt)
    assert seen
    assert names(planned[:1]) == ["done"]
    deadline = time.monotonic() + 20  # the run is done before its job has noted its end
    while len(attempts(planned[0], "code")) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert attempts(planned[0], "code") == [STOPPED, DONE]
    assert len(cluster.submitted()) == 1
    steps = [row["step"] for row in read_lines(planned[0].directory / "metrics.jsonl")[0]]
    assert steps == list(range(1, planned[0].run.steps + 1)), "each step once"


def test_what_slurm_cannot_tell_is_not_submitted_unasked(sweep, cluster):
    planned = sweep[2]
    cluster.hold.touch()
    submit_and_die(sweep)
    (cluster.folder / "deaf").touch()
    with pytest.raises(ValueError, match="Unable to contact slurm controller; --resubmit"):
        go(sweep, "submitit_slurm")
    assert len(cluster.submitted()) == 1
    assert go(sweep, "submitit_slurm", resubmit=True, show=lambda: cluster.hold.unlink(missing_ok=True))
    wait_for(lambda: all(job["state"] == "COMPLETED" for job in cluster.jobs().values()))
    assert len(cluster.submitted()) == 2
    assert names(planned) == ["done"] * 3
    assert len(read_lines(planned[2].directory / "metrics.jsonl")[0]) == planned[2].run.steps


def test_a_launcher_that_refuses_is_quoted(sweep, cluster):
    with pytest.raises(ValueError, match="submitit_slurm took nothing: .*invalid partition specified: nowhere"):
        go(sweep, "submitit_slurm", "hydra.launcher.partition=nowhere")
    assert names(sweep[2]) == ["missing"] * 3


def test_two_jobs_for_one_run_do_not_meet(sweep):
    """Whoever has the lock runs it; the other leaves, and a job of another code does too."""
    checkout, _, planned = sweep
    one = planned[0]
    job = batch.Job(tuple(one.command()), str(one.directory), one.facts(), one.code)
    one.directory.mkdir(parents=True)
    with batch.job_lock(one.directory):
        assert held(one.directory, JOB_LOCK)
        assert batch.work(job, checkout) == DONE
    assert started(sweep) == []
    (checkout / "train.py").write_text("changed = True\n")
    assert batch.work(job, checkout) == MISTAKE
    assert started(sweep) == []
