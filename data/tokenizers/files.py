"""What a path of a tokenizer names, as the text of a tokenizer.json.

A path is a tokenizer.json, a .gguf, or a folder: with a tokenizer.json, or with the two files of a GPT-2 vocabulary
(encoder.json or vocab.json, and vocab.bpe or merges.txt).
"""

import functools
import json
from pathlib import Path

from data.objects import is_url, read_bytes
from data.tokenizers.gguf import gguf_spec
from data.tokenizers.gpt2 import MERGES, VOCABULARIES, gpt2_spec

SETTINGS = "tokenizer_config.json"


def read_spec(path: Path | str) -> str:
    """The tokenizer.json of a path, or of an address in a store. Raises ValueError that names the file which fails."""
    if is_url(path):
        return read_text(str(path))
    path = Path(path).expanduser()
    try:
        stats = [(file, file.stat()) for file in files_of(path)]
    except OSError as error:
        raise ValueError(f"tokenizer file {path}: {error.strerror}") from error
    return _spec(*((file, stat.st_size, stat.st_mtime_ns) for file, stat in stats))


def files_of(path: Path) -> list[Path]:
    """The files that make up the tokenizer of a path. Raises ValueError for a folder without any."""
    if not path.is_dir():
        return [path]
    if (path / "tokenizer.json").exists():
        return [path / "tokenizer.json"]
    pair = [next((path / name for name in names if (path / name).exists()), None) for names in (VOCABULARIES, MERGES)]
    if all(pair):
        return pair
    if models := sorted(path.glob("*.gguf")):
        raise ValueError(f"{path}: no tokenizer.json; name its file, as in tokenizer.path={models[0]}")
    if (path / "tokenizer.model").exists():
        raise ValueError(f"{path}: tokenizer.model alone is not read; save the tokenizer as tokenizer.json beside it")
    two = f"({' or '.join(VOCABULARIES)} with {' or '.join(MERGES)})"
    raise ValueError(f"tokenizer folder {path}: holds no tokenizer.json, and no GPT-2 vocabulary {two}")


@functools.lru_cache(maxsize=4)  # a program asks for the size of a vocabulary before it opens it
def _spec(*stats: tuple[Path, int, int]) -> str:
    files = [file for file, *_ in stats]
    if len(files) == 2:
        folder = files[0].parent
        return gpt2_spec(*(read_text(file) for file in files), read_settings(folder / SETTINGS), folder)
    if files[0].suffix == ".gguf":
        return gguf_spec(files[0])
    return read_text(files[0])


def read_text(path: Path | str) -> str:
    """Raises ValueError naming a file that cannot be read as UTF-8."""
    try:
        return read_bytes(str(path)).decode()
    except OSError as error:
        raise ValueError(f"tokenizer file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"tokenizer file {path}: not UTF-8 at byte {error.start}") from error


def read_settings(path: Path) -> dict:
    """A JSON object of settings beside a tokenizer; an empty one where the file is not there.

    Raises ValueError where it is no JSON object.
    """
    if not path.exists():
        return {}
    try:
        settings = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: a {type(settings).__name__}, not an object")
    return settings
