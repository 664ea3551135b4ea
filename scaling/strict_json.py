"""JSON that every reader takes: no NaN and no Infinity, which are not JSON; a number that is not finite is null."""

import json
import math
import os
from pathlib import Path


def strict(value):
    """The same data with null for each number that is not finite, NumPy's numbers as Python's."""
    if isinstance(value, dict):
        return {str(key): strict(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [strict(one) for one in value]
    if hasattr(value, "tolist"):
        return strict(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def dumps(value, indent: int | None = None) -> str:
    """The data as JSON text, after `strict`; `indent` as of json.dumps."""
    return json.dumps(strict(value), indent=indent, allow_nan=False)


def write(path: Path, value) -> None:
    """Writes it whole or not at all: readers see the file before, or this one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(dumps(value, indent=1) + "\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
