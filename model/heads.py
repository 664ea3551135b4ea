"""Between tokens and vectors: the embedding table and the output head, which may be the same table."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from model.config import ModelConfig
from model.matmul import score
from model.projection import param
from model.specs import Specs
from parallel.sharding import cast_and_gather, first_row, shard, splits, sum_over_stages

NO_TOKEN = -1e30  # logit of the padding rows


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class VocabularyRows:
    """Rows of a table, and the tokens that they stand for."""

    table_VD: jax.Array
    token_V: jax.Array
    bias_V: jax.Array | None = None  # added to their logits


class Embedding(nnx.Module):
    """A row of width D for each token, padded so that hardware and mesh divide them; padding is zero and stays so."""

    def __init__(self, config: ModelConfig, specs: Specs):
        self.vocab_size, self.softcap = config.vocab_size, config.logit_softcap
        self.padded = specs["weight"].shape[0] > config.vocab_size
        self.weight = param(specs["weight"])

    def table(self, dtype) -> jax.Array:
        """The rows in `dtype`, (V, D), padding included; inside a pipeline those of this stage."""
        return cast_and_gather(self.weight, dtype)

    def look_up(self, rows_BT: jax.Array, dtype) -> jax.Array:
        """These rows, x_BTD; for a row that is not there, some other."""
        # pinned also for the backward pass: the table's gradient is summed where the tokens are, then scattered
        return jnp.take(shard(self.table(dtype), "vocab", "width"), rows_BT, axis=0, mode="clip")

    def embed(self, tokens_BT: jax.Array, dtype) -> jax.Array:
        """The rows of tokens, x_BTD; inside a pipeline each stage looks up its own, and all have the sum."""
        rows = self.weight.shape[0]
        rows_BT = tokens_BT - first_row(rows)
        here_BT = (rows_BT >= 0) & (rows_BT < rows)
        x_BTD = jnp.where(here_BT[..., None], self.look_up(rows_BT, dtype), 0)
        return shard(sum_over_stages(x_BTD), "batch", "residual", "width")

    def rows(self, dtype, bias: nnx.Param | None = None) -> VocabularyRows:
        """All rows, with the bias of their logits if there is one; inside a pipeline those of this stage."""
        table_VD = self.table(dtype)
        rows = table_VD.shape[0]
        bias_V = None if bias is None else cast_and_gather(bias, jnp.float32)
        return VocabularyRows(table_VD, first_row(rows) + jnp.arange(rows, dtype=jnp.int32), bias_V)

    def cut(self, parts: int, dtype, bias: nnx.Param | None = None) -> VocabularyRows:
        """All rows in at least so many parts of one size, with a first dim for the parts.

        Part i has the rows i, i + n, i + 2n ...: a strided cut stays local where the table is sharded.
        """
        rows = self.rows(dtype, bias)
        V, local = len(rows.token_V), len(rows.token_V) // splits("vocab")
        n = next(n for n in range(min(parts, local), local + 1) if local % n == 0)
        return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(V // n, n, *x.shape[1:]), 1, 0), rows)

    def logits(self, x_BTD: jax.Array, rows: VocabularyRows) -> jax.Array:
        """Float32 logits_BTV of these rows; those of padding, which no softmax sees, are -1e30."""
        logits_BTV = shard(score(x_BTD, rows.table_VD), "batch", "tokens", "vocab")
        if rows.bias_V is not None:
            logits_BTV = logits_BTV + rows.bias_V
        if self.softcap:
            logits_BTV = self.softcap * jnp.tanh(logits_BTV / self.softcap)
        return jnp.where(rows.token_V >= self.vocab_size, NO_TOKEN, logits_BTV) if self.padded else logits_BTV


def vocabulary_parts(chunk: int, T: int) -> int:
    """Into how many parts the vocabulary is cut at least, so that a device has logits as `chunk` tokens have at a time.

    Where the mesh in context splits tokens or vocabulary, a device has fewer from the start. `chunk` 0: one part.
    """
    return -(-T // (chunk * splits("tokens") * splits("vocab"))) if chunk else 1
