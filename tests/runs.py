"""Tiny runs for end-to-end tests: their settings, in this process and in others, and what they wrote."""

import contextlib
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import orbax.checkpoint
import yaml

import train
from checkpoint.digests import read_manifest
from config import compose, layout
from performance.hardware import Peak
from runtime.ports import free_port
from tracking.metrics_file import read_metrics

ROOT = Path(__file__).parent.parent
DEVICES = 8
STEPS = 24

TINY = (
    *("runtime.platform=cpu", "wandb.mode=disabled", "sample.tokens=0", "data=text", "data.heldout=0.2"),
    "runtime.compile_cache=null",  # that of the tests is on already, see `environment`
    *("model.layers=2", "model.width=32", "model.heads=4", "model.kv_heads=2", "model.head_dim=8", "model.ffn=64"),
    *("train.seq_len=32", "train.batch_size=8", f"train.steps={STEPS}", "train.log_every=1", "train.eval_every=8"),
    *(
        "train.eval_batches=2",
        "optimizer=adamw",
        "optimizer.lr=2e-3",
        "optimizer.warmup_steps=4",
        "checkpoint.every=4",
        "checkpoint.keep=99",
    ),
)


def corpus(folder: Path, seed: int = 0) -> Path:
    """Forty short documents under `folder`, for data.path; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    draw, words = random.Random(seed), ("the", "mesh", "of", "a", "run", "is", "not", "what", "its", "loss", "sees")
    for number in range(40):
        (folder / f"{number:02d}.txt").write_text(" ".join(draw.choice(words) for _ in range(150)))
    return folder


def overrides(text: Path, directory: Path, *more: str) -> list[str]:
    """A tiny run on the documents of `text` in `directory`; `more` comes last and wins."""
    return [*TINY, f"data.path={text}/*.txt", f"data.cache={text.parent / 'cache'}", f"run.dir={directory}", *more]


def run(arguments: list[str], devices: int = DEVICES, peak=lambda *_: Peak(1e12, "no peak in particular", "")) -> int:
    """`python train.py ARGUMENTS` in this process, on the first `devices` of its devices; the exit code."""
    sizes = layout.mesh_sizes
    with (
        mock.patch.object(train, "mesh_sizes", lambda cfg, _: sizes(cfg, devices)),
        mock.patch.object(train, "peak_flops", peak),  # to measure one takes half a second
    ):
        return train.main([compose.load([*arguments, f"runtime.cpu_devices={DEVICES}"])])


def environment(**more: str) -> dict[str, str]:
    """Of a process of its own, with the compile cache of this one."""
    cache = {
        "JAX_COMPILATION_CACHE_DIR": os.environ["ISOMESH_TEST_CACHE"],
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    return os.environ | cache | more


def command(
    arguments: list[str], devices: int = DEVICES, processes: int = 1, program: Sequence[str] = ("train.py",)
) -> list[str]:
    """The command line of a run with `devices` devices in all."""
    launch = ["-m", "runtime.launch", "--processes", str(processes)] if processes > 1 else []
    return [sys.executable, *launch, *program, *arguments, f"runtime.cpu_devices={devices // processes}"]


def outside(arguments: list[str], **options) -> subprocess.CompletedProcess:
    """The same in a process of its own, to its end; options: as of `command`."""
    return subprocess.run(
        command(arguments, **options), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300
    )


def by_hand(
    arguments: Sequence[str],
    *own: Sequence[str],
    homes: Sequence[Path] = (),
    cwd: Sequence[Path] = (),
    programs: Sequence[Sequence[str]] = (),
) -> list[subprocess.Popen]:
    """One process for each of `own`, started without the launcher, with four devices in all.

    own: arguments of each. homes, cwd, programs: their home and working folders and what Python runs, where it matters.
    """
    place = [f"runtime.coordinator=127.0.0.1:{free_port()}", f"runtime.processes={len(own)}"]
    place += [f"runtime.cpu_devices={4 // len(own)}"]
    return [
        subprocess.Popen(
            [
                *(sys.executable, "-u", *(programs[rank] if programs else [ROOT / "train.py"])),
                *(*arguments, *more, *place, f"runtime.process_id={rank}"),
            ],
            cwd=cwd[rank] if cwd else ROOT,
            env=environment(**({"HOME": str(homes[rank])} if homes else {})),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, more in enumerate(own)
    ]


def ended(processes: Sequence[subprocess.Popen], within: float = 100) -> tuple[list[int], list[str]]:
    """The exit codes of processes that end by themselves in so many seconds, and what they said."""
    deadline = time.monotonic() + within
    try:
        said = [process.communicate(timeout=max(0.0, deadline - time.monotonic()))[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], said


def lines(directory: Path) -> list[dict]:
    """The lines of metrics.jsonl."""
    return read_metrics(directory / "metrics.jsonl")


def losses(directory: Path) -> dict[int, float]:
    """train/loss by step; no step may be there twice."""
    found = [(line["step"], line["train/loss"]) for line in lines(directory) if "train/loss" in line]
    assert len(dict(found)) == len(found), f"doubled steps in {[step for step, _ in found]}"
    return dict(found)


def evaluations(directory: Path) -> dict[int, float]:
    """eval/loss by step; no step may be there twice."""
    found = [(line["step"], line["eval/loss"]) for line in lines(directory) if "eval/loss" in line]
    assert len(dict(found)) == len(found), f"doubled steps in {[step for step, _ in found]}"
    return dict(found)


def steps(directory: Path) -> list[int]:
    """The steps of the whole checkpoints of a run."""
    return sorted(int(folder.parent.name) for folder in (directory / "checkpoints").glob("????????/manifest.json"))


def checkpoint(directory: Path, step: int) -> dict[str, np.ndarray]:
    """The arrays of a checkpoint by path, on the host."""
    folder = directory / "checkpoints" / f"{step:08d}"
    shapes = read_manifest(folder)["leaves"]
    arguments = {path: orbax.checkpoint.RestoreArgs(restore_type=np.ndarray) for path in shapes}
    with contextlib.closing(orbax.checkpoint.Checkpointer(orbax.checkpoint.PyTreeCheckpointHandler())) as reader:
        arrays = reader.restore(folder / "arrays", args=orbax.checkpoint.args.PyTreeRestore(restore_args=arguments))
    assert arrays.keys() == shapes.keys()
    return arrays


def record(directory: Path, step: int) -> dict:
    """What the run wrote beside the arrays of a checkpoint."""
    return read_manifest(directory / "checkpoints" / f"{step:08d}")["record"]


def assert_same_arrays(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    """Bitwise."""
    assert ours.keys() == theirs.keys()
    for path, array in ours.items():
        assert (array.dtype, array.shape) == (theirs[path].dtype, theirs[path].shape), path
        assert array.tobytes() == theirs[path].tobytes(), path


def assert_near(ours: dict[int, float], theirs: dict[int, float], relative: float = 1e-5) -> None:
    """The same steps, with losses that differ by rounding only."""
    assert ours.keys() == theirs.keys()
    np.testing.assert_allclose([ours[step] for step in theirs], list(theirs.values()), rtol=relative)


def saved_config(directory: Path) -> dict:
    """config.yaml as it stands in the file."""
    return yaml.safe_load((directory / "config.yaml").read_text())
