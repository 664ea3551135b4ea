"""Secrets of the server: read from a file that only its owner can read, or from the environment, and kept out of sight.

They never stand on a command line, where every user of the machine sees them, and are never part of a message.
"""

import contextlib
import os
import secrets
import stat
from pathlib import Path

SECRET = ("secret", "ISOMESH_SECRET")  # its file in the state folder, and its variable
DATABASE = ("database", "ISOMESH_DATABASE")
SHORTEST = 32  # characters of a secret


def folder(path: Path) -> Path:
    """The state folder, made where it is not there yet: nobody but its owner may look into it."""
    path = path.expanduser().absolute()
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


def private(path: Path) -> str:
    """The text of a file that others cannot read. Raises ValueError where they can."""
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise ValueError(f"{path} has mode {mode:03o}: others can read this secret; run chmod 600 {path}")
    return path.read_text().strip()


def given(state: Path, place: tuple[str, str]) -> str | None:
    """A secret from the environment, else from its file in the state folder; None where there is neither."""
    name, variable = place
    if os.environ.get(variable):
        return os.environ[variable].strip()
    path = state / name
    return private(path) if path.exists() else None


def server_secret(state: Path) -> bytes:
    """What keys are hashed with; made at first use. Raises ValueError for one that is too short."""
    path = state / SECRET[0]
    if given(state, SECRET) is None:
        make_once(path, secrets.token_urlsafe(48))
    secret = given(state, SECRET) or ""
    if len(secret) < SHORTEST:
        raise ValueError(f"the server's secret ({path} or {SECRET[1]}) has {len(secret)} characters, not {SHORTEST}")
    return secret.encode()


def make_once(path: Path, text: str) -> None:
    """Writes a new file for its owner alone. Of several processes at once the first wins; none sees half a file."""
    draft = path.with_name(f".{path.name}-{os.getpid()}-{secrets.token_hex(4)}")
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    with contextlib.suppress(FileExistsError):
        os.link(draft, path)
    draft.unlink()
