"""Texts to tokens, many at a time."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.corpus import Document
from data.tokenizer import Tokenizer, TokenizerConfig, load_tokenizer

MANY_CORES = 4  # on which the library, in one process, is faster than one core by words


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
        """The tokens of texts; a text that is an array of tokens already is taken as it is.

        Each gets its end-of-document token here, so that arrays come without.
        """
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


def chunk_encoder(config: TokenizerConfig, saved: Path, dtype: str, alone: bool) -> Callable[[list[tuple]], Encoded]:
    """What gives the tokens of a chunk of items, for `data.processes.in_order`. saved: the tokenizer's file."""
    encoder = Encoder(load_tokenizer(config, saved), dtype, alone=alone)
    return lambda chunk: encoder.encode([item.text for item, _ in chunk if isinstance(item, Document)])
