"""Which blocks of the cache hold what: given out, shared between sequences that begin alike, taken back. No JAX here.

A block that is full never changes again, and has a name: the digest of all tokens up to its end. Sequences that begin
with these tokens read the same block. Only full blocks are shared, so nobody writes where another one reads and
nothing is ever copied; a sequence computes what follows its last full shared block itself. A block that nobody holds
any more keeps its name until its place is needed, the one that was longest not used first.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

import numpy as np


class Blocks:
    """The books of `count` blocks of `size` tokens each."""

    def __init__(self, count: int, size: int, sharing: bool = True):
        self.count, self.size, self.sharing = count, size, sharing
        self._held = [0] * count  # by so many sequences
        self._free = list(range(count))[::-1]  # that hold nothing
        self._idle: OrderedDict[int, None] = OrderedDict()  # held by none, but named; the next to be reused first
        self._by_name: dict[bytes, int] = {}
        self._names: dict[int, bytes] = {}

    @property
    def available(self) -> int:
        """Blocks that can be taken."""
        return len(self._free) + len(self._idle)

    @property
    def cached(self) -> int:
        """Available blocks that still hold a prefix."""
        return len(self._idle)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that so many tokens need."""
        return -(-tokens // self.size)

    def names(self, tokens: Sequence[int], known: Sequence[bytes] = (), salt: bytes = b"") -> list[bytes]:
        """The digest of the tokens up to the end of each full block; `known` are the first of them.

        With another `salt` all names differ: keys and values of the same tokens do where another adapter made them.
        """
        names = list(known)
        for start, end in pairwise(range(len(names) * self.size, len(tokens) + 1, self.size)):
            before = names[-1] if names else salt
            part = np.asarray(tokens[start:end], "<i4").tobytes()
            names.append(hashlib.blake2b(before + part, digest_size=16).digest())
        return names

    def find(self, names: Sequence[bytes]) -> list[int]:
        """The blocks of the first of these names, as far as they are there."""
        found = []
        for name in names if self.sharing else ():
            if (block := self._by_name.get(name)) is None:
                break
            found.append(block)
        return found

    def hold(self, blocks: Sequence[int]) -> None:
        """One holder more for each of the blocks."""
        for block in blocks:
            if not self._held[block]:
                del self._idle[block]
            self._held[block] += 1

    def take(self, count: int) -> list[int] | None:
        """So many blocks to write to, or None where there are not so many."""
        if count > self.available:
            return None
        taken = []
        for _ in range(count):
            if self._free:
                block = self._free.pop()
            else:
                block, _ = self._idle.popitem(last=False)
                del self._by_name[self._names.pop(block)]
            self._held[block] = 1
            taken.append(block)
        return taken

    def name(self, block: int, name: bytes) -> None:
        """Says what a full block holds, so that others find it; one of that name may be there already."""
        if self.sharing and name not in self._by_name and block not in self._names:
            self._by_name[name], self._names[block] = block, name

    def release(self, blocks: Sequence[int]) -> None:
        """One holder less for each of a sequence's blocks. Its end is reused before its beginning."""
        for block in reversed(blocks):
            self._held[block] -= 1
            assert self._held[block] >= 0, f"block {block} was not held"
            if self._held[block]:
                continue
            if block in self._names:
                self._idle[block] = None
            else:
                self._free.append(block)

    def forget(self) -> None:
        """Drops all names, as when what the blocks held is lost."""
        self._free += self._idle
        self._idle.clear()
        self._by_name.clear()
        self._names.clear()
