"""A prepared corpus: a folder, here or in a store, of token shards with an index. How it is written and opened.

    index.json       what there is: kind of token, tokenizer, digests, and the shards in the order of the stream
    NAME.bin         tokens of whole documents, little-endian uint16 or uint32, each document ended by eos_id
    NAME.ends.npy    int64: where the documents of the shard end in it
    tokenizer.json   what made the tokens (none for bytes)
    card.md, card.json   what is in it, for people and for programs

Why memory-mapped arrays with an index and not records (ArrayRecord, TFRecord)? A batch is windows at any places of one
long stream, and `batch(step)` has to find each at once. In an array a window is an offset: no decompression, no
parsing, no copy, and page cache shared by all processes of a host. A record has to be read whole for a window of it,
and windows across documents need several. Tokens of two bytes hardly compress. The ends of documents, which records
would give, are eight bytes a document beside the tokens. Anything reads the files: `np.memmap(NAME.bin, "<u2")`. What
records do better, a checksum of each, is done by shard: sha256, checked when a shard is fetched, and once for each
local file.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data.corpus import DataConfig
from data.objects import Final, download, is_url, join, read_bytes, repeated
from data.token_files import Mapped, Tokens, ends_file
from data.tokenizer import TokenizerConfig, load_tokenizer
from runtime.files import replace_text

log = logging.getLogger("isomesh.data")

FORMAT = 2
SPLITS = ("train", "heldout")
INDEX = "index.json"
TOKENIZER = "tokenizer.json"
DTYPES = ("<u2", "<u4")
SHARD_KEYS = {"name", "split", "documents", "tokens", "bytes", "digest", "ends_digest"}

Progress = Callable[[str, int, int], None]  # what is done, bytes done, bytes in all


def digest_of(index: dict) -> str:
    """The digest of a whole corpus: of its tokens, their order, and what they mean; not of how it was made."""
    kept = {key: index[key] for key in ("format", "dtype", "vocab_size", "eos_id", "tokenizer_digest", "shards")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def totals(shards: list[dict]) -> dict[str, dict[str, int]]:
    """Documents, tokens and bytes of each split."""
    own = {name: [shard for shard in shards if shard["split"] == name] for name in SPLITS}
    counted = ("documents", "tokens", "bytes")
    return {name: {key: sum(shard[key] for shard in own[name]) for key in counted} for name in SPLITS}


def parse_index(content: bytes, name: str) -> dict:
    """An index, checked against its own digest. Raises ValueError where it is damaged or of another format."""
    try:
        index = json.loads(content)
        if index["format"] != FORMAT:
            raise ValueError(f"format {index['format']}, and this version reads format {FORMAT}")
        if index["dtype"] not in DTYPES or not all(shard.keys() >= SHARD_KEYS for shard in index["shards"]):
            raise ValueError("it lacks what an index of a corpus has")
        if any(os.path.basename(shard["name"]) != shard["name"] for shard in index["shards"]):
            raise ValueError("it names shards outside its folder")
        if digest_of(index) != index["digest"]:
            raise ValueError("it does not agree with its own digest")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise ValueError(f"{name} is damaged or no index of a prepared corpus: {what}") from None
    return index


def read_index(roots: list[str]) -> tuple[dict, str]:
    """The index of the first of these folders or addresses that gives one, and which it was.

    Raises ValueError with the reason of each. Only the last is waited for.
    """
    reasons = []
    for number, root in enumerate(roots):
        name = join(root, INDEX)
        try:
            return parse_index(read_bytes(name, None if number == len(roots) - 1 else 5.0), name), root
        except FileNotFoundError:
            reasons.append(f"{root} is no prepared corpus: it has no {INDEX}")
        except OSError as error:
            reasons.append(f"{name}: {error.strerror}")
        except ValueError as error:
            reasons.append(str(error))
    raise ValueError("; ".join(reasons))


def tokenizer_of(data: DataConfig, asked: TokenizerConfig) -> tuple[TokenizerConfig, int]:
    """The settings of the tokenizer that a prepared corpus brings along, and its vocabulary. asked: what the user set.

    Raises ValueError where that is another one, or there is no corpus.
    """
    index, _ = read_index(roots_of(data))
    if asked.is_trained:
        raise ValueError(
            f"tokenizer={asked.kind} is trained on texts, and data.path={data.path} has tokens: leave it out, the "
            "corpus brings its own tokenizer"
        )
    if asked.kind == "file" and load_tokenizer(asked).digest != index["tokenizer_digest"]:
        raise ValueError(
            f"tokenizer.path={asked.path} is not the tokenizer of data.path={data.path}: leave it out, the corpus "
            "brings its own"
        )
    own = TokenizerConfig("bytes") if index["tokenizer"] == "bytes" else asked
    if own.kind == "bytes" and index["tokenizer"] != "bytes":
        own = TokenizerConfig("file", path=join(data.path, TOKENIZER))  # as it is spelled: alike on all hosts
    return own, index["vocab_size"]


def roots_of(data: DataConfig) -> list[str]:
    """The places of a prepared corpus: its own, then its replicas."""
    return [root if is_url(root) else str(Path(root).expanduser()) for root in (data.path, *data.replicas)]


# ---- a local folder ------------------------------------------------------------------------------------------------


def open_folder(folder: Path, index: dict) -> dict[str, Tokens]:
    """The streams of both splits, memory-mapped. Raises ValueError for a shard that is missing or of another size."""
    size = int(index["dtype"][2:])
    for shard in index["shards"]:
        path = bin_file(folder, shard)
        for file, expected in ((path, shard["tokens"] * size), (ends_file(path), None)):
            try:
                found = file.stat().st_size
            except OSError as error:
                raise ValueError(f"{file}: {error.strerror}") from error
            if expected is not None and found != expected:
                raise ValueError(f"{file}: {found:,} bytes, and {INDEX} says {expected:,}: it is damaged")
    return {name: Tokens([_mapped(folder, s, index) for s in index["shards"] if s["split"] == name], index["dtype"])
            for name in SPLITS}  # fmt: skip


def _mapped(folder: Path, shard: dict, index: dict) -> Mapped:
    path = bin_file(folder, shard)
    return Mapped(path, index["dtype"], shard["tokens"], shard["documents"], shard["bytes"])


def bin_file(folder: Path, shard: dict) -> Path:
    """The file NAME.bin with a shard's tokens; it need not be there."""
    return Path(folder, f"{shard['name']}.bin")


