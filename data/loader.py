"""Batches by number: `batch(step)` depends on nothing but the tokens, the seed and the step.

Resuming is therefore arithmetic, and hosts need not agree on anything: each reads its rows of the same global batch.
"""

from collections.abc import Iterator
from typing import Protocol

import numpy as np

from data.order import Order
from data.packing import Batch, Rows, rows_of
from data.token_files import Tokens


class Stream(Protocol):
    """Where the batches of a run come from: one corpus (`Loader`), several (`data.streams.Mixture`), or whatever gives
    each step its batch."""

    def batch(self, step: int, rows: slice | None = None) -> Batch:
        """The batch of a step, or some rows of it: a pure function of the run's seed and the step."""

    def epoch(self, step: int) -> float:
        """How often the data has been read before this step."""

    def metrics(self, step: int) -> dict[str, float]:
        """What is logged of the data read before this step, by the names of docs/metrics.md."""

    def told(self, steps: int) -> dict[str, str]:
        """What a run of so many steps says of its data before it begins."""


class Loader:
    """The rows of a corpus, shuffled without replacement in each epoch, each epoch anew; see data/order.py.

    eos_id: given where attention has to stay inside documents; batches then carry segments. packing: how documents
    become rows, see data/packing.py. Raises ValueError if the corpus is shorter than one row.
    """

    def __init__(
        self,
        tokens: Tokens,
        *,
        seq_len: int,
        batch_size: int,
        seed: int,
        eos_id: int | None = None,
        packing: str = "concatenate",
    ):
        _check_sizes(seq_len, batch_size)
        if seed < 0:
            raise ValueError(f"seed={seed}: must not be negative")
        advice = "give more text or set train.seq_len lower"
        self.rows = _rows(tokens, seq_len, eos_id, packing, "training", advice)
        self.packing, self.tokens = packing, tokens
        self._batch_size = batch_size
        self._order = Order(self.rows.borders, seed)

    @property
    def sequences_per_epoch(self) -> int:
        """Rows of the corpus, each read once an epoch."""
        return len(self.rows)

    def epoch(self, step: int) -> float:
        """Epochs completed before this step."""
        return step * self._batch_size / self.sequences_per_epoch

    def metrics(self, step: int) -> dict[str, float]:
        """What is logged of the data read before this step."""
        return {"epoch": self.epoch(step)}

    def told(self, steps: int) -> dict[str, str]:
        """What the header of a run says of its packing; nothing where rows are cut from one stream."""
        if self.packing == "concatenate":
            return {}
        return {"packing": f"{self.packing}, {len(self.rows):,} rows, {self.rows.fill:.1%} of their places hold tokens"}

    def batch(self, step: int, rows: slice | None = None) -> Batch:
        """The batch of a step, or some rows of it: tokens_BT, targets_BT int32, mask_BT float32, segments_BT int32.

        mask_BT is 1 where a target counts. There only if eos_id was given: segments_BT numbers the documents of a row
        from 1 (0: nothing), and the first token of a document is then not a target; places_BT int32 counts the tokens
        of a document in a row from 0, for positions that begin anew with each.
        """
        return self.samples(step * self._batch_size + np.arange(self._batch_size)[rows or slice(None)])

    def samples(self, numbers: np.ndarray) -> Batch:
        """As `batch`, of the sequences of these numbers (B,), as a run that reads this corpus alone counts them."""
        epochs, indices = np.divmod(numbers, self.sequences_per_epoch)
        return self.rows.read(self._order.at(indices, epochs))


class HeldoutBatches:
    """The same batches at every iteration: at most `limit` rows (None: all), spread evenly over the held-out corpus.

    The last batch is filled up with rows whose mask is 0. eos_id, packing and the keys: as of `Loader`. rows: those of
    each batch that are wanted. Raises ValueError if the corpus is shorter than one row.
    """

    def __init__(
        self,
        tokens: Tokens,
        seq_len: int,
        batch_size: int,
        limit: int | None = None,
        rows: slice | None = None,
        eos_id: int | None = None,
        packing: str = "concatenate",
    ):
        _check_sizes(seq_len, batch_size)
        advice = "set data.heldout higher or train.seq_len lower"
        self.rows = _rows(tokens, seq_len, eos_id, packing, "held-out", advice)
        count = len(self.rows) if limit is None else min(limit, len(self.rows))
        if count < 1:
            raise ValueError(f"evaluation on {limit} sequences: needs at least 1")
        self._chosen = np.arange(count) * len(self.rows) // count
        self._places = np.arange(batch_size)[rows or slice(None)]
        self._batch_size = batch_size

    def __iter__(self) -> Iterator[Batch]:
        count = len(self._chosen)
        for first in range(0, count, self._batch_size):
            places = first + self._places
            batch = self.rows.read(self._chosen[np.minimum(places, count - 1)])
            batch["mask_BT"] *= (places < count)[:, None]
            yield batch


def _check_sizes(seq_len: int, batch_size: int) -> None:
    if seq_len < 1 or batch_size < 1:
        raise ValueError(f"train.seq_len={seq_len}, train.batch_size={batch_size}: both must be at least 1")


def _rows(tokens: Tokens, seq_len: int, eos_id: int | None, packing: str, split: str, advice: str) -> Rows:
    rows = rows_of(tokens, seq_len, eos_id, packing)
    if not len(rows):
        raise ValueError(
            f"the {split} stream has {len(tokens):,} tokens and one window needs train.seq_len + 1 = {seq_len + 1:,}: "
            f"{advice}"
        )
    return rows
