"""Examples as batches: `batch(step)` is a pure function of seed and step, as it is in pretraining."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from data.order import shuffled
from data.packing import Batch, best_fit
from finetune.table import LeftOut, Row
from finetune.task import Example


@dataclass(frozen=True, eq=False)
class Table:
    """The rows of one side of a task, and their examples."""

    rows: list[Row]
    examples: list[Example]
    left_out: LeftOut
    beside: dict[str, np.ndarray] = field(default_factory=dict)  # (examples, X) by name: added to what examples hold

    def first(self, examples: int) -> "Table":
        """The same with so many examples at most."""
        return replace(self, examples=self.examples[:examples])


def digest_of(examples: Sequence[Example]) -> str:
    """Tells these examples from others."""
    digest = hashlib.sha256()
    for example in examples:
        for name, array in sorted(example.arrays.items()):
            digest.update(f"{name} {array.dtype} {array.shape}\n".encode() + array.tobytes())
    return digest.hexdigest()[:32]


class Sequences:
    """The examples as rows of a batch: each alone, or several packed in one by best fit."""

    def __init__(self, table: Table, seq_len: int, *, packs: bool):
        examples = table.examples
        self.examples, self.seq_len, self._beside = examples, seq_len, table.beside
        lengths = np.array([len(example) for example in examples], np.int64)
        self.of_row = [[i] for i in range(len(examples))]
        if packs:
            row_of, rows = best_fit(lengths, seq_len)
            self.of_row = [[] for _ in range(rows)]
            for i, row in enumerate(row_of.tolist()):
                self.of_row[row].append(i)
        self.fill = float(lengths.sum() / max(1, len(self.of_row) * seq_len))

    def __len__(self) -> int:
        return len(self.of_row)

    def read(self, numbers: Sequence[int]) -> Batch:
        """These rows, padded: by the names of the examples' arrays with _T as _BT and _X as _BX."""
        groups = [[self.examples[i] for i in self.of_row[number]] for number in numbers]
        batch: Batch = {}
        for row, group in enumerate(groups):
            at = last = 0
            for example in group:
                arrays = example.arrays
                size = len(arrays["tokens_T"])
                segments = arrays.get("segments_T", np.ones(size, np.int32))
                segments = np.where(segments > 0, segments + last, 0)  # a row's examples do not see each other
                last = int(segments.max(initial=last))
                made = {"places_T": np.arange(size, dtype=np.int32), **arrays, "segments_T": segments}
                for name, value in made.items():
                    if name.endswith("_X"):
                        whole = batch.setdefault(f"{name[:-1]}BX", np.zeros((len(groups), len(value)), value.dtype))
                        whole[row] = value
                    else:
                        shape, kind = (len(groups), self.seq_len), np.float32 if name == "mask_T" else np.int32
                        whole = batch.setdefault(f"{name[:-1]}BT", np.zeros(shape, kind))
                        whole[row, at : at + size] = value
                at += size
        return batch | {name: array[numbers] for name, array in self._beside.items()}


class Shuffled:
    """A data.loader.Stream of sequences, shuffled anew in each epoch."""

    def __init__(self, sequences: Sequences, batch_size: int, seed: int):
        self.sequences, self._batch_size, self._seed = sequences, batch_size, seed

    def batch(self, step: int, rows: slice | None = None) -> Batch:
        """The batch of a step, or some rows of it."""
        numbers = step * self._batch_size + np.arange(self._batch_size)[rows or slice(None)]
        epochs, indices = np.divmod(numbers, len(self.sequences))
        return self.sequences.read(shuffled(indices, len(self.sequences), self._seed, epochs).tolist())

    def epoch(self, step: int) -> float:
        """How often the examples have been read before this step."""
        return step * self._batch_size / len(self.sequences)

    def metrics(self, step: int) -> dict[str, float]:
        """What is logged of the data read before this step."""
        return {"epoch": self.epoch(step)}

    def told(self, steps: int) -> dict[str, str]:
        """How full sequences are."""
        return {"sequences": f"{len(self.sequences):,}, {self.sequences.fill:.1%} of their places hold tokens"}


class InOrder:
    """Held-out examples in their order, each alone, so many `examples` in a batch; what fills one up does not count."""

    def __init__(self, table: Table, seq_len: int, batch_size: int, examples: int):
        self._sequences = Sequences(table, seq_len, packs=False)
        self._batch_size, self._examples = batch_size, examples

    def __iter__(self) -> Iterator[Batch]:
        count = len(self._sequences)
        for first in range(0, count, self._examples):
            last = min(first + self._examples, count) - 1
            places = first + np.arange(self._batch_size)
            batch = self._sequences.read(np.minimum(places, last).tolist())
            batch["mask_BT"] *= (places <= last)[:, None]
            yield batch
