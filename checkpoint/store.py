"""Checkpoints that are saved beside the training loop, proved whole before they are trusted, and restored on any mesh.

A directory holds one folder a step:

    00000200/              complete: it gets this name, by one rename, after everything in it is on disk
        arrays/            the state, written by Orbax: every process writes its own shards
        manifest.json      the record, shape and dtype of each leaf, a digest of each file and of itself
    00000300.partial/      a save under way, or one that was cut short
    00000100.deleting/     a removal under way, or one that was cut short

Several processes must see the directory on one shared file system: process 0 names, seals and removes folders, and
decides for all of them what is restored. All processes make the same calls, in the same order.
"""

import errno
import itertools
import json
import logging
import math
import os
import re
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from checkpoint.config import CheckpointConfig
from checkpoint.digests import MANIFEST, find_damage, read_manifest, seal, write_manifest
from checkpoint.leaves import by_path, check_leaves, fit, shape_to_read
from runtime.agreement import agreed, any_process

log = logging.getLogger("isomesh.checkpoint")

ARRAYS = "arrays"


class CheckpointError(ValueError):
    """There are checkpoints, and none of them can be used."""


@dataclass(frozen=True)
class Restored:
    """What `CheckpointStore.restore` found."""

    step: int
    state: Any  # as the abstract state: same tree, shapes, dtypes, shardings
    record: dict[str, Any]  # as it was given to save()
    directory: Path  # of the store


