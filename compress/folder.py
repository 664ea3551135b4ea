"""A compressed model on disk: a directory like that of a run, which says in which forms its parameters are.

OUT/config.yaml             the model's settings
OUT/tokenizer.json          and pretrained/, imported.json, as the model had them
OUT/checkpoints/            the parameters, as of a run, with a digest of every file
OUT/compressed/manifest.json   the forms, where the model came from, a digest of each file beside and of itself
OUT/cost.md, cost.json      what the compression cost
"""

from pathlib import Path
from typing import Any

from checkpoint.digests import find_damage, read_manifest, seal, write_manifest
from compress.forms import from_json, to_json
from model.forms import Forms

MARK = "compressed"  # the folder in OUT
FORMAT = 1
SEALED = ("config.yaml", "tokenizer.json", "imported.json", "pretrained")  # files and folders beside the parameters


def read_forms(path: Path) -> Forms:
    """The forms of a model's parameters; none where it is not compressed. Raises ValueError for a damaged folder."""
    if not (path / MARK).exists():
        return {}
    body = about(path)
    if damage := find_damage(path, body["files"], contents=True):
        damage = [found for found in damage if not found.endswith(": not part of it")]
    if damage:
        raise ValueError(f"{path} is damaged: {', '.join(damage)}")
    return from_json(body["forms"])


def about(path: Path) -> dict[str, Any]:
    """What the manifest says: recipe, source, calibration, forms. Raises ValueError for a damaged one."""
    try:
        body = read_manifest(path / MARK)
    except ValueError as error:
        raise ValueError(f"{path / MARK}: {error}") from None
    if body["format"] != FORMAT:
        raise ValueError(f"{path} is of format {body['format']}, and this code reads {FORMAT}: use its version")
    return body


def write_mark(folder: Path, forms: Forms, body: dict[str, Any]) -> None:
    """Seals a folder: its small files must be there. `body` says where the model came from."""
    (folder / MARK).mkdir()
    inside = lambda name: any(name == one or name.startswith(f"{one}/") for one in SEALED)
    files = {name: digest for name, digest in seal(folder).items() if inside(name)}
    write_manifest(folder / MARK, {"format": FORMAT, **body, "forms": to_json(forms), "files": files})
