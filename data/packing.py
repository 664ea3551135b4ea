"""How documents become rows of train.seq_len + 1 tokens: cut out of one long stream, or packed so that few are cut.

A row of T + 1 tokens gives T inputs and T targets, each the token after its input. Both ways are pure functions of the
corpus, so that a row's number says which tokens it holds, in every process and in every life of a run.
"""

import bisect
from typing import Protocol

import numpy as np

from data.token_files import Tokens

PACKINGS = ("concatenate", "best_fit")
BLOCK_TOKENS = 1 << 25  # about so many lie together in a block: a shard of a prepared corpus

Batch = dict[str, np.ndarray]


class Rows(Protocol):
    """The rows of a corpus by number.

    borders: the first row of each block of the corpus, and the number of rows.
    """

    borders: np.ndarray

    @property
    def fill(self) -> float:
        """Share of the rows' places that hold tokens of the corpus."""

    def __len__(self) -> int: ...

    def read(self, numbers: np.ndarray) -> Batch:
        """The rows of these numbers: tokens_BT, targets_BT int32, mask_BT float32, and where documents are kept apart
        segments_BT, places_BT int32; see `data.loader.Loader.batch`."""


def rows_of(tokens: Tokens, seq_len: int, eos_id: int | None, packing: str = "concatenate") -> Rows:
    """The rows of a corpus. eos_id: given where documents are kept apart, as best_fit always does."""
    if packing == "concatenate":
        return Concatenated(tokens, seq_len, eos_id)
    assert eos_id is not None, "best_fit keeps documents apart"
    return BestFit(tokens, seq_len, eos_id)


