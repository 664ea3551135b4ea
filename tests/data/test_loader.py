"""Batches: pure in (seed, step), the same on any hosts, every window once an epoch, targets behind their tokens."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.loader import HeldoutBatches, Loader
from data.order import shuffled
from data.token_files import Tokens


def stream(array):
    """One document."""
    return Tokens.of([np.asarray(array)])


def loader(windows=10, seq_len=4, batch_size=3, seed=0, spare=0, **options):
    return Loader(
        stream(np.arange(windows * seq_len + 1 + spare, dtype=np.uint16)),
        seq_len=seq_len,
        batch_size=batch_size,
        seed=seed,
        **options,
    )


def same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype
        np.testing.assert_array_equal(a[key], b[key])


def whole_epoch(n, seed=0, epoch=0):
    return shuffled(np.arange(n), n, seed, np.full(n, epoch))


@pytest.mark.parametrize("n", [*range(1, 70), 127, 128, 129, 255, 256, 257, 1000, 4095, 4096, 4097, 65537])
def test_shuffle_is_a_bijection(n):
    for seed, epoch in ((0, 0), (7, 1), (2**63, 10**12)):
        np.testing.assert_array_equal(np.sort(whole_epoch(n, seed, epoch)), np.arange(n))


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 20_000), seed=st.integers(0, 2**70), epoch=st.integers(0, 2**40))
def test_shuffle_of_any_size_is_a_bijection(n, seed, epoch):
    assert len(np.unique(whole_epoch(n, seed, epoch))) == n


def test_shuffle_of_a_huge_stream_needs_no_table():
    start = time.perf_counter()
    indices = shuffled(np.arange(1000), 10**12 + 7, 0, np.zeros(1000, np.int64))
    assert time.perf_counter() - start < 1
    assert len(np.unique(indices)) == 1000
    assert indices.max() < 10**12 + 7
    assert 0.4e12 < indices.mean() < 0.6e12


@pytest.mark.parametrize("n", [3, 5, 8, 20])
def test_shuffle_sends_every_index_everywhere_alike(n):
    epochs = 2000
    indices = np.tile(np.arange(n), epochs)
    places = shuffled(indices, n, 1, np.repeat(np.arange(epochs), n)).reshape(epochs, n)
    counts = np.stack([np.bincount(places[:, i], minlength=n) for i in range(n)])
    expected = epochs / n
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    freedom = (n - 1) ** 2
    assert chi_squared < freedom + 5 * np.sqrt(2 * freedom)


def test_shuffle_leaves_no_neighbours_and_no_order():
    n = 10_000
    order = whole_epoch(n)
    assert abs(np.corrcoef(np.arange(n), order)[0, 1]) < 0.03
    assert (np.abs(np.diff(order)) == 1).sum() < 15  # 2 expected
    assert (order == np.arange(n)).sum() < 8  # 1 expected
    assert (order == whole_epoch(n, epoch=1)).sum() < 8
    assert (order == whole_epoch(n, seed=1)).sum() < 8


def test_the_stream_of_a_seed_never_changes():
    """A change here breaks the resumption of every run that was ever stopped."""
    assert whole_epoch(12).tolist() == [3, 10, 9, 6, 8, 0, 7, 1, 2, 5, 4, 11]
    assert whole_epoch(12, 3, 2).tolist() == [7, 10, 4, 5, 11, 9, 0, 6, 2, 8, 3, 1]


@pytest.mark.parametrize(("windows", "batch_size"), [(10, 3), (10, 10), (3, 8), (1, 4), (7, 1)])
def test_an_epoch_reads_every_window_once(windows, batch_size):
    batches = loader(windows, 4, batch_size, spare=2)
    assert batches.sequences_per_epoch == windows
    starts = np.concatenate([batches.batch(step)["tokens_BT"][:, 0] // 4 for step in range(4 * windows)])
    epochs = starts[: len(starts) // windows * windows].reshape(-1, windows)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(windows), (len(epochs), 1)))
    if windows == 10:
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_targets_follow_tokens_and_all_count():
    batch = loader(windows=10, seq_len=4).batch(5)
    assert batch.keys() == {"tokens_BT", "targets_BT", "mask_BT"}
    np.testing.assert_array_equal(batch["targets_BT"], batch["tokens_BT"] + 1)
    assert (batch["tokens_BT"][:, 0] % 4 == 0).all()
    assert [batch[key].dtype for key in batch] == [np.int32, np.int32, np.float32]
    assert (batch["mask_BT"] == 1).all()
    assert all(array.shape == (3, 4) and array.flags.c_contiguous for array in batch.values())


def test_every_token_but_the_first_is_a_target_once_an_epoch():
    batches = loader(windows=10, seq_len=4, batch_size=5)
    targets = np.concatenate([batches.batch(step)["targets_BT"].ravel() for step in range(2)])
    np.testing.assert_array_equal(np.sort(targets), np.arange(1, 41))


@settings(max_examples=60, deadline=None)
@given(
    step=st.integers(0, 10**9),
    seed=st.integers(0, 2**40),
    hosts=st.sampled_from([1, 2, 3, 4, 6, 12]),
    segments=st.booleans(),
)
def test_a_batch_is_the_same_on_any_hosts_and_after_any_restart(step, seed, hosts, segments):
    eos_id = 9 if segments else None
    whole = loader(windows=5, batch_size=12, seed=seed, eos_id=eos_id).batch(step)
    fresh = loader(windows=5, batch_size=12, seed=seed, eos_id=eos_id)
    fresh.batch(step + 1)
    parts = [fresh.batch(step, slice(i * 12 // hosts, (i + 1) * 12 // hosts)) for i in range(hosts)]
    same(whole, {key: np.concatenate([part[key] for part in parts]) for key in whole})
    same({key: whole[key][::-5] for key in whole}, fresh.batch(step, slice(None, None, -5)))


def test_seeds_and_epochs_differ():
    first, second = loader(100, batch_size=50, seed=0), loader(100, batch_size=50, seed=1)
    assert (first.batch(0)["tokens_BT"] != second.batch(0)["tokens_BT"]).any()
    assert (first.batch(0)["tokens_BT"] != first.batch(2)["tokens_BT"]).any()


def test_epoch_counts_completed_epochs():
    batches = loader(windows=10, batch_size=4)
    assert [batches.epoch(step) for step in (0, 5, 10)] == [0.0, 2.0, 4.0]


def test_memory_mapped_tokens(tmp_path):
    tokens = np.arange(41, dtype=np.uint32)
    tokens.tofile(tmp_path / "tokens")
    mapped = np.memmap(tmp_path / "tokens", np.uint32, mode="r")
    same(*(Loader(stream(t), seq_len=4, batch_size=3, seed=0).batch(2) for t in (tokens, mapped)))


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 99), step=st.integers(0, 50))
def test_places_begin_anew_with_each_document(seed, step):
    tokens = np.random.default_rng(seed).integers(0, 4, 300)
    batch = Loader(stream(tokens), seq_len=20, batch_size=3, seed=seed, eos_id=0).batch(step)
    for tokens_T, places_T in zip(batch["tokens_BT"], batch["places_BT"], strict=True):
        place = 0
        for token, found in zip(tokens_T, places_T, strict=True):
            assert found == place
            place = 0 if token == 0 else place + 1
    assert batch["places_BT"].dtype == np.int32


def test_segments_number_documents_and_mask_what_follows_an_end():
    tokens = np.array([5, 6, 0, 7, 0, 0, 8, 9, 3])
    batch = Loader(stream(tokens), seq_len=8, batch_size=1, seed=0, eos_id=0).batch(0)
    assert batch["tokens_BT"].tolist() == [[5, 6, 0, 7, 0, 0, 8, 9]]
    assert batch["segments_BT"].tolist() == [[1, 1, 1, 2, 2, 3, 4, 4]]
    assert batch["mask_BT"].tolist() == [[1, 1, 0, 1, 0, 0, 1, 1]]
    assert batch["segments_BT"].dtype == np.int32


def test_heldout_is_spread_and_padded():
    tokens = np.arange(10 * 4 + 3)
    batches = list(HeldoutBatches(stream(tokens), 4, 3, limit=5))
    assert np.concatenate([b["tokens_BT"][:, 0] for b in batches])[:5].tolist() == [0, 8, 16, 24, 32]
    assert [b["mask_BT"].sum() for b in batches] == [12, 8]
    assert batches[1]["mask_BT"].tolist() == [[1] * 4, [1] * 4, [0] * 4]
    everything = list(HeldoutBatches(stream(tokens), 4, 4))
    assert len(everything) == 3
    counted = np.concatenate([b["targets_BT"][b["mask_BT"] == 1] for b in everything])
    np.testing.assert_array_equal(counted, np.arange(1, 41))
    assert len(list(HeldoutBatches(stream(tokens), 4, 4, limit=99))) == 3


def test_heldout_is_the_same_on_any_hosts_and_at_every_batch_size():
    tokens = np.random.default_rng(0).integers(0, 5, 100)
    whole = list(HeldoutBatches(stream(tokens), 6, 4, limit=7, eos_id=0))
    halves = [list(HeldoutBatches(stream(tokens), 6, 4, 7, rows, eos_id=0)) for rows in (slice(0, 2), slice(2, 4))]
    for batch, first, second in zip(whole, *halves, strict=True):
        same(batch, {key: np.concatenate([first[key], second[key]]) for key in batch})

    def counted(batch_size):
        batches = list(HeldoutBatches(stream(tokens), 6, batch_size, 7, eos_id=0))
        return np.concatenate([b["targets_BT"][b["mask_BT"] == 1] for b in batches])

    for batch_size in (1, 2, 7, 8):
        np.testing.assert_array_equal(counted(4), counted(batch_size))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Loader(stream(np.zeros(4)), seq_len=4, batch_size=1, seed=0), r"4 tokens .* train.seq_len \+ 1 = 5"),
        (lambda: loader(seed=-1), "seed=-1"),
        (lambda: loader(batch_size=0), "train.batch_size=0"),
        (lambda: Loader(stream(np.zeros(4)), seq_len=0, batch_size=1, seed=0), "train.seq_len=0"),
        (lambda: HeldoutBatches(stream(np.zeros(4)), 4, 1), "held-out stream has 4 tokens .* data.heldout"),
        (lambda: HeldoutBatches(stream(np.zeros(5)), 4, 1, 0), "at least 1"),
    ],
)
def test_mistakes_are_said_at_once(make, message):
    with pytest.raises(ValueError, match=message):
        make()
