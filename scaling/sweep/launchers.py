"""Hydra's launchers: which there are, starting one for a batch, what it still has to do, stopping it.

A launcher waits for its jobs, so it gets a process of its own, in its own session: it outlives the command that asked.
"""

import getpass
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from hydra import compose, initialize
from hydra._internal.callbacks import Callbacks
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.types import HydraContext
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from model.config import one_of
from runtime.locks import acquire
from scaling.sweep.batch import JOB_LOCK, Batch, Task, read_batch
from scaling.sweep.run_directories import ATTEMPTS, FINAL, held, read_lines

PACKAGES = {
    "joblib": "hydra-joblib-launcher",
    "submitit_local": "hydra-submitit-launcher",
    "submitit_slurm": "hydra-submitit-launcher",
}
PREFIX = "hydra.launcher."
OURS = ("_target_", "submitit_folder", "name")  # keys that a batch sets itself
# Runs resume, so that their time may be up as often as they make progress; 0 is the plugin's default.
DEFAULTS = {"submitit_slurm": {"max_num_timeout": 20}}
LOCK, LAUNCHER_OUTPUT = "launcher.lock", "launcher.txt"
SQUEUE_S = 60.0
GRACE_S, POLL_S = 120.0, 0.2  # for runs to save, once they were told to stop


class Unknown(Exception):
    """A launcher cannot tell what it still has to do; the message says why."""


# --------------------------------------------------------------------------------------------------------------- launch