class Concatenated:
    """Windows [i T, i T + T + 1) of the stream of all documents. Neighbours share a token: first a target, then an
    input. What is left at the end and fills no window is not read."""

    fill = 1.0

    def __init__(self, tokens: Tokens, seq_len: int, eos_id: int | None):
        self.tokens, self.seq_len, self.eos_id = tokens, seq_len, eos_id
        rows = max(0, (len(tokens) - 1) // seq_len)
        self.borders = np.minimum(-(-blocks_of(tokens) // seq_len), rows)  # a row is of the block that it begins in

    def __len__(self) -> int:
        return int(self.borders[-1])

    def read(self, numbers: np.ndarray) -> Batch:
        """The rows of these numbers; see `Rows`."""
        windows = self.tokens.read(numbers * self.seq_len, self.seq_len + 1).astype(np.int32)
        tokens, targets = np.ascontiguousarray(windows[:, :-1]), np.ascontiguousarray(windows[:, 1:])
        if self.eos_id is None:
            return {"tokens_BT": tokens, "targets_BT": targets, "mask_BT": np.ones(tokens.shape, np.float32)}
        ends = tokens == self.eos_id
        at_T = np.arange(tokens.shape[1], dtype=np.int32)
        begins_BT = np.where(np.roll(ends, 1, axis=1), at_T, 0)  # 0, too, where a document goes on; and at 0 all begin
        return {
            "tokens_BT": tokens,
            "targets_BT": targets,
            "mask_BT": (~ends).astype(np.float32),
            "segments_BT": 1 + np.cumsum(ends, axis=1, dtype=np.int32) - ends,  # an end belongs to what it ends
            "places_BT": at_T - np.maximum.accumulate(begins_BT, axis=1),
        }


class BestFit:
    """Documents packed into as few rows as best-fit decreasing finds; each token of the corpus is in one row, once.

    A document longer than a row is cut into pieces of a row's length and a rest. Documents that lie far apart are not
    packed together, see BLOCK_TOKENS. Segments number the pieces of a row
    from 1; what is left of it is segment 0 and holds `eos_id`, and no target there counts. (Ding et al. 2024, "Fewer
    Truncations Improve Language Modeling", arXiv 2404.10830.)
    """

    def __init__(self, tokens: Tokens, seq_len: int, eos_id: int):
        self.tokens, self.size, self.eos_id = tokens, seq_len + 1, eos_id
        ends_N = tokens.ends_N
        documents = np.unique(np.searchsorted(ends_N, blocks_of(tokens), side="right"))  # before each block
        begins = np.concatenate([[0], ends_N])[documents]
        blocks = zip(begins, documents, documents[1:], strict=False)
        parts = [self._packed(int(begin), ends_N[first:last]) for begin, first, last in blocks]
        starts, lengths, pieces = zip(*parts, strict=True) if parts else ((), (), ())
        self._starts, self._lengths = (
            np.concatenate([[], *starts]).astype(np.int64),
            np.concatenate([[], *lengths]).astype(np.int32),
        )
        self._first = np.cumsum(np.concatenate([[0], *pieces]), dtype=np.int64)  # the first piece of each row
        self.borders = np.cumsum([0, *map(len, pieces)])

    def _packed(self, begin: int, ends_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A block's pieces, row by row and in a row as in the corpus: where they begin, how long they are, and how many
        each row has."""
        starts, lengths = cut(begin, ends_N, self.size)
        row_of_piece, rows = best_fit(lengths, self.size)
        order = np.argsort(row_of_piece, kind="stable")
        return starts[order], lengths[order], np.bincount(row_of_piece, minlength=rows)

    def __len__(self) -> int:
        return len(self._first) - 1

    @property
    def fill(self) -> float:
        """Share of the rows' places that hold tokens of the corpus."""
        return len(self.tokens) / max(1, len(self) * self.size)

    def read(self, numbers: np.ndarray) -> Batch:
        """The rows of these numbers; see `Rows`."""
        pieces = self._first[numbers + 1] - self._first[numbers]
        before = np.cumsum(pieces) - pieces
        row = np.repeat(np.arange(len(numbers)), pieces)
        within = np.arange(len(row)) - before[row]  # the how-manieth of its row
        piece = self._first[numbers][row] + within
        lengths = self._lengths[piece].astype(np.int64)
        ahead = np.cumsum(lengths) - lengths  # tokens of all pieces before
        begin = row * self.size + ahead - ahead[before][row]  # where the piece begins in the rows laid end to end
        at = np.arange(lengths.sum())
        there = at + np.repeat(begin - ahead, lengths)

        def laid(values: np.ndarray, otherwise: int) -> np.ndarray:
            flat = np.full(len(numbers) * self.size, otherwise, np.int32)
            flat[there] = values
            return flat.reshape(len(numbers), self.size)

        windows = laid(self.tokens.read(at + np.repeat(self._starts[piece] - ahead, lengths), 1)[:, 0], self.eos_id)
        segments = laid(np.repeat(within + 1, lengths), 0)
        places = laid(at - np.repeat(ahead, lengths), 0)
        goes_on = (segments[:, :-1] == segments[:, 1:]) & (segments[:, 1:] > 0)
        batch = {"tokens_BT": windows[:, :-1], "targets_BT": windows[:, 1:], "mask_BT": goes_on.astype(np.float32)}
        batch |= {"segments_BT": segments[:, :-1], "places_BT": places[:, :-1]}
        return {name: np.ascontiguousarray(array) for name, array in batch.items()}


def blocks_of(tokens: Tokens) -> np.ndarray:
    """Where the blocks of a stream begin, and its end: each a part of it, or several that are small, or a piece of one
    that is large, so that none is far from BLOCK_TOKENS."""
    borders, end = [0], 0
    for part in tokens.parts:
        end += part.tokens
        begin, size = borders[-1], end - borders[-1]
        pieces = max(size // BLOCK_TOKENS, int(size >= BLOCK_TOKENS // 2))
        borders += [begin + size * piece // pieces for piece in range(1, pieces + 1)]
    return np.array([*(borders[:-1] or [0]), end], np.int64)  # what is left joins the last


def cut(begin: int, ends_N: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the pieces of documents begin in the stream, and their lengths: none is longer than `size` tokens.

    begin: where the first document does.
    """
    begins = np.concatenate([[begin], ends_N[:-1]]).astype(np.int64)
    lengths = ends_N - begins
    pieces = -(-lengths // size)
    document = np.repeat(np.arange(len(ends_N)), pieces)
    within = np.arange(len(document)) - (np.cumsum(pieces) - pieces)[document]
    starts = begins[document] + within * size
    return starts, np.minimum(size, ends_N[document] - starts)


def best_fit(lengths: np.ndarray, size: int) -> tuple[np.ndarray, int]:
    """The row of each piece, and the number of rows: from the longest piece to the shortest, each goes where it leaves
    the least room, and begins a row where it fits nowhere.

    lengths: integers in [1, size]. Rows with the same room left are one class, which pieces of one length fill at once:
    the work grows with the number of different lengths, not with that of pieces.
    """
    # numpy sorts 16 bits by radix, many times as fast
    order = np.argsort(-lengths.astype(np.int16 if size < 1 << 15 else np.int64), kind="stable")
    counts = np.bincount(lengths, minlength=size + 1)
    row_of_piece = np.empty(len(lengths), np.int32 if len(lengths) < 1 << 31 else np.int64)
    with_room: dict[int, list[np.ndarray]] = {}  # room left -> its rows
    rooms: list[int] = []  # the keys of with_room, sorted
    rows = taken = 0

    def put(room: int, some: np.ndarray) -> None:
        if room and len(some):
            if room not in with_room:
                bisect.insort(rooms, room)
            with_room.setdefault(room, []).append(some)

    for length in np.flatnonzero(counts)[::-1].tolist():
        pieces = order[taken : taken + counts[length]]
        taken += len(pieces)
        while len(pieces):
            at = bisect.bisect_left(rooms, length)
            if at < len(rooms):
                room = rooms.pop(at)
                parts = with_room.pop(room)
                open_rows = np.concatenate(parts) if len(parts) > 1 else parts[0]
            else:
                room = size
                open_rows = np.arange(rows, rows - (-len(pieces) // (size // length)))
                rows += len(open_rows)
            each = room // length  # pieces that such a row takes, one after another, before the next is looked at
            now = min(len(pieces), each * len(open_rows))
            full, rest = divmod(now, each)
            row_of_piece[pieces[:now]] = np.repeat(open_rows[: full + 1], each)[:now]
            pieces = pieces[now:]
            put(room - each * length, open_rows[:full])
            if rest:
                put(room - rest * length, open_rows[full : full + 1])
            put(room, open_rows[full + bool(rest) :])
    return row_of_piece, rows
