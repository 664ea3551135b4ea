"""The batches of a run as arrays on its mesh: each process reads the rows that its devices need."""

from collections.abc import Iterator

import jax
from jax.sharding import Mesh

from data.loader import Loader, Stream, heldout_batches
from data.shards import Dataset
from parallel.sharding import local_rows, put_batch


class Feed:
    """The batch of any step, the same on every mesh, and the held-out ones. Raises ValueError for texts too short."""

    def __init__(self, config, dataset: Dataset, mesh: Mesh):
        """`config` is the whole of a run's."""
        t, self.mesh = config.train, mesh
        self.batch_size, self.rows = t.batch_size, local_rows(mesh, t.batch_size)
        shape = {"seq_len": t.seq_len, "batch_size": t.batch_size}
        shape["eos_id"] = dataset.tokenizer.eos_id if config.data.segments else None
        self.stream: Stream = Loader(dataset.train, seed=config.seed, **shape)
        self._heldout = lambda: heldout_batches(
            dataset.heldout, limit=t.eval_batches * t.batch_size, rows=self.rows, **shape
        )
        if t.eval_every:
            self._heldout()  # a held-out text that is too short is told now

    def batch(self, step: int) -> dict[str, jax.Array]:
        """The global (B, T) arrays of a step."""
        return put_batch(self.mesh, self.stream.batch(step, self.rows), self.batch_size)

    def heldout(self) -> Iterator[dict[str, jax.Array]]:
        """The held-out batches, the same at every call."""
        return (put_batch(self.mesh, batch, self.batch_size) for batch in self._heldout())