def configured(launcher: str, settings: Iterable[str], folder: Path) -> DictConfig:
    """Hydra's config with the launcher for a batch in this folder; call it within hydra.initialize.

    Raises ValueError for an unknown launcher or key, a wrong type, or a package that is not installed.
    """
    one_of("hydra/launcher", launcher, tuple(PACKAGES))
    Plugins.instance()  # they register themselves
    store = ConfigStore.instance()
    if f"{launcher}.yaml" not in store.list("hydra/launcher"):
        raise ValueError(
            f"hydra/launcher={launcher} needs {PACKAGES[launcher]}; install it with `make setup EXTRAS=launchers`"
        )
    valid = [str(key) for key in store.load(f"hydra/launcher/{launcher}.yaml").node if key not in OURS]
    given = []
    for setting in settings:
        key, _, _ = setting.partition("=")
        given.append(key.removeprefix(PREFIX))
        if not key.startswith(PREFIX) or given[-1] not in valid:
            raise ValueError(f"unknown {key}; valid: {', '.join(PREFIX + key for key in valid)}")
    defaults = [f"{PREFIX}{k}={v}" for k, v in DEFAULTS.get(launcher, {}).items() if k not in given]
    if launcher != "joblib":
        defaults.append(f"{PREFIX}name={_quoted(folder.name)}")
    quiet = ("hydra.output_subdir=null", "hydra/job_logging=none", "hydra/hydra_logging=none")
    overrides = [
        f"hydra/launcher={launcher}",
        *defaults,
        *settings,
        f"hydra.sweep.dir={_quoted(str(folder.absolute()))}",
        "hydra.sweep.subdir=.",
    ]
    try:
        return compose(None, [*overrides, *quiet], return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(" ".join(str(error).split())) from None


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def check(launcher: str, settings: Iterable[str]) -> None:
    """Raises ValueError for what is wrong about a launcher before it is asked for anything."""
    with initialize(None, version_base="1.3"):
        configured(launcher, settings, Path("batch"))
    if launcher == "submitit_slurm" and (missing := [p for p in ("sbatch", "srun", "squeue") if not shutil.which(p)]):
        raise ValueError(f"submitit_slurm finds no {', '.join(missing)} here; without SLURM: joblib, submitit_local")


def launch(batch: Batch) -> None:
    """Hands the batch to its launcher, as Hydra's own sweeper does, and waits for its jobs."""
    with initialize(None, version_base="1.3"):
        config = configured(batch.launcher, batch.settings, batch.folder)
        context = HydraContext(config_loader=GlobalHydra.instance().config_loader(), callbacks=Callbacks(config))
        plugin = Plugins.instance().instantiate_launcher(context, Task(str(batch.folder.absolute())), config)
        plugin.launch([[] for _ in batch.jobs], initial_job_idx=0)  # each job finds its overrides in the batch


def start(batch: Batch, checkout: Path) -> subprocess.Popen:
    """Starts the process that launches a batch; it has the lock of the batch from the first moment on."""
    batch.write()
    with (batch.folder / LOCK).open("w") as lock, (batch.folder / LAUNCHER_OUTPUT).open("ab") as said:
        acquire(lock, wait=True)
        process = subprocess.Popen(
            [sys.executable, "-m", "scaling.sweep.launchers", str(batch.folder.absolute())],
            cwd=checkout,
            stdout=said,
            stderr=said,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            pass_fds=[lock.fileno()],
        )
        lock.write(str(process.pid))
    return process


def stop(batches: Iterable[Batch]) -> None:
    """Ends launchers; their jobs on this machine are told to save, and waited for. Those on SLURM go on."""
    batches = [batch for batch in batches if held(batch.folder, LOCK)]
    for batch in batches:
        pid = int((batch.folder / LOCK).read_text())
        (os.kill if batch.launcher == "submitit_slurm" else os.killpg)(pid, signal.SIGTERM)
    directories = [Path(job.directory) for batch in batches if batch.launcher != "submitit_slurm" for job in batch.jobs]
    deadline = time.monotonic() + GRACE_S
    while any(held(one, JOB_LOCK) for one in directories) and time.monotonic() < deadline:
        time.sleep(POLL_S)


# ------------------------------------------------------------------------------------------------------------------ ask


def last_batch(directory: Path) -> tuple[Batch, int, bool] | None:
    """The batch that a run was submitted with last, its place there, and whether its job ended for good."""
    attempts, _ = read_lines(directory / ATTEMPTS)
    queued = next((event for event in attempts[::-1] if "queued" in event), None)
    if queued is None:
        return None
    try:
        batch = read_batch(Path(queued["batch"]))
    except (OSError, ValueError, KeyError):  # somebody removed it
        return None
    return batch, queued["index"], attempts[-1].get("code") in FINAL


def only_queued(directory: Path) -> bool:
    """Whether nothing has happened since the run was submitted."""
    attempts, _ = read_lines(directory / ATTEMPTS)
    return bool(attempts) and "queued" in attempts[-1]


def still_to_do(directories: Iterable[Path]) -> dict[Path, str]:
    """Where a launcher has them, of those runs that a launcher still has to do. Raises Unknown."""
    found, on_slurm = {}, {}
    for directory in directories:
        if held(directory, JOB_LOCK):
            found[directory] = "its job is under way"
        elif (submitted := last_batch(directory)) and not submitted[2]:
            batch, index, _ = submitted
            if held(batch.folder, LOCK) and not (batch.launcher == "submitit_slurm" and submission(batch)):
                found[directory] = f"{batch.launcher}, {batch.name}"
            elif batch.launcher == "submitit_slurm":
                on_slurm[directory] = (batch.name, index)
    if on_slurm:
        listed = squeue()
        found |= {directory: listed[key] for directory, key in on_slurm.items() if key in listed}
    return found


def submission(batch: Batch) -> str:
    """The id of the batch on SLURM, empty while it is not submitted."""
    files = (batch.folder / ".submitit").glob("*/*_submission.sh")
    return next((match[1] for file in files if (match := re.match(r"(\d+)_submission", file.name))), "")


def squeue() -> dict[tuple[str, int], str]:
    """This user's jobs that SLURM has not done with: name and place in the array -> id and state. Raises Unknown."""
    command = ["squeue", "--noheader", "--array", f"--user={getpass.getuser()}", "--format=%i|%K|%T|%j"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=SQUEUE_S, check=True).stdout
    except subprocess.CalledProcessError as error:
        raise Unknown(f"squeue: {' '.join(error.stderr.split())}") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unknown(str(error)) from None
    rows = [line.strip().split("|", 3) for line in told.splitlines() if line.count("|") >= 3]
    return {(name, int(place) if place.isdecimal() else 0): f"SLURM {job} {state}" for job, place, state, name in rows}


if __name__ == "__main__":  # the process that `start` makes; what a launcher says against a batch is its last line
    try:
        launch(read_batch(Path(sys.argv[1])))
    except Exception as error:  # whatever a plugin raises
        words = [line.strip() for line in str(error).splitlines() if line.strip(" -")]
        sys.exit(f"error: {' '.join(words)}"[:1000])
