"""The batches of a run as arrays on its mesh: each process reads the rows that its devices need."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import jax
from jax.sharding import Mesh

from data.loader import Stream
from data.packing import BLOCK_TOKENS, Batch
from parallel.sharding import local_rows, put_batch
from training.config import TrainConfig

Arrays = dict[str, jax.Array]
LOOKS = 8  # ahead, in the time in which a shard is read


class Feed:
    """The batch of any step, the same on every mesh, and the held-out ones.

    A thread of its own makes the batch of the next step while the device has this one's. Another looks at a batch far
    ahead now and then, so that shards of a store are here before they are needed.
    """

    def __init__(self, config: TrainConfig, stream: Stream, heldout: Mapping[str, Iterable[Batch]], mesh: Mesh):
        """heldout: by the name of their source, the same batches at every iteration, of this process's rows."""
        t, self.mesh, self.stream, self._heldout = config, mesh, stream, heldout
        self.batch_size, self.steps, self.rows = t.batch_size, t.steps, local_rows(mesh, t.batch_size)
        self.told = stream.told(t.steps)  # what is told of the data before the run begins
        self._thread, self._scout = ThreadPoolExecutor(1, "feed"), ThreadPoolExecutor(1, "scout")
        self._far = max(1, BLOCK_TOKENS // (t.batch_size * t.seq_len))  # steps in which a shard is read
        self._looking: Future[None] | None = None
        self._ahead: dict[int, Future[Arrays]] = {}

    def batch(self, step: int) -> Arrays:
        """The global (B, T) arrays of a step."""
        made = self._ahead.pop(step, None) or self._thread.submit(self._make, step)
        if step + 1 < self.steps and step + 1 not in self._ahead:
            self._ahead = {step + 1: self._thread.submit(self._make, step + 1)}
        if step % max(1, self._far // LOOKS) == 0 and step + self._far < self.steps and self._idle():
            self._looking = self._scout.submit(self._look, step + self._far)
        return made.result()

    def _idle(self) -> bool:
        return self._looking is None or self._looking.done()

    def _look(self, step: int) -> None:
        with contextlib.suppress(Exception):  # it is told when the batch is needed
            self.stream.batch(step, self.rows)

    def _make(self, step: int) -> Arrays:
        return put_batch(self.mesh, self.stream.batch(step, self.rows), self.batch_size)

    def heldout(self) -> Iterator[tuple[str, Arrays]]:
        """The held-out batches, each with the name of its source; the same at every call."""
        for name, batches in self._heldout.items():
            for batch in batches:
                yield name, put_batch(self.mesh, batch, self.batch_size)
