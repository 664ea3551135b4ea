"""What a run learns: from which batches, by which loss, and how it is judged on what is held out.

Pretraining on text is the one of this room; tasks of finetune/ are others. train.py knows no more of either.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from data.loader import Stream
from data.opening import open_corpora
from data.packing import Batch
from data.prepared import Progress
from data.streams import heldout_batches, training_stream
from data.tokenizer import Tokenizer
from parallel.sharding import local_rows, replicated
from runtime.agreement import require_same
from training.feed import Arrays, Feed
from training.heldout import Evaluation, HeldOut
from training.job import Job
from training.step import Loss, cross_entropy


class Judge(Protocol):
    """How a model is judged while it trains."""

    watched: str  # the metric that picks the best checkpoint, by its logged name

    def evaluate(self, params: dict) -> Evaluation:
        """What it finds of parameters as they are trained."""


@dataclass(frozen=True, eq=False)
class Subject:
    """What a run learns: its data, its loss, and how it is judged; pretraining on text, or a labelled task."""

    config: Any  # the run's, with what only the data could tell
    tokenizer: Tokenizer
    feed: Feed
    digest: str  # of the data: a run goes on with the same only
    source: str  # where the data come from
    size: int  # of the training data
    unit: str  # what `size` counts
    loss: Loss
    judge: Callable[[Job, Arrays], Judge]  # of a job, with a batch like those that will be evaluated
    # before the first batch is asked for: of a job, what makes its first parameters, and the folder of the run
    begin: Callable[[Job, Callable[[], dict], Path], None] = lambda job, first, folder: None


Change = Callable[[Batch, int, np.ndarray], Batch]  # of a batch, by its number (below 0: held out) and its rows


@dataclass(frozen=True, eq=False)
class ChangedStream:
    """A stream whose batches are changed as they are read; what is told of it stays."""

    stream: Stream
    change: Change
    batch_size: int

    def batch(self, step: int, rows: slice | None = None) -> Batch:
        """The batch of a step, or some rows of it."""
        return self.change(self.stream.batch(step, rows), step, np.arange(self.batch_size)[rows or slice(None)])

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


@dataclass(frozen=True, eq=False)
class ChangedBatches:
    """Held-out batches, changed in the same way at every iteration."""

    batches: Iterable[Batch]
    change: Change
    rows_B: np.ndarray

    def __iter__(self) -> Iterator[Batch]:
        for number, batch in enumerate(self.batches):
            yield self.change(batch, -1 - number, self.rows_B)


def pretraining(
    config, mesh: Mesh, progress: Progress | None = None, change_for: Callable[[Tokenizer], Change] | None = None
) -> Subject:
    """The next token of text; `config` is the whole of a run's. `change_for` a tokenizer makes something else of it.

    Raises ValueError for a source that cannot be used.
    """
    corpora, t = open_corpora(config.data, config.tokenizer, progress), config.train
    require_same(corpora.told)
    shape, tokenizer = {"seq_len": t.seq_len, "batch_size": t.batch_size}, corpora.tokenizer
    stream, heldout = training_stream(config.data, corpora, seed=config.seed, **shape), {}
    if t.eval_every:  # a held-out text that is too short is told now
        shape |= {"batches": t.eval_batches, "rows": local_rows(mesh, t.batch_size)}
        heldout = heldout_batches(config.data, corpora, **shape)
    if change_for is not None:
        change, rows_B = change_for(tokenizer), np.arange(t.batch_size)[local_rows(mesh, t.batch_size)]
        stream = ChangedStream(stream, change, t.batch_size)
        heldout = {name: ChangedBatches(batches, change, rows_B) for name, batches in heldout.items()}
    feed = Feed(t, stream, heldout, mesh)

    def judge(job: Job, batch: Arrays) -> HeldOut:
        token_bytes_V = jax.device_put(tokenizer.token_bytes.astype(np.float32), replicated(mesh))
        return HeldOut(job.evaluate_ahead(batch, token_bytes_V), feed.heldout, token_bytes_V)

    told = config.data.source, corpora.training_tokens, f"tokens of {config.tokenizer.kind}"
    return Subject(config, tokenizer, feed, corpora.digest, *told, cross_entropy, judge)
