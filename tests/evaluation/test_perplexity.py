"""Perplexity against a computation that feeds the model one context at a time."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evaluation.perplexity import Texts, Window, cut, outcome, perplexity
from evaluation.scoring import Row, Scorer

EOS = 0
BYTES = np.arange(97) % 5
LENGTHS = (1, 3, 0, 40, 17, 9)


@pytest.fixture(scope="module")
def documents():
    draw = np.random.default_rng(3)
    return [draw.integers(1, 97, n) for n in LENGTHS]


def brute_force(texts, next_token, window, stride):
    """Nats of each document: the first window scores all that it can, every further one `stride` tokens."""
    found = []
    for text in texts:
        whole, nats, scored_to = [EOS, *text], 0.0, 1
        while scored_to < len(whole):
            end = min(len(whole), window + 1 if scored_to == 1 else scored_to + stride)
            start = max(0, end - 1 - window)
            for at in range(scored_to, end):
                assert at - start > 0 or at == 1
                assert start == 0 or at - start > window - stride
                nats -= next_token(whole[start:at])[whole[at]] if whole[at] != EOS else 0
            scored_to = end
        found.append(nats)
    return np.array(found)


@pytest.mark.parametrize(("window", "stride"), [(64, 64), (16, 16), (16, 5), (7, 1)])
def test_apart(description, params, documents, next_token, window, stride, on_mesh):
    with on_mesh() as mesh:
        scorer = Scorer(description, params, mesh, jnp.float32)
        stream = Texts(documents, EOS)
        found = perplexity(scorer, stream, Window(window, stride), eos_id=EOS, token_bytes_V=BYTES)
    nats = brute_force([[*text] for text in documents], next_token, window, stride)
    kept = [number for number, n in enumerate(LENGTHS) if n]
    assert list(found.ids) == list(map(str, kept))
    np.testing.assert_allclose(found.items["nats"], nats[kept], rtol=1e-5)
    assert found.items["tokens"].tolist() == [n for n in LENGTHS if n]
    assert found.items["bytes"].tolist() == [BYTES[documents[number]].sum() for number in kept]
    loss = nats.sum() / sum(LENGTHS)
    assert found.metrics["loss"].value == pytest.approx(loss, rel=1e-6)
    assert found.metrics["perplexity"].value == pytest.approx(math.exp(loss), rel=1e-5)
    size = sum(BYTES[text].sum() for text in documents)
    assert found.metrics["bits_per_byte"].value == pytest.approx(nats.sum() / math.log(2) / size, rel=1e-6)


def test_joined_reaches_into_the_documents_before(description, params, documents, next_token, on_mesh):
    with on_mesh() as mesh:
        scorer = Scorer(description, params, mesh, jnp.float32)
        found = perplexity(scorer, Texts(documents, EOS), Window(16, 5), eos_id=EOS, token_bytes_V=BYTES, joined=True)
    stream = [token for text in documents for token in [*text, EOS]][:-1]
    nats = brute_force([stream], next_token, 16, 5)
    assert found.items["nats"].sum() == pytest.approx(nats.sum(), rel=1e-5)
    assert found.items["tokens"].tolist() == [n for n in LENGTHS if n]


@pytest.mark.parametrize("axes", [{"data": 2, "tensor": 2}, {"fsdp": 4}, {"context": 2, "data": 2}])
def test_on_a_mesh(description, params, documents, axes, on_mesh):
    stream, window = Texts(documents, EOS), Window(16, 5)
    found = []
    for mesh in (on_mesh(), on_mesh(**axes)):
        with mesh as mesh:
            placed = jax.device_put(params, description.shardings(mesh))
            scorer = Scorer(description, placed, mesh, jnp.float32)
            found.append(perplexity(scorer, stream, window, eos_id=EOS, token_bytes_V=BYTES))
    np.testing.assert_allclose(found[1].items["nats"], found[0].items["nats"], rtol=1e-5)
    assert found[1].items["correct"].tolist() == found[0].items["correct"].tolist()


def test_a_limit_takes_the_first_documents_and_their_numbers_do_not_change(description, params, documents, on_mesh):
    with on_mesh() as mesh:
        scorer = Scorer(description, params, mesh, jnp.float32)
        stream, shared = Texts(documents, EOS), {"eos_id": EOS, "token_bytes_V": BYTES}
        whole, part = (perplexity(scorer, stream, Window(16, 8), limit=n, **shared) for n in (None, 4))
    assert list(part.ids) == list(whole.ids)[:3]
    np.testing.assert_allclose(part.items["nats"], whole.items["nats"][:3], rtol=1e-5)


@pytest.mark.parametrize(("before", "count", "length", "stride"), [(1, 100, 16, 16), (1, 16, 16, 3), (3, 50, 7, 2)])
def test_windows_score_every_token_once(before, count, length, stride):
    cuts = cut(before, count, Window(length, stride))
    scored = np.concatenate([np.arange(first, stop + 1) for first, stop in zip(cuts.first_W, cuts.stop_W, strict=True)])
    assert scored.tolist() == list(range(before, before + count))
    assert (cuts.stop_W - cuts.start_W <= length).all()


def test_standard_errors_are_those_of_repeated_draws():
    """The spread of the loss over many corpora of 60 documents is what one corpus says of itself."""
    draw = np.random.default_rng(0)
    losses, errors = [], []
    for _ in range(400):
        tokens = draw.integers(5, 80, 60)
        nats = tokens * draw.gamma(9, 1 / 3, 60)
        found = outcome({"nats": nats, "tokens": tokens, "bytes": 4 * tokens, "correct": tokens * 0})
        losses.append(found.metrics["bits_per_byte"].value)
        errors.append(found.metrics["bits_per_byte"].stderr)
    assert np.mean(errors) == pytest.approx(np.std(losses), rel=0.1)


def test_mistakes(description, params, on_mesh):
    with on_mesh() as mesh:
        scorer = Scorer(description, params, mesh, jnp.float32)
        with pytest.raises(ValueError, match="no token to score"):
            perplexity(scorer, Texts([np.empty(0, int)], EOS), Window(8, 4), eos_id=EOS, token_bytes_V=BYTES)
        with pytest.raises(ValueError, match="--stride 9 must be 1 to --window 8"):
            Window(8, 9)


def test_a_place_may_be_asked_for_several_tokens(description, params, next_token, on_mesh):
    with on_mesh() as mesh:
        scorer = Scorer(description, params, mesh, jnp.float32)
        row = Row(np.array([5, 6, 7]), np.array([2, 2, 0]), np.array([8, 9, 6]))
        (found,) = scorer.scores_of([row])
    asked = [([5, 6, 7], 8), ([5, 6, 7], 9), ([5], 6)]
    np.testing.assert_allclose(found.nll_C, [-next_token(context)[token] for context, token in asked], rtol=1e-5)
    for (context, token), correct in zip(asked, found.correct_C, strict=True):
        assert correct == (int(np.argmax(next_token(context))) == token)
