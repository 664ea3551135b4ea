"""Decisions that all processes of a run take alike, and what they must have been given alike."""

import hashlib
import itertools
import json
import platform
import secrets
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax._src.distributed import global_state  # the public door hides the client of the key-value store
from jax.experimental import multihost_utils

from runtime import leave
from runtime.files import naming

ERRORS = {error.__name__: error for error in (OSError, ValueError)}
ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tokenizers")
WAIT_SECONDS = 60  # for one answer of the coordinator; then it is asked again
SHARED_SECONDS = 10  # that a network file system may take to show a new file
SHOWN = 3  # differences that a message names

_rounds = itertools.count()  # every process compares the same things in the same order


def agreed(look: Callable[[], Any]) -> Any:
    """What process 0 sees, for every process: `look` runs there alone and returns something JSON-able.

    An OSError or ValueError there is raised in all.
    """
    if jax.process_count() == 1:
        return look()
    answer = b""
    if jax.process_index() == 0:
        try:
            answer = json.dumps({"seen": look()}).encode()
        except tuple(ERRORS.values()) as error:
            name = next(name for name, kind in ERRORS.items() if isinstance(error, kind))
            answer = json.dumps({"error": name, "message": str(error)}).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(answer))))
    padded = np.frombuffer(answer.ljust(size, b" ")[:size], np.uint8)
    told = json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).astype(np.uint8).tobytes())
    if "error" in told:
        raise ERRORS[told["error"]](told["message"])
    return told["seen"]


def any_process(flag: bool) -> bool:
    """Whether `flag` is set in any process."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.int32(flag))))


def require_same(ours: dict[str, Any]) -> None:
    """Waits until every process has come here, and found that its values, by key, are those of process 0.

    No process goes on before that, however long another takes to come. ours: JSON-able, flat.
    Raises ValueError in a process whose values differ: one line with the keys and both values.
    """
    processes, rank = jax.process_count(), jax.process_index()
    if processes == 1:
        return
    store, place = global_state.client, f"isomesh/same/{next(_rounds)}"
    if rank == 0:
        store.key_value_set(place, json.dumps(ours))
    elif found := differing(ours, json.loads(_wait_for(store, place)), rank):
        raise ValueError(f"{'; '.join(found[:SHOWN])}: all processes of a run need the same")
    if store.key_value_increment(f"{place}/agree", 1) == processes:
        store.key_value_set(f"{place}/all", "agree")
    _wait_for(store, f"{place}/all")


def require_shared(folder: Path) -> None:
    """Raises ValueError in a process that sees another folder by this name than process 0 does.

    Each process writes its own part of a checkpoint there: on file systems of their own it would be lost.
    """
    if jax.process_count() == 1:
        return
    mark = folder / agreed(lambda: f".shared-{secrets.token_hex(8)}")
    if jax.process_index() > 0:
        require_same({})  # it is there now
        deadline = time.monotonic() + SHARED_SECONDS
        while not mark.exists():
            if time.monotonic() > deadline:
                raise ValueError(
                    f"process {jax.process_index()} does not see what process 0 writes to {folder}: all "
                    "processes of a run need it for its checkpoints, on a file system that they share"
                )
            time.sleep(0.1)
        require_same({})
        return
    with leave.on_leaving(mark.unlink), naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
        mark.touch()
        require_same({})
        require_same({})
        mark.unlink()


def differing(ours: dict[str, Any], theirs: dict[str, Any], rank: int) -> list[str]:
    """Each key in which the values of process `rank` differ from those of process 0, with both."""
    ours = json.loads(json.dumps(ours))
    return [
        f"{key} is {theirs.get(key, 'absent')} in process 0 and {ours.get(key, 'absent')} in process {rank}"
        for key in {**theirs, **ours}
        if key not in ours or key not in theirs or ours[key] != theirs[key]
    ]


def code_versions() -> dict[str, str]:
    """A digest of each source file of the project that is loaded, and the versions of what it stands on."""
    files = {Path(file).resolve() for module in [*sys.modules.values()] if (file := getattr(module, "__file__", None))}
    # a module may claim a file that is not there (torch.classes: "_classes.py")
    names = sorted(file.relative_to(ROOT) for file in files if file.is_relative_to(ROOT) and file.is_file())
    ours = [name for name in names if not name.parts[0].startswith(".") and "site-packages" not in name.parts]
    digests = {name.as_posix(): hashlib.sha256((ROOT / name).read_bytes()).hexdigest()[:12] for name in ours}
    versions = {f"the version of {name}": version(name) for name in PACKAGES}
    return {**digests, **versions, "the version of Python": ".".join(platform.python_version_tuple()[:2])}


def _wait_for(store: Any, key: str) -> str:
    while True:
        try:
            return store.blocking_key_value_get(key, 1000 * WAIT_SECONDS)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