def verify(folder: Path, index: dict, memos: Path, progress: Progress) -> None:
    """Compares each file with its digest, unless it has not changed since this was last done.

    memos: a folder that remembers it. Raises ValueError naming the file that is damaged.
    """
    memo = _memo(folder, index, memos)
    if memo.exists():
        return
    checks = [check for shard in index["shards"] for check in checks_of(shard)]
    total, done = sum(Path(folder, name).stat().st_size for name, _ in checks), 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, (found, size), expected in zip(
            [name for name, _ in checks],
            pool.map(lambda check: sha256_of(Path(folder, check[0])), checks),
            [digest for _, digest in checks],
            strict=True,
        ):
            if found != expected:
                raise ValueError(
                    f"{Path(folder, name)} is damaged: sha256 {found[:12]}, and {INDEX} says {expected[:12]}"
                )
            done += size
            progress("checking the shards", done, total)
    remember(folder, index, memos)


def checks_of(shard: dict) -> list[tuple[str, str]]:
    """The two files of a shard, each with its digest."""
    return [(f"{shard['name']}.bin", shard["digest"]), (f"{shard['name']}.ends.npy", shard["ends_digest"])]


def sha256_of(path: Path) -> tuple[str, int]:
    """The digest of a file, and its bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest(), file.tell()


def remember(folder: Path, index: dict, memos: Path) -> None:
    """Notes that the files are as the index says."""
    memos.mkdir(mode=0o700, parents=True, exist_ok=True)
    replace_text(_memo(folder, index, memos), "")


def _memo(folder: Path, index: dict, memos: Path) -> Path:
    names = [name for shard in index["shards"] for name, _ in checks_of(shard)]
    stats = [Path(folder, name).stat() for name in names]
    marks = [index["digest"], [(s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for s in stats]]
    return memos / hashlib.sha256(json.dumps(marks).encode()).hexdigest()[:32]


# ---- a file of a corpus from wherever it can be had ------------------------------------------------------------------


def fetch(roots: list[str], name: str, digest: str, target: Path) -> None:
    """Copies a file to `target` from the first of the folders and addresses where it is whole.

    When none gives it, all are tried again after a while. Raises ValueError with what each of them did.
    """

    def once() -> None:
        reasons, damaged = [], 0
        for root in roots:
            try:
                _fetch_from(root, name, target)
                found, _ = sha256_of(target)
            except Exception as error:  # each store has exceptions of its own
                reasons.append(f"{root}: {' '.join(str(error).split())[:200] or type(error).__name__}")
                continue
            if found == digest:
                for reason in reasons:
                    log.warning("%s: %s; taken from %s", name, reason, root)
                return
            damaged += 1
            reasons.append(f"{root}: damaged, sha256 {found[:12]} where {INDEX} says {digest[:12]}")
        target.unlink(missing_ok=True)
        if damaged == len(roots):
            raise Final("; ".join(reasons))
        raise OSError("; ".join(reasons))

    repeated(join(roots[0], name), once)


def _fetch_from(root: str, name: str, target: Path) -> None:
    if is_url(root):
        download(join(root, name), target)
    else:
        target.write_bytes(Path(root, name).expanduser().read_bytes())
