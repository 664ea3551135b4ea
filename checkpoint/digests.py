"""The manifest of a checkpoint: what was written, with a digest of every file and of the manifest itself.

Orbax restores a flipped bit without a word, so a checkpoint here is whole only when every byte of it still has the
digest that was taken when it was saved. Digests are of files, not of arrays: they cover Orbax's metadata as well as
the values, they need no device, and they hold for every mesh that the arrays are later restored on.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


def write_manifest(directory: Path, body: dict[str, Any]) -> None:
    """Write `directory/manifest.json` and flush it to disk; body: a JSON object."""
    with open(directory / MANIFEST, "w", encoding="utf-8") as file:
        file.write(_encode(body))
        file.flush()
        os.fsync(file.fileno())


def read_manifest(directory: Path) -> dict[str, Any]:
    """The body that `write_manifest` was given.

    Raises:
      ValueError: the file is missing or cannot be read, or one of its bytes is not as it was written.
    """
    try:
        text = (directory / MANIFEST).read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise ValueError(f"{MANIFEST} is missing") from None
    except OSError as error:
        raise ValueError(f"{MANIFEST} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{MANIFEST} is damaged: not text") from None
    try:
        body = json.loads(text)["body"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{MANIFEST} is damaged: not a manifest") from None
    # Comparing the whole text, and not just its digest, also covers bytes that JSON would read past.
    if _encode(body) != text:
        raise ValueError(f"{MANIFEST} is damaged: its digest differs")
    return body


def seal(root: Path) -> dict[str, list]:
    """Flush every file under root to disk: {relative path: [bytes, sha256]}."""
    names = _names(root)
    return dict(zip(names, _in_threads(lambda name: _digest(root / name, flush=True), names), strict=True))


def find_damage(root: Path, files: dict[str, list], *, contents: bool) -> list[str]:
    """Compare the files under root with what `seal` returned for them: one `path: what is wrong` for each that differs.

    contents=False compares names and sizes only. Hidden files that were not there at the time are no damage
    (file browsers and network file systems leave them).
    """

    def problem(name: str) -> str | None:
        size, digest = files[name]
        path = root / name
        try:
            found = path.stat().st_size
            if found != size:
                return f"{name}: {found} bytes instead of {size}"
            if contents and _digest(path, flush=False)[1] != digest:
                return f"{name}: its digest differs"
        except FileNotFoundError:
            return f"{name}: missing"
        except OSError as error:
            return f"{name}: cannot be read: {error.strerror}"
        return None

    try:
        extra = [name for name in _names(root) if name not in files and not Path(name).name.startswith(".")]
    except OSError as error:
        return [f"{root.name}: cannot be listed: {error.strerror}"]
    return [found for found in _in_threads(problem, sorted(files)) if found] + [
        f"{name}: not part of it" for name in extra
    ]


def _encode(body: dict[str, Any]) -> str:
    text = json.dumps(body)
    return f'{{"sha256": "{hashlib.sha256(text.encode()).hexdigest()}",\n "body": {text}}}\n'


def _digest(path: Path, *, flush: bool) -> list:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if flush:
            os.fsync(file.fileno())
        return [file.tell(), digest]


def _names(root: Path) -> list[str]:
    paths = (Path(folder, name) for folder, _, names in os.walk(root) for name in names)
    return sorted(path.relative_to(root).as_posix() for path in paths if path != root / MANIFEST)


def _in_threads(function, items: list) -> list:
    # hashlib lets go of the interpreter lock: threads hash in parallel. Half of the cores stay with the training loop.
    with ThreadPoolExecutor(min(16, max(1, (os.cpu_count() or 1) // 2))) as pool:
        return list(pool.map(function, items))
