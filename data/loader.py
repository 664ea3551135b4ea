"""Batches by number: `batch(step)` depends on nothing but the tokens, the seed and the step.

Resuming is therefore arithmetic, and hosts need not agree on anything: each reads its rows of the same global batch.
"""

from collections.abc import Iterator
from typing import Protocol

import numpy as np

from data.token_files import Tokens

ROUNDS = 8  # of the index cipher; 4 are enough in theory (Luby and Rackoff 1988) with ideal round functions
SMALLEST_BITS = 6  # with fewer the orders of a tiny stream are not equally likely


class Stream(Protocol):
    """Where the batches of a run come from: one corpus (`Loader`), or whatever gives each step its batch."""

    def batch(self, step: int, rows: slice | None = None) -> dict[str, np.ndarray]:
        """The batch of a step, or some rows of it: a pure function of the run's seed and the step."""

    def epoch(self, step: int) -> float:
        """How often the data has been read before this step."""


class Loader:
    """Windows [i T, i T + T + 1) of a token stream, shuffled without replacement in each epoch, each epoch anew.

    eos_id: given where attention has to stay inside documents; batches then
    carry segments. Raises ValueError if the stream is shorter than one window.
    """

    def __init__(self, tokens: Tokens, *, seq_len: int, batch_size: int, seed: int, eos_id: int | None = None):
        _check_sizes(seq_len, batch_size)
        if seed < 0:
            raise ValueError(f"seed={seed}: must not be negative")
        self._windows = _Windows(tokens, seq_len, "training", "give more text or set train.seq_len lower")
        self._batch_size = batch_size
        self._seed = seed
        self._eos_id = eos_id

    @property
    def sequences_per_epoch(self) -> int:
        """Windows in the stream, each read once an epoch."""
        return len(self._windows)

    def epoch(self, step: int) -> float:
        """Epochs completed before this step."""
        return step * self._batch_size / self.sequences_per_epoch

    def batch(self, step: int, rows: slice | None = None) -> dict[str, np.ndarray]:
        """The batch of a step, or some rows of it: tokens_BT, targets_BT int32, mask_BT float32, segments_BT int32.

        mask_BT is 1 where a target counts. There only if eos_id was given: segments_BT numbers the documents of a row
        from 1, and the first token of a document is then not a target; places_BT int32 counts the tokens of a document
        in a row from 0, for positions that begin anew with each.
        """
        samples = step * self._batch_size + np.arange(self._batch_size)[rows or slice(None)]
        epochs, indices = np.divmod(samples, self.sequences_per_epoch)
        return _batch(self._windows[shuffled(indices, self.sequences_per_epoch, self._seed, epochs)], self._eos_id)


def heldout_batches(
    tokens: Tokens,
    seq_len: int,
    batch_size: int,
    limit: int | None = None,
    rows: slice | None = None,
    eos_id: int | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """The same batches at every call: at most `limit` windows (None: all), spread evenly over the held-out stream.

    The last batch is filled up with rows whose mask is 0. rows, eos_id and the keys: as of `Loader`.
    Raises ValueError if the stream is shorter than one window.
    """
    _check_sizes(seq_len, batch_size)
    windows = _Windows(tokens, seq_len, "held-out", "set data.heldout higher or train.seq_len lower")
    count = len(windows) if limit is None else min(limit, len(windows))
    if count < 1:
        raise ValueError(f"evaluation on {limit} sequences: needs at least 1")
    chosen = np.arange(count) * len(windows) // count

    def batch(first: int) -> dict[str, np.ndarray]:
        places = np.arange(first, first + batch_size)[rows or slice(None)]
        result = _batch(windows[chosen[np.minimum(places, count - 1)]], eos_id)
        result["mask_BT"] *= (places < count)[:, None]
        return result

    return (batch(first) for first in range(0, count, batch_size))


def _check_sizes(seq_len: int, batch_size: int) -> None:
    if seq_len < 1 or batch_size < 1:
        raise ValueError(f"train.seq_len={seq_len}, train.batch_size={batch_size}: both must be at least 1")


class _Windows:
    """Every window as a row of T + 1 tokens; neighbours share one, first a target and then an input."""

    def __init__(self, tokens: Tokens, seq_len: int, split: str, advice: str):
        if len(tokens) < seq_len + 1:
            raise ValueError(
                f"the {split} stream has {len(tokens):,} tokens and one window needs train.seq_len + 1 = "
                f"{seq_len + 1:,}: {advice}"
            )
        self._tokens, self._seq_len = tokens, seq_len

    def __len__(self) -> int:
        return (len(self._tokens) - 1) // self._seq_len

    def __getitem__(self, numbers: np.ndarray) -> np.ndarray:
        return self._tokens.read(numbers * self._seq_len, self._seq_len + 1)


def _batch(windows: np.ndarray, eos_id: int | None) -> dict[str, np.ndarray]:
    windows = windows.astype(np.int32)
    tokens, targets = np.ascontiguousarray(windows[:, :-1]), np.ascontiguousarray(windows[:, 1:])
    if eos_id is None:
        return {"tokens_BT": tokens, "targets_BT": targets, "mask_BT": np.ones(tokens.shape, np.float32)}
    ends = tokens == eos_id
    at_T = np.arange(tokens.shape[1], dtype=np.int32)
    begins_BT = np.where(np.roll(ends, 1, axis=1), at_T, 0)  # 0, too, where a document goes on; and at 0 all begin
    return {
        "tokens_BT": tokens,
        "targets_BT": targets,
        "mask_BT": (~ends).astype(np.float32),
        "segments_BT": 1 + np.cumsum(ends, axis=1, dtype=np.int32) - ends,  # an end belongs to what it ends
        "places_BT": at_T - np.maximum.accumulate(begins_BT, axis=1),
    }


def shuffled(indices: np.ndarray, n: int, seed: int, epochs: np.ndarray) -> np.ndarray:
    """Where each index of [0, n) goes in the order of its epoch: a bijection, without a table of n entries.

    A Feistel network over the next power of two; what falls outside [0, n) is enciphered again until it falls inside
    ("cycle walking": Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002).
    """
    unique, which = np.unique(epochs, return_inverse=True)
    keys = np.stack([np.random.SeedSequence((seed, int(e))).generate_state(ROUNDS, np.uint64) for e in unique])
    keys = keys[which].T
    bits = max(int(n - 1).bit_length(), SMALLEST_BITS)
    result = _encipher(np.asarray(indices, np.uint64), keys, bits)
    while (outside := result >= n).any():
        result[outside] = _encipher(result[outside], keys[:, outside], bits)
    return result.astype(np.int64)


def _encipher(words: np.ndarray, keys: np.ndarray, bits: int) -> np.ndarray:
    """A bijection of [0, 2^bits): each half in turn is XORed with a hash of the other, which can be undone."""
    low_bits = np.uint64(bits // 2)
    low_mask = np.uint64((1 << (bits // 2)) - 1)
    high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
    low, high = words & low_mask, words >> low_bits
    for number, key in enumerate(keys):
        if number % 2:
            low = low ^ (_hash(high ^ key) & low_mask)
        else:
            high = high ^ (_hash(low ^ key) & high_mask)
    return high << low_bits | low


def _hash(words: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014)."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
