"""Log-likelihoods of tokens, batched by length over the mesh: what perplexity and the harness both ask for."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from evaluation.shapes import Costs, Limits, Shape, choose_shapes
from model.counts import parameter_count
from model.transformer import Description
from parallel.sharding import local_rows, put_batch, replicated, shard, splits
from training.config import TrainConfig
from training.loss import token_losses
from training.step import hidden, in_context_order, in_float32_matmuls

BATCH_TOKENS = {"cpu": 1024}  # of a batch on one device
ACCELERATOR_BATCH_TOKENS = 32768
LOGITS = 1 << 26  # of a device that exist at once
# what decides whether another shape is worth its compilation; only a guess is needed
COMPILE_SECONDS = 1.5
FLOPS_PER_SECOND = {"cpu": 5e10}
ACCELERATOR_FLOPS_PER_SECOND = 1e14

Progress = Callable[[int, int], None]  # rows done, rows in all


@dataclass(frozen=True)
class Row:
    """A sequence to read, and which tokens may follow where in it."""

    tokens_T: np.ndarray  # int32
    places_C: np.ndarray  # int32: indices into tokens_T; the same one may be there several times
    targets_C: np.ndarray  # int32: the token asked for after each place


@dataclass(frozen=True)
class Scores:
    """What the model says of one row's C targets, in the row's order."""

    nll_C: np.ndarray  # float32, nats
    correct_C: np.ndarray  # bool: no token is likelier


class Scorer:
    """Scores rows with one model. Use it inside `jax.set_mesh(mesh)`; all processes of the mesh make the same calls.

    `params` may be replaced by others of the same model, as while it trains.
    """

    def __init__(self, description: Description, params: dict, mesh: Mesh, dtype):
        """Raises ValueError for an encoder."""
        config = description.config
        if not config.causal:
            raise ValueError("model.causal=false: an encoder gives no probability of the next token")
        self.description, self.params, self.mesh, self.dtype = description, params, mesh, jnp.dtype(dtype)
        self._train = TrainConfig(compute_dtype=self.dtype.name)
        self._step = jax.jit(
            partial(_score, description, self._train), static_argnames="chunk", out_shardings=replicated(mesh)
        )
        platform = mesh.devices.flat[0].platform
        ring = 2 if description.context_style == "ring" and splits("tokens") > 1 else 1
        limit = config.max_positions if config.positions == "learned" else 1 << 30
        batch = BATCH_TOKENS.get(platform, ACCELERATOR_BATCH_TOKENS) * splits("batch") * splits("tokens")
        self.limits = Limits(int(np.lcm(splits("residual"), ring * splits("tokens"))), splits("batch"), batch, limit)
        count, table = parameter_count(config), config.vocab_size * config.width
        layers = max(1, count.active - count.embedding - count.head)
        speed = FLOPS_PER_SECOND.get(platform, ACCELERATOR_FLOPS_PER_SECOND) * mesh.size
        self.costs = Costs(table / layers, COMPILE_SECONDS * speed / (2 * layers))

    def scores(
        self,
        lengths: np.ndarray,
        places: np.ndarray,
        row: Callable[[int], Row],
        progress: Progress = lambda done, total: None,
    ) -> Iterator[tuple[int, Row, Scores]]:
        """The number of each row, the row and its scores, batch by batch, longest last.

        lengths, places: how many tokens and places each row has. row: makes one by its number, when its turn comes.
        """
        pending, done = None, 0
        for shape, members in choose_shapes(np.asarray(lengths), np.asarray(places), self.limits, self.costs):
            for batch in shape.batches(members):
                rows = [row(int(number)) for number in batch]
                running = batch, rows, self._start(shape, rows)
                if pending is not None:  # while the next batch runs
                    yield from _finished(*pending)
                pending, done = running, done + len(batch)
                progress(done, len(lengths))
        if pending is not None:
            yield from _finished(*pending)

    def scores_of(self, rows: list[Row], progress: Progress = lambda done, total: None) -> list[Scores]:
        """The scores of these rows, in their order."""
        lengths, places = [len(row.tokens_T) for row in rows], [len(row.places_C) for row in rows]
        scored = self.scores(np.array(lengths), np.array(places), rows.__getitem__, progress)
        found = {number: scores for number, _, scores in scored}
        return [found[number] for number in range(len(rows))]

    def _start(self, shape: Shape, rows: list[Row]) -> tuple[jax.Array, jax.Array]:
        """Hands a batch to the devices; what is beyond a row, or beyond the rows, is padding that nobody reads."""
        C = -(-shape.places // splits("tokens")) * splits("tokens")
        tokens_BT = np.zeros((shape.rows, shape.tokens), np.int32)
        places_BC, targets_BC = np.zeros((shape.rows, C), np.int32), np.zeros((shape.rows, C), np.int32)
        for number, row in enumerate(rows):
            tokens_BT[number, : len(row.tokens_T)] = row.tokens_T
            places_BC[number, : len(row.places_C)] = row.places_C
            targets_BC[number, : len(row.places_C)] = row.targets_C
        batch = {"tokens_BT": tokens_BT, "places_BC": places_BC, "targets_BC": targets_BC}
        chunk = max(1, LOGITS // (shape.rows // splits("batch") * self.description.config.vocab_size))
        arrays = put_batch(self.mesh, {name: self._local(x) for name, x in batch.items()}, shape.rows)
        return self._step(self.params, arrays, chunk=chunk)

    def _local(self, x: np.ndarray) -> np.ndarray:
        """The rows of this process."""
        return x[local_rows(self.mesh, len(x))]


def _score(description: Description, config: TrainConfig, params: dict, batch: dict, *, chunk: int):
    """nll_BC and correct_BC of a batch's targets."""

    def score(params, batch):
        moved = in_context_order(description, {"tokens_BT": batch["tokens_BT"]})
        model, x_BTD, _ = hidden(description, config, params, moved)
        places_BC = batch["places_BC"]
        if "positions_BT" in moved:
            places_BC = jnp.take(jnp.argsort(moved["positions_BT"][0]), places_BC)
        x_BCD = jnp.take_along_axis(shard(x_BTD, "batch", "tokens", "width"), places_BC[..., None], axis=1)
        losses = token_losses(model, shard(x_BCD, "batch", "tokens", "width"), batch["targets_BC"], chunk)
        return losses.nll_BT, losses.correct_BT

    return in_float32_matmuls(score, config)(params, batch)


def _finished(numbers: np.ndarray, rows: list[Row], arrays: tuple) -> Iterator[tuple[int, Row, Scores]]:
    nll_BC, correct_BC = map(np.asarray, arrays)
    for number, row, nll_C, correct_C in zip(numbers, rows, nll_BC, correct_BC, strict=False):
        count = len(row.places_C)
        yield int(number), row, Scores(nll_C[:count], correct_C[:count])
