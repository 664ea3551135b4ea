"""The order of an epoch: every row once, whatever the size, and rows that are read together lie together."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import order, packing
from data.loader import Loader
from data.order import Order, shuffled
from data.packing import blocks_of
from data.token_files import Held, Tokens


def whole_epoch(borders, seed=0, epoch=0):
    n = borders[-1]
    return Order(np.array(borders), seed).at(np.arange(n), np.full(n, epoch))


@pytest.fixture(autouse=True, scope="module")
def _small_windows():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "WINDOW", 4)
        yield


@settings(max_examples=200, deadline=None)
@given(sizes=st.lists(st.integers(0, 60), min_size=1, max_size=40), seed=st.integers(0, 2**32 - 1), data=st.data())
def test_every_row_comes_once_and_each_is_known_alone(sizes, seed, data):
    borders, epoch = np.cumsum([0, *sizes]), data.draw(st.integers(0, 9))
    n = borders[-1]
    if not n:
        return
    found = whole_epoch(borders, seed, epoch)
    np.testing.assert_array_equal(np.sort(found), np.arange(n))
    indices, epochs = np.random.default_rng(seed).integers(0, n, 20), np.array([epoch, epoch + 1] * 10)
    mixed = Order(borders, seed).at(indices, epochs)
    np.testing.assert_array_equal(mixed[::2], found[indices[::2]])
    np.testing.assert_array_equal(mixed[1::2], whole_epoch(borders, seed, epoch + 1)[indices[1::2]])


@pytest.mark.parametrize("blocks", [1, 2, 7])
def test_a_small_corpus_is_shuffled_as_a_whole(blocks):
    n = 51 * blocks
    found = whole_epoch(np.arange(blocks + 1) * 51)
    np.testing.assert_array_equal(found, shuffled(np.arange(n), n, 0, np.zeros(n, int)))


def test_rows_that_are_read_together_lie_in_few_blocks():
    n, block = 10_000, 50
    borders = np.arange(0, n + 1, block)
    found = whole_epoch(borders)
    stretches = found.reshape(-1, 4 * block)
    blocks = [np.unique(stretch // block) for stretch in stretches]
    assert {len(some) for some in blocks} == {4}
    far = np.concatenate([np.diff(some) for some in blocks])
    assert np.median(far) > 10, "the blocks of a window come from everywhere"
    assert all((np.abs(np.diff(stretch)) == 1).mean() < 0.05 for stretch in stretches)
    np.testing.assert_array_equal(found, whole_epoch(borders))
    assert (found == whole_epoch(borders, epoch=1)).mean() < 0.01
    assert (found == whole_epoch(borders, seed=1)).mean() < 0.01


def test_rows_are_spread_evenly_over_their_window():
    counts = np.zeros((100, 100))
    for epoch in range(300):
        window = whole_epoch(np.arange(33) * 25, epoch=epoch)[:100]
        place = np.argsort(np.argsort(window))  # which row of those of the window comes at each index
        counts[np.arange(100), place] += 1
    chi_squared = ((counts - 3) ** 2 / 3).sum()
    assert chi_squared < 99**2 + 5 * np.sqrt(2 * 99**2)


@settings(max_examples=200, deadline=None)
@given(sizes=st.lists(st.integers(1, 400), min_size=0, max_size=30))
def test_blocks_are_the_parts_of_a_stream_where_these_have_the_size(sizes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "BLOCK_TOKENS", 100)
        borders = blocks_of(Tokens.of([np.zeros(size) for size in sizes]))
    assert (borders[0], borders[-1]) == (0, sum(sizes))
    assert (np.diff(borders) > 0).all() or not sizes
    if sum(sizes) >= 50:
        assert np.diff(borders).min() >= 50
        assert np.diff(borders).max() < 250
    if sizes and min(sizes) >= 50 and max(sizes) < 200:
        np.testing.assert_array_equal(borders, np.cumsum([0, *sizes]))


class Counted(Held):
    """A part that counts how often it is fetched by a machine that keeps a few parts."""

    kept, fetched, room = None, None, 5

    def array(self):
        if self not in self.kept:
            self.fetched.append(self)
            self.kept.append(self)
        self.kept.append(self.kept.pop(self.kept.index(self)))
        del self.kept[: -self.room]
        return self.held


@pytest.mark.parametrize(("how", "most"), [("concatenate", 2.5), ("best_fit", 1.2)])
def test_a_corpus_that_is_larger_than_a_cache_is_fetched_about_once_an_epoch(how, most, monkeypatch):
    """Sixty shards, and room for five, in windows of four. A concatenated row may end in another shard."""
    monkeypatch.setattr(packing, "BLOCK_TOKENS", 2000)
    monkeypatch.setattr(Counted, "kept", [])
    monkeypatch.setattr(Counted, "fetched", [])
    draw, parts = np.random.default_rng(0), []
    for _ in range(60):
        ends = np.cumsum(draw.integers(1, 60, 70))
        parts.append(Counted(draw.integers(1, 9, ends[-1]), ends))
    loader = Loader(Tokens(parts, np.int64), seq_len=32, batch_size=8, seed=0, eos_id=0, packing=how)
    steps = loader.sequences_per_epoch // 8
    for step in range(steps):
        loader.batch(step)
    assert set(Counted.fetched) == set(parts)
    assert len(Counted.fetched) < most * len(parts), f"{len(Counted.fetched)} fetches in {8 * steps} rows"
