"""python -m data prepare OUT data.path=FILES tokenizer=bpe: a corpus tokenised once, here or into an object store.

It is written beside its place (OUT.partial; for a store in data.cache), where the same command goes on after it was
stopped or killed, and gets its name when it is whole. What is there is never overwritten.
"""

import argparse
import contextlib
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from config.compose import load
from data.card import card_text
from data.commands.progress import bars
from data.corpus import BadItem, DataConfig
from data.objects import exists, is_url, join, read_bytes, upload
from data.prepared import INDEX, TOKENIZER, bin_file, checks_of, parse_index
from data.shards import digest_of_source, require_unchanged, stamps
from data.tokenizer import TokenizerConfig, load_tokenizer
from data.writer import SHARD_TOKENS, Job, write_corpus
from runtime.arguments import Parser
from runtime.exit_codes import DONE
from runtime.locks import Locked, locked
from runtime.overrides import pasted

UPLOADS = 2  # at once


def add_prepare(parser: Parser) -> None:
    """The options of the command."""
    parser.add_argument("out", metavar="OUT", help="the new folder, or an address such as s3://bucket/corpus")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="data.*, tokenizer.*, as of train.py")
    words = {"shards": "tokens of a shard, about", "workers": "processes that tokenise (default: the cores)"}
    parser.add_argument("--shard-tokens", type=_positive, default=SHARD_TOKENS, metavar="N", help=words["shards"])
    parser.add_argument("--workers", type=_positive, default=os.cpu_count(), metavar="N", help=words["workers"])
    parser.add_argument("--skip-bad", action="store_true", help="leave out and count what cannot be read")
    parser.set_defaults(command=run)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


def run(options: argparse.Namespace) -> int:
    """Prepares a corpus; returns the exit code. Raises ValueError or OSError for what the user can mend."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    data, tokenizer = _settings(options.overrides)
    cache = Path(data.cache).expanduser()
    (cache / "sources").mkdir(mode=0o700, parents=True, exist_ok=True)
    out = options.out if is_url(options.out) else str(Path(options.out).expanduser())
    with bars() as progress:
        ready = None if tokenizer.is_trained else load_tokenizer(tokenizer)
        before = stamps(data)
        settings = digest_of_source(cache, data, tokenizer, ready, before, progress)
        if _is_there(out, settings):
            print(f"{out} is prepared already, from the same files and settings")
            return DONE
        job = Job(settings, sum(s[1] for s in before), options.shard_tokens, options.workers, options.skip_bad)
        began = time.perf_counter()
        folder = _staging(out, cache)
        with _held(folder, out):
            store = _Store(out, folder) if is_url(out) else _Folder(out, folder)
            try:
                index = write_corpus(folder, data, tokenizer, ready, job, progress, store.take)
            except BadItem as error:
                raise ValueError(f"{error}; --skip-bad leaves such out and counts them") from error
            require_unchanged(data, before)
            card = json.loads((folder / "card.json").read_text())
            store.publish(index)
    seconds = time.perf_counter() - began
    print(card_text(card))
    print(f"{out}: {card['bytes'] / 1e6:,.1f} MB of text in {seconds:.1f} s, {card['bytes'] / 1e6 / seconds:.1f} MB/s")
    print(f"train on it: python train.py data=prepared {pasted('data.path', options.out)}")
    return DONE


def _settings(overrides: list[str]) -> tuple[DataConfig, TokenizerConfig]:
    given = {override.partition("=")[0] for override in overrides}
    for key in given:
        if key.partition(".")[0] not in ("data", "tokenizer"):
            raise ValueError(f"{key} decides nothing here: a corpus is made by data.* and tokenizer.* alone")
    config = load(
        [*(["data=text"] if "data.path" in given and not given & {"data", "data.source"} else []), *overrides]
    )
    if config.data.source == "prepared":
        raise ValueError(f"data.path={config.data.path} is prepared already")
    return config.data, config.tokenizer


# ---- where it is made --------------------------------------------------------------------------------------------


def _staging(out: str, cache: Path) -> Path:
    folder = Path(f"{out.rstrip('/')}.partial")
    if is_url(out):
        folder = cache / "staging" / hashlib.sha256(out.rstrip("/").encode()).hexdigest()[:32]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def _held(folder: Path, out: str) -> Iterator[None]:
    lock = folder.with_name(f".lock-{folder.name}")
    try:
        with locked(lock):
            folder.mkdir(exist_ok=True)  # whoever held it before has moved it
            yield
            lock.unlink(missing_ok=True)
    except Locked:
        raise ValueError(f"another process is preparing {out}") from None


def _is_there(out: str, settings: str) -> bool:
    """Whether the corpus is there. Raises ValueError where something else is."""
    name = join(out, INDEX)
    if exists(name):
        if parse_index(read_bytes(name), name)["settings"] != settings:
            raise ValueError(f"{out} holds a corpus of other files or settings: give another name")
        return True
    if not is_url(out) and Path(out).exists() and (not Path(out).is_dir() or any(Path(out).iterdir())):
        raise ValueError(f"{out} is there and no prepared corpus: give another name")
    return False


class _Folder:
    """A local folder, which gets its name when it is whole."""

    def __init__(self, out: str, folder: Path):
        self._out, self._folder = Path(out), folder

    def take(self, shard: dict) -> None:
        """Shards stay where they are written."""

    def publish(self, index: dict) -> None:
        """Gives the folder its name."""
        os.rename(self._folder, self._out)


class _Store:
    """An object store: shards go there while others are made, the index last, so that nobody sees half a corpus."""

    def __init__(self, out: str, folder: Path):
        self._out, self._folder = out, folder
        self._pool = ThreadPoolExecutor(UPLOADS)
        self._under_way: list[Future] = []

    def take(self, shard: dict) -> None:
        """Sends a shard, unless that was done. Raises ValueError where the store has not taken an earlier one."""
        for future in [future for future in self._under_way if future.done()]:
            future.result()
            self._under_way.remove(future)
        self._under_way.append(self._pool.submit(self._send, shard))

    def _send(self, shard: dict) -> None:
        done = self._folder / f"{shard['name']}.uploaded"
        if not done.exists():
            for name, _ in checks_of(shard):
                upload(self._folder / name, join(self._out, name))
            done.touch()
        bin_file(self._folder, shard).unlink(missing_ok=True)

    def publish(self, index: dict) -> None:
        """Sends what is left, the index last, and removes what was made here."""
        for future in self._under_way:
            future.result()
        for name in (TOKENIZER, "card.json", "card.md", INDEX):
            if (self._folder / name).exists():
                upload(self._folder / name, join(self._out, name))
        self._pool.shutdown()
        shutil.rmtree(self._folder)
