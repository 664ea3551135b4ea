"""Cross-entropy: equal to a plain one in numpy, and the same in chunks."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.heads import NO_TOKEN, VocabularyRows
from training.loss import LossSums, PartialSoftmax, chunked_losses

B, T, D, V = 3, 12, 5, 24
PADDING = 2  # rows of the table that are no token


@dataclass
class Head:
    """A table as the loss sees one."""

    table_VD: jax.Array

    def vocabulary(self, parts, dtype):
        n = next(n for n in range(parts, V + 1) if V % n == 0)
        rows = VocabularyRows(self.table_VD.astype(dtype), jnp.arange(V))
        return jax.tree.map(lambda x: x.reshape(n, V // n, *x.shape[1:]), rows)

    def logits(self, x_BTD, rows):
        logits_BTV = jnp.einsum("BTD,VD->BTV", x_BTD, rows.table_VD)
        return jnp.where(rows.token_V >= V - PADDING, NO_TOKEN, logits_BTV)


@pytest.fixture(scope="module")
def inputs():
    random = np.random.default_rng(0)
    x = random.normal(size=(B, T, D)).astype(np.float32)
    table = random.normal(size=(V, D)).astype(np.float32)
    targets = random.integers(0, V - PADDING, (B, T)).astype(np.int32)
    mask = (random.random((B, T)) < 0.7).astype(np.float32)
    return x, table, targets, mask


def losses(x, table, targets, mask, chunk):
    return chunked_losses(Head(jnp.asarray(table)), jnp.asarray(x), targets, mask, chunk)


@pytest.mark.parametrize("chunk", [0, 1, 4])
def test_equals_numpy(inputs, chunk):
    x, table, targets, mask = inputs
    logits = np.einsum("BTD,VD->BTV", x, table[:-PADDING]).astype(np.float64)
    log_z = np.log(np.exp(logits).sum(-1))
    nll = log_z - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    sums = losses(*inputs, chunk)
    np.testing.assert_allclose(sums.nll, (nll * mask).sum(), rtol=1e-6)
    np.testing.assert_allclose(sums.z, (log_z**2 * mask).sum(), rtol=1e-6)
    assert sums.correct == ((logits.argmax(-1) == targets) * mask).sum()


@pytest.mark.parametrize("chunk", [1, 4, 5, 6, 12, 100])
def test_chunks_change_nothing(inputs, chunk):
    x, table, targets, mask = inputs
    total = lambda x, table, chunk: (s := losses(x, table, targets, mask, chunk)).nll + 0.1 * s.z
    whole, cut = (jax.value_and_grad(total, argnums=(0, 1))(x, table, c) for c in (0, chunk))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6), whole, cut)


def test_a_chunk_is_all_the_logits_that_exist(inputs):
    """Neither pass of the chunked loss holds an array with the logits of all tokens."""
    x, table, targets, mask = inputs
    gradient = jax.grad(lambda x, chunk: losses(x, table, targets, mask, chunk).nll)
    text = lambda chunk: jax.jit(gradient, static_argnums=1).lower(x, chunk).as_text()
    assert f"tensor<{B}x{T}x{V}xf32>" in text(0)
    assert f"tensor<{B}x{T}x{V}xf32>" not in text(4)


def test_masked_tokens_do_not_count(inputs):
    x, table, targets, mask = inputs
    other = np.where(mask > 0, targets, (targets + 1) % (V - PADDING))
    assert losses(x, table, targets, mask, 4) == losses(x, table, other, mask, 4)


def test_large_logits_stay_finite():
    """Also where the largest comes last, and where the first rows are padding alone."""
    part = lambda token, logit: PartialSoftmax.of(jnp.array([[[logit]]]), jnp.array([token]), jnp.array([[2]]))
    parts = [part(token, logit) for token, logit in enumerate([NO_TOKEN, -1e4, 0.0, 1e4])]
    sums = sum(parts[1:], parts[0]).losses().sums(jnp.ones((1, 1)))
    np.testing.assert_allclose(sums.nll, 1e4)
    assert sums.correct == 0


def test_sums_add_up():
    one = LossSums(jnp.float32(1), jnp.float32(2), jnp.float32(3))
    assert one + LossSums.zero() == one
    assert (one + one).z == 4
