"""A token table that is not trained: rows are looked up where they lie, and the table is gathered nowhere for them."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from model.forms import Form
from model.heads import Embedding
from model.projection import param
from model.specs import Specs
from parallel.sharding import in_pipeline, shard


@dataclass(frozen=True)
class Frozen:
    """The form of a token table without a gradient."""

    base: Form | None = None  # how it is kept; None: as floats

    def specs(self, specs: Specs) -> Specs:
        """The parameters of the base."""
        return specs if self.base is None else self.base.specs(specs)

    def module(self, part: Embedding, specs: Specs) -> nnx.Module:
        """The table with another way of looking rows up."""
        return FrozenTable(part, specs)


class FrozenTable(Embedding):
    """An Embedding that exchanges tokens and not rows.

    Its rows are split over fsdp by their width, its tokens by sequence. A device looks up its part of the width for the
    sequences of all of fsdp, and these parts are exchanged: as many numbers as x_BTD has here, where gathering the
    table takes vocabulary x width of them. Trained tables are gathered: their gradient is summed where the tokens are.
    """

    def __init__(self, part: Embedding, specs: Specs):
        self.vocab_size, self.softcap, self.padded = part.vocab_size, part.softcap, part.padded
        self.weight = param(specs["weight"])

    def look_up(self, rows_BT: jax.Array, dtype) -> jax.Array:
        """These rows, x_BTD; for a row that is not there, some other."""
        if in_pipeline():  # stages exchange what their schedule says
            return super().look_up(rows_BT, dtype)
        rows_BT = shard(rows_BT, "sequences", "tokens")
        x_BTD = jnp.take(self.weight[...], rows_BT, axis=0, mode="clip")
        return shard(x_BTD, "sequences", "tokens", "stored_width").astype(dtype)
