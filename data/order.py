"""The order in which a corpus is read: shuffled in each epoch, each epoch anew, without a table of all rows.

A corpus of fewer than 2 WINDOW blocks (two billion tokens) is shuffled as a whole. Of a larger one the blocks, which
are its shards, are shuffled, and the rows of WINDOW of them at a time: a machine that has room for that many shards of
a store fetches each once an epoch.
"""

import numpy as np

ROUNDS = 8  # of the index cipher; 4 are enough in theory (Luby and Rackoff 1988) with ideal round functions
SMALLEST_BITS = 6  # with fewer the orders of a tiny stream are not equally likely
WINDOW = 32  # blocks
INSIDE = 1 << 64  # added to the seed, which is below it, for the order of the rows of a window


class Order:
    """The order of the rows of a corpus. borders: the first row of each block, and the number of rows."""

    def __init__(self, borders: np.ndarray, seed: int):
        self.rows, self.seed = int(borders[-1]), seed
        self._borders = np.asarray(borders, np.int64)
        self._blocks = len(borders) - 1
        self._windows = max(1, self._blocks // WINDOW)  # the last one takes what is left, too
        self._known: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def at(self, indices: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """The row, (n,), that comes at each of these indices (n,), from 0, of their epochs (n,)."""
        if self._windows == 1:
            return shuffled(indices, self.rows, self.seed, epochs)
        found = np.empty(len(indices), np.int64)
        for epoch in np.unique(epochs).tolist():
            inside = np.flatnonzero(epochs == epoch)
            found[inside] = self._of_epoch(np.asarray(indices)[inside], epoch)
        return found

    def _of_epoch(self, indices: np.ndarray, epoch: int) -> np.ndarray:
        blocks, starts = self._shuffled_blocks(epoch)
        firsts = starts[: self._windows * WINDOW : WINDOW]
        ends = np.append(firsts[1:], self.rows)
        window = np.searchsorted(firsts, indices, side="right") - 1
        place = np.empty(len(indices), np.int64)
        for one in np.unique(window).tolist():
            at = np.flatnonzero(window == one)
            numbers = np.full(len(at), epoch * self._windows + one)
            count = int(ends[one] - firsts[one])
            place[at] = firsts[one] + shuffled(indices[at] - firsts[one], count, self.seed + INSIDE, numbers)
        block = np.searchsorted(starts, place, side="right") - 1
        return self._borders[blocks[block]] + place - starts[block]

    def _shuffled_blocks(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The blocks in the order of an epoch, and how many rows come before each: pure, and kept for the next call."""
        if epoch not in self._known:
            blocks = shuffled(np.arange(self._blocks), self._blocks, self.seed, np.full(self._blocks, epoch))
            sizes = np.diff(self._borders)[blocks]
            self._known = {epoch: (blocks, np.cumsum(sizes) - sizes)}
        return self._known[epoch]


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
