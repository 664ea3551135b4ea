"""The stream of batches of a run, from one corpus or a mixture of several, and the held-out batches of each."""

import numpy as np

from data.corpus import DataConfig
from data.loader import HeldoutBatches, Loader, Stream
from data.mixture import Plan
from data.opening import Corpora, naming
from data.packing import Batch


class Mixture:
    """Batches of several corpora, by a plan: `batch(step)` is as pure as that of each of them.

    A source's sequences come in the order in which a run would read it alone, whatever the others do.
    """

    def __init__(self, loaders: dict[str, Loader], plan: Plan):
        self.loaders, self.plan = loaders, plan

    def batch(self, step: int, rows: slice | None = None) -> Batch:
        """The batch of a step, or some rows of it; its keys: as of `Loader.batch`."""
        sources, numbers = (array[rows or slice(None)] for array in self.plan.batch(step))
        whole: Batch = {}
        for source in np.unique(sources):
            at = np.flatnonzero(sources == source)
            for key, part in self.loaders[self.plan.names[source]].samples(numbers[at]).items():
                whole.setdefault(key, np.empty((len(sources), *part.shape[1:]), part.dtype))[at] = part
        return whole

    def names(self, step: int) -> list[str]:
        """The source of each sequence of a step."""
        return [self.plan.names[source] for source in self.plan.batch(step)[0]]

    def epochs(self, step: int) -> dict[str, float]:
        """How often each source has been read before this step."""
        counts = self.plan.counts(min(step * self.plan.batch_size, self.plan.end))
        return {name: n / rows for name, n, rows in zip(self.plan.names, counts, self.plan.rows, strict=True)}

    def epoch(self, step: int) -> float:
        """Sequences before this step over those that all sources have."""
        return step * self.plan.batch_size / sum(self.plan.rows)

    def metrics(self, step: int) -> dict[str, float]:
        """What is logged of the data read before this step: epochs, of each source too, and its share of the
        sequences."""
        counts, total = self.plan.counts(step * self.plan.batch_size), max(1, step * self.plan.batch_size)
        shares = {f"data/share/{name}": n / total for name, n in zip(self.plan.names, counts, strict=True)}
        return {"epoch": self.epoch(step), **shares, **{f"data/epoch/{n}": e for n, e in self.epochs(step).items()}}

    def told(self, steps: int) -> dict[str, str]:
        """The shares of the sources, when they change and how often each is read; how full packed rows are.

        Raises ValueError where the caps leave less than so many steps.
        """
        plan, told, before = self.plan, {}, ""
        if steps * plan.batch_size > plan.end:
            raise ValueError(plan.too_short(steps))
        for stage in plan.stages:
            if stage.first < steps * plan.batch_size:
                shares = ", ".join(f"{n} {share:.2%}" for n, share in zip(plan.names, stage.shares, strict=True))
                ended = [n for n, cap, read in zip(plan.names, plan.caps, stage.before, strict=True) if read == cap]
                shares += f" ({' and '.join(ended)} read to the cap)" if ended else ""
                if shares != before:
                    told[f"mixture after step {stage.first // plan.batch_size}" if stage.first else "mixture"] = shares
                before = shares
        told["epochs by source"] = ", ".join(f"{name} {n:.2f}" for name, n in self.epochs(steps).items())
        for name, loader in self.loaders.items():
            told |= {f"{key} of {name}": text for key, text in loader.told(steps).items()}
        return told


def training_stream(data: DataConfig, corpora: Corpora, *, seq_len: int, batch_size: int, seed: int) -> Stream:
    """The batches of a run. Raises ValueError where a corpus is too short."""
    shape, loaders = {"seq_len": seq_len, "batch_size": batch_size}, {}
    for name, dataset in corpora.by_name.items():
        with naming(data, name):
            loaders[name] = Loader(dataset.train, seed=seed, **shape, **_how(data, corpora))
    if not data.mixture:
        return loaders[data.source]
    rows = {name: loader.sequences_per_epoch for name, loader in loaders.items()}
    sizes = {name: len(loader.tokens) for name, loader in loaders.items()}
    return Mixture(loaders, Plan(data.mixture, rows, sizes, temperature=data.temperature, **shape))


def heldout_batches(
    data: DataConfig, corpora: Corpora, *, seq_len: int, batch_size: int, batches: int, rows: slice | None = None
) -> dict[str, HeldoutBatches]:
    """The held-out batches of each corpus, `batches` in all at most, but at least one of each.

    rows: those of each batch that are wanted. Raises ValueError where a held-out corpus is too short.
    """
    limit, found = -(-batches // len(corpora.by_name)) * batch_size, {}
    for name, dataset in corpora.by_name.items():
        with naming(data, name):
            how = _how(data, corpora)
            found[name] = HeldoutBatches(dataset.heldout, seq_len, batch_size, limit, rows, **how)
    return found


def _how(data: DataConfig, corpora: Corpora) -> dict:
    """How documents become rows."""
    return {"eos_id": corpora.tokenizer.eos_id if data.segments else None, "packing": data.packing}
