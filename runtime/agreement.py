"""Decisions that all processes of a run take alike."""

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

ERRORS = {error.__name__: error for error in (OSError, ValueError)}


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
