"""Texts to tokens, many at a time: in this process, or in several that keep every core busy."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.tokenizer import Tokenizer, TokenizerConfig, load_tokenizer

MANY_CORES = 4  # on which the library is faster than one core by words


@dataclass(frozen=True, eq=False)
class Encoded:
    """The tokens of some documents, one behind the other, each ended by its end-of-document token."""

    tokens: np.ndarray
    lengths: np.ndarray  # int64 of (documents,), in tokens, the end included
    bytes: np.ndarray  # int64 of (documents,): of the text that the tokens stand for


class Encoder:
    """Encodes with a tokenizer. alone: on one core, as fast as that can be."""

    def __init__(self, tokenizer: Tokenizer, dtype: str, *, alone: bool):
        self._tokenizer, self._dtype = tokenizer, dtype
        self._batch = ((tokenizer.by_words() if alone else None) or tokenizer).encode_batch

    def encode(self, texts: list[str | np.ndarray]) -> Encoded:
        """The tokens of texts; a text that is an array of tokens already is taken as it is."""
        ids = iter(self._batch([text for text in texts if isinstance(text, str)]))
        documents = [next(ids) if isinstance(text, str) else text for text in texts]
        lengths = np.array([len(document) + 1 for document in documents], np.int64)
        tokens = np.full(lengths.sum(), self._tokenizer.eos_id, self._dtype)
        at = 0
        for document in documents:
            tokens[at : at + len(document)] = document
            at += len(document) + 1
        starts, counts = np.cumsum(lengths) - lengths, self._tokenizer.token_bytes
        return Encoded(
            tokens, lengths, np.add.reduceat(counts[tokens], starts, dtype=np.int64) if len(starts) else starts
        )


class InProcess:
    """Encodes in this process, at once: with few cores one of them by words, with more all by the library."""

    def __init__(self, tokenizer: Tokenizer, dtype: str):
        self._encoder = Encoder(tokenizer, dtype, alone=(os.cpu_count() or 1) < MANY_CORES)
        self.depth = 1  # chunks that are worth having under way at once

    def submit(self, texts: list[str | np.ndarray]) -> Future:
        """The tokens of texts."""
        future = Future()
        future.set_result(self._encoder.encode(texts))
        return future


class Workers:
    """Encodes in processes of their own, which end when this one does, however it does."""

    def __init__(self, count: int, config: TokenizerConfig, saved: Path, dtype: str):
        import multiprocessing
        from concurrent.futures import ProcessPoolExecutor

        self.depth = 2 * count + 1
        self._pool = ProcessPoolExecutor(
            count, multiprocessing.get_context("spawn"), initializer=_begin, initargs=(config, saved, dtype)
        )

    def submit(self, texts: list[str | np.ndarray]) -> Future:
        """The tokens of texts, some time. Raises ValueError where a worker was killed."""
        with _ignoring_interrupts():  # inherited by a worker that starts now: Ctrl-C is answered here
            return self._pool.submit(_work, texts)

    def close(self) -> None:
        """Ends the processes without waiting for what they do."""
        self._pool.shutdown(wait=False, cancel_futures=True)


@contextlib.contextmanager
def encoders(
    workers: int, tokenizer: Tokenizer, config: TokenizerConfig, saved: Path, dtype: str
) -> Iterator[InProcess | Workers]:
    """Who encodes: this process for workers=0, or so many others. saved: the tokenizer's file."""
    if workers == 0:
        yield InProcess(tokenizer, dtype)
        return
    pool = Workers(workers, config, saved, dtype)
    try:
        yield pool
    finally:
        pool.close()


@contextlib.contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# ---- in a worker -------------------------------------------------------------------------------------------------

_mine: Encoder | None = None


def _begin(config: TokenizerConfig, saved: Path, dtype: str) -> None:
    global _mine
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core each
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _mine = Encoder(load_tokenizer(config, saved), dtype, alone=True)


def _work(texts: list[str | np.ndarray]) -> Encoded:
    return _mine.encode(texts)


def _end_with_parent() -> None:
    import multiprocessing
    from multiprocessing.connection import wait

    wait([multiprocessing.parent_process().sentinel])
    os._exit(0)
