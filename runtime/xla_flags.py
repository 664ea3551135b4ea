"""Which XLA flags the installed jaxlib knows. A process ends at once when XLA_FLAGS names one that it does not know.

Nothing slow is imported: flags are set before JAX is.
"""

import contextlib
import importlib.metadata
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

logger = logging.getLogger(__name__)

CACHE = Path("~/.cache/isomesh")
# Flags are read when the first client is made; the refusal names all that are unknown.
QUESTION = "from jaxlib import xla_client; xla_client.make_cpu_client()"
REFUSAL = re.compile(r"Unknown flags? in XLA_FLAGS: (.*)")
PATIENCE = 60  # seconds; an answer takes a fraction of one


def known(flags: Sequence[str], cache: Path = CACHE) -> tuple[str, ...]:
    """Those of `flags` ("--name=value") that the installed jaxlib knows, in their order.

    A child process is asked once for each name and version of jaxlib; the answers are kept in the folder `cache`.
    Where no answer is to be had, every flag counts as known.
    """
    file = cache.expanduser() / f"xla-flags-{importlib.metadata.version('jaxlib')}.json"
    answers = _read(file)
    if new := [flag for flag in flags if _name(flag) not in answers]:
        unknown = _ask(new)
        if unknown is None:
            return tuple(flag for flag in flags if answers.get(_name(flag), True))
        answers |= {_name(flag): _name(flag) not in unknown for flag in new}
        _write(file, answers)
    return tuple(flag for flag in flags if answers[_name(flag)])


def _name(flag: str) -> str:
    return flag.partition("=")[0]


def _ask(flags: list[str]) -> set[str] | None:
    """The names that jaxlib does not know; None where the child process ended for another reason."""
    environment = os.environ | {"XLA_FLAGS": " ".join(flags)}
    try:
        child = subprocess.run(
            [sys.executable, "-c", QUESTION], env=environment, capture_output=True, text=True, timeout=PATIENCE
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        logger.debug("jaxlib was not asked for its flags: %s", error)
        return None
    if child.returncode == 0:
        return set()
    refusal = REFUSAL.search(child.stderr)
    return {_name(flag) for flag in refusal[1].split()} if refusal else None


def _read(file: Path) -> dict[str, bool]:
    try:
        answers = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return {k: v for k, v in answers.items() if isinstance(v, bool)} if isinstance(answers, dict) else {}


def _write(file: Path, answers: dict[str, bool]) -> None:
    """Whole or not at all; a folder that cannot be written only means that the next process asks again."""
    with contextlib.suppress(OSError):
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as part:
            json.dump(answers, part)
        os.replace(part.name, file)