class CheckpointStore:
    """Saves and restores a training state under `directory`; nothing is touched before the first call of either.

    A state is any pytree of jax.Arrays (random keys as raw key data), sharded or not.
    """

    def __init__(self, directory: Path, config: CheckpointConfig):
        self.directory = Path(os.path.abspath(directory))
        self.config = config
        self._orbax = _orbax().AsyncCheckpointer(_orbax().PyTreeCheckpointHandler())
        self._thread: threading.Thread | None = None
        self._whole = True  # how the latest save ended
        self._messages: list[str] = []
        self._last_due: float | None = None

    # ---- when -------------------------------------------------------------------------------------------------------

    def due(self, step: int, now: float) -> bool:
        """Whether to save after this step; to be asked once a step, with `now` in seconds on any steady clock.

        The minutes run from the first call, and from each call that was answered with True.
        With several processes and every_minutes set, each call waits for the clock of process 0.
        """
        config = self.config
        by_steps = config.every > 0 and step > 0 and step % config.every == 0
        by_minutes = False
        if config.every_minutes > 0:
            if self._last_due is None:
                self._last_due = now
            by_minutes = now - self._last_due >= 60 * config.every_minutes
            if jax.process_count() > 1:
                by_minutes = bool(multihost_utils.broadcast_one_to_all(np.int32(by_minutes)))
        if by_steps or by_minutes:
            self._last_due = now
        return by_steps or by_minutes

    def steps(self) -> list[int]:
        """The steps of complete checkpoints, ascending. They have a manifest; their digests are not compared here."""
        return [step for step in _listing(self.directory)[0] if (self._folder(step) / MANIFEST).is_file()]

    def best(self) -> int | None:
        """The complete checkpoint with the lowest metric, the later of equals; None if none has a metric."""
        return next(iter(self._best_first(self.steps())), None)

    # ---- save -------------------------------------------------------------------------------------------------------

    def save(self, step: int, state: Any, record: dict[str, Any], *, metric: float | None = None) -> bool:
        """Save the state after `step`, with a JSON-able record; a lower metric is a better checkpoint.

        Waits for the save before, starts this one and returns; the caller may donate the state at once (where host
        and device share memory, JAX keeps the buffers being written and gives the next step fresh ones).
        True: it is under way (or done, if not asynchronous), or the step is there already, intact.
        False: the file system refused; one line was logged, and what is there stays as it was.
        An error that comes up later is logged, and returned by `poll`.
        """
        self.wait()
        arrays = by_path(state)
        leaves = {path: (str(array.dtype), array.shape) for path, array in arrays.items()}
        body = json.loads(json.dumps({"step": step, "metric": metric, "record": record, "leaves": leaves}))
        try:
            self._whole = agreed(lambda: self._prepare(step, sum(array.nbytes for array in arrays.values())))
            if self._whole:
                return True
            stored = {path: array for path, array in arrays.items() if array.size}  # Orbax refuses arrays of size 0
            self._orbax.save(self._folder(step, ".partial") / ARRAYS, args=_orbax().args.PyTreeSave(stored))
        except Exception as error:  # tensorstore raises what it likes; no failed save may end a run
            return self._fail(step, error)
        if not self.config.asynchronous:
            self._finish(step, body)
            return self._whole
        self._thread = threading.Thread(target=self._finish, args=(step, body), name="checkpoint")
        self._thread.start()
        return True

    def wait(self) -> bool:
        """Wait for the save under way; whether the latest save came out whole (True if there was none)."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return self._whole

    def lost(self) -> str | None:
        """Wait for the save under way; one line if the latest save, in any process, did not come out whole."""
        if not any_process(not self.wait()):
            return None
        newest = max(self.steps(), default=None)
        there = "there is none" if newest is None else f"the newest is of step {newest}"
        reason = self._messages[-1] if self._messages else "another process could not write its part"
        return f"the last checkpoint was not written, and in {self.directory} {there}: {reason}"

    def poll(self) -> list[str]:
        """One line for each failure since the last call."""
        messages, self._messages = self._messages, []
        return messages

    def close(self) -> None:
        """Wait for the save under way and let go of Orbax's threads; to be called before the program ends."""
        self.wait()
        self._orbax.close()

    def _prepare(self, step: int, size: int) -> bool:
        """Clear away what was cut short and make the folder of this save; True if the step is there already, intact."""
        _, partial, deleting = _listing(self.directory)
        for folder in partial + deleting:
            shutil.rmtree(folder, ignore_errors=True)
        if self._folder(step).exists() and "problem" not in self._inspect(step, contents=True):
            return True
        self._folder(step, ".partial").mkdir(parents=True)
        # Asked beforehand, because tensorstore meets a full disk with pages of tracebacks from its own threads.
        free = shutil.disk_usage(self.directory).free
        if free < size:
            self._make_room(step, size)
            free = shutil.disk_usage(self.directory).free
        if free < size:
            raise OSError(errno.ENOSPC, f"{size / 1e6:.1f} MB to write, {free / 1e6:.1f} MB free", str(self.directory))
        return False

    def _finish(self, step: int, body: dict[str, Any]) -> None:
        """Wait until every process has written its part; then process 0 seals the folder and gives it its name."""
        try:
            self._orbax.wait_until_finished()
            if jax.process_index() == 0:
                partial = self._folder(step, ".partial")
                write_manifest(partial, {**body, "files": seal(partial)})
                if self._folder(step).exists():  # damaged, or _prepare would have kept it
                    self._remove(step)
                partial.rename(self._folder(step))
                _flush(self.directory)
            self._whole = True
        except Exception as error:
            self._fail(step, error)
            return
        if jax.process_index() == 0:
            try:
                self._retain(step)
            except OSError as error:
                self._tell(f"an old checkpoint could not be removed: {_one_line(error)}")

    def _retain(self, newest: int) -> None:
        """Remove what neither keep nor keep_best holds on to.

        Steps after `newest` are left alone: the run went back behind them, and they are replaced as it comes by.
        """
        complete = [step for step in self.steps() if step <= newest]
        kept = {*complete[-self.config.keep :], *self._best_first(complete)[: self.config.keep_best]}
        for step in _listing(self.directory)[0]:
            if step <= newest and step not in kept:
                self._remove(step)

    def _make_room(self, step: int, size: int) -> None:
        """Remove what nothing will keep once `step` is saved, the oldest first, until `size` bytes are free.

        At least one checkpoint stays, and those that stay by `keep` are proved whole before anything is removed. So a
        damaged one, or one that a run with a larger `keep` has left, cannot hold the space of the next for ever.
        """
        older = [other for other in _listing(self.directory)[0] if other <= step]
        whole = (s for s in reversed(older) if s < step and "problem" not in self._inspect(s, contents=True))
        newest = list(itertools.islice(whole, max(1, self.config.keep - 1)))
        if not newest:
            return
        best = self._best_first([other for other in self.steps() if other < step])[: self.config.keep_best]
        for other in older:
            if other not in newest and other not in best and shutil.disk_usage(self.directory).free < size:
                log.warning("checkpoint of step %d is removed to make room for that of step %d", other, step)
                self._remove(other)

    def _best_first(self, steps: list[int]) -> list[int]:
        metrics = {step: metric for step in steps if (metric := self._metric(step)) is not None}
        return sorted(metrics, key=lambda step: (metrics[step], -step))

    def _metric(self, step: int) -> float | None:
        try:
            metric = read_manifest(self._folder(step))["metric"]
        except ValueError:
            return None
        return metric if metric is not None and math.isfinite(metric) else None

    def _remove(self, step: int) -> None:
        # Renamed first: a removal that is cut short must not leave half a checkpoint under a step's name.
        deleting = self._folder(step, ".deleting")
        self._folder(step).rename(deleting)
        shutil.rmtree(deleting)

    def _fail(self, step: int, error: Exception) -> bool:
        self._whole = False
        if jax.process_index() == 0:  # give back the space: the disk may be full
            shutil.rmtree(self._folder(step, ".partial"), ignore_errors=True)
        line = _one_line(error)  # an error while writing names no file
        self._tell(
            f"step {step} was not saved: {line}" + ("" if str(self.directory) in line else f" ({self.directory})")
        )
        return False

    def _tell(self, message: str) -> None:
        self._messages.append(message)
        log.error(message)

    # ---- restore ----------------------------------------------------------------------------------------------------

    def restore(
        self,
        abstract_state: Any,
        *,
        before: int | None = None,
        resize: Callable[[str], bool] | None = None,
        part: bool = False,
    ) -> Restored | None:
        """The newest intact checkpoint, of the steps below `before` if given; None if there is no complete one at all.

        abstract_state: the same pytree of jax.ShapeDtypeStruct, each with the sharding wanted, on any mesh of any
        number of devices and processes. A checkpoint that is damaged is named in a warning and the one before it is
        tried. resize: the '/'-joined paths of leaves whose dims may differ in size; they are made up with zeros, or cut
        where the rest is zeros (padding of a vocabulary, which depends on the mesh). part: the abstract state may lack
        leaves of the checkpoint (the optimizer's, where only parameters are wanted); they are not read.

        Raises:
          CheckpointError: there are checkpoints, and each is damaged.
          ValueError: the checkpoint is intact and of another model: names the first leaf that differs.
        """
        self.wait()
        wanted = by_path(abstract_state)
        damaged = []
        try:
            for step in agreed(lambda: self._candidates(before)):
                answer = agreed(lambda step=step: self._inspect(step, contents=self.config.verify))
                if (problem := answer.get("problem")) is None:
                    check_leaves(step, answer["leaves"], wanted, resize, part)
                    arrays, problem = self._read(step, answer["leaves"], wanted)
                if problem is None:
                    state = jax.tree.unflatten(jax.tree.structure(abstract_state), list(arrays.values()))
                    return Restored(step, state, answer["record"], self.directory)
                damaged.append(f"step {step} ({problem})")
                log.warning("checkpoint of step %d is damaged: %s", step, problem)
        except OSError as error:
            raise CheckpointError(f"cannot read the checkpoints in {self.directory}: {_one_line(error)}") from error
        if damaged:
            raise CheckpointError(f"no usable checkpoint in {self.directory}: {'; '.join(damaged)}")
        return None

    def _candidates(self, before: int | None) -> list[int]:
        complete, partial, _ = _listing(self.directory)
        for folder in partial:
            log.warning("checkpoint of step %d is partial: its save did not finish", int(folder.stem))
        return [step for step in reversed(complete) if before is None or step < before]

    def _inspect(self, step: int, *, contents: bool) -> dict[str, Any]:
        """The manifest of a checkpoint if it is whole, else {"problem": what is wrong}."""
        try:
            manifest = read_manifest(self._folder(step))
        except ValueError as error:
            return {"problem": str(error)}
        if manifest["step"] != step:
            return {"problem": f"its manifest is that of step {manifest['step']}"}
        damage = find_damage(self._folder(step), manifest["files"], contents=contents)
        return {"problem": ", ".join(damage)} if damage else manifest

    def _read(self, step: int, saved: dict, wanted: dict) -> tuple[dict[str, jax.Array] | None, str | None]:
        """The arrays by path, in the shapes and shardings wanted, or what is wrong."""
        orbax = _orbax()
        shapes = {path: shape_to_read(saved[path][1], leaf) for path, leaf in wanted.items() if leaf.size}
        restore_args = {
            path: orbax.ArrayRestoreArgs(
                sharding=wanted[path].sharding, global_shape=shape, strict=shape == tuple(saved[path][1])
            )
            for path, shape in shapes.items()
        }
        found, problem = {}, None
        try:
            arguments = orbax.args.PyTreeRestore(restore_args, restore_args=restore_args, partial_restore=True)
            found = self._orbax.restore(self._folder(step) / ARRAYS, args=arguments)
        except Exception as error:
            if self.config.verify:
                raise  # every byte is as it was written: the fault is the machine's or ours, not the checkpoint's
            problem = f"{ARRAYS}: {_one_line(error)}"
        if not self.config.verify and any_process(problem is not None):
            return None, problem or f"{ARRAYS}: another process could not read it"
        return {path: fit(path, found.get(path), leaf) for path, leaf in wanted.items()}, None

    # ---- both -------------------------------------------------------------------------------------------------------

    def _folder(self, step: int, suffix: str = "") -> Path:
        return self.directory / f"{step:08d}{suffix}"


def _orbax():
    import orbax.checkpoint  # here: most of a second, which a mistake in the configuration should not wait for

    return orbax.checkpoint


# ---- the directory --------------------------------------------------------------------------------------------------


def _listing(directory: Path) -> tuple[list[int], list[Path], list[Path]]:
    """Steps whose folder has its final name, ascending; folders of unfinished saves; of unfinished removals."""
    try:
        entries = sorted(directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        entries = []
    steps, partial, deleting = [], [], []
    for entry in entries:
        if match := re.fullmatch(r"(\d{8,})(\.partial|\.deleting)?", entry.name):
            if match[2]:
                (partial if match[2] == ".partial" else deleting).append(entry)
            else:
                steps.append(int(match[1]))
    return sorted(steps), partial, deleting


def _flush(directory: Path) -> None:
    """Make a rename inside the directory outlive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _one_line(error: Exception) -> str:
    line = " ".join(f"{type(error).__name__}: {error}".split())
    return line if len(line) <= 300 else f"{line[:100]} ... {line[-195:]}"  # tensorstore gives the cause last
