"""A stream of tokens over many files: every window is that of one long array."""

import pickle

import numpy as np
import pytest

from data.token_files import Mapped, Tokens, ends_file

LENGTHS = [5, 0, 1, 90, 3, 3, 40]


@pytest.fixture
def arrays():
    draw = np.random.default_rng(0)
    return [draw.integers(0, 60_000, n).astype("<u2") for n in LENGTHS]


def on_disk(folder, arrays):
    parts = []
    for number, array in enumerate(arrays):
        path = folder / f"{number}.bin"
        array.tofile(path)
        np.save(ends_file(path), np.array([len(array)] if len(array) else [], np.int64))
        parts.append(Mapped(path, "<u2", len(array), int(len(array) > 0), 7))
    return Tokens(parts, "<u2")


@pytest.fixture(params=["memory", "disk", "pickled"])
def tokens(request, arrays, tmp_path):
    if request.param == "memory":
        return Tokens.of([array for array in arrays if len(array)])
    made = on_disk(tmp_path, arrays)
    return made if request.param == "disk" else pickle.loads(pickle.dumps(made))


def test_windows_are_those_of_one_array(tokens, arrays):
    whole = np.concatenate(arrays)
    assert len(tokens) == tokens.total == len(whole)
    for count in (1, 2, 4, 7, 50, len(whole)):
        starts = np.random.default_rng(count).permutation(len(whole) - count + 1)
        read = tokens.read(starts, count)
        assert read.dtype == tokens.dtype == np.uint16
        np.testing.assert_array_equal(read, np.stack([whole[start : start + count] for start in starts]))
    np.testing.assert_array_equal(tokens.slice(3, 99), whole[3:99])
    assert tokens.slice(3, 3).shape == (0,)
    assert tokens.read(np.array([], np.int64), 4).shape == (0, 4)


def test_ends_of_documents(tokens):
    np.testing.assert_array_equal(tokens.ends_N, np.cumsum([n for n in LENGTHS if n]))
    assert tokens.ends_N.dtype == np.int64
    assert tokens.documents == 6


def test_ends_inside_the_arrays():
    tokens = Tokens.of([np.arange(5), np.arange(4)], [np.array([2, 5]), np.array([4])])
    assert tokens.ends_N.tolist() == [2, 5, 9]
    assert tokens.documents == 3
    assert tokens.bytes is None


@pytest.mark.parametrize(("start", "count"), [(-1, 2), (141, 2), (0, 143)])
def test_windows_outside(tokens, start, count):
    with pytest.raises(IndexError, match="not inside a stream of 142"):
        tokens.read(np.array([3, start]), count)


def test_a_copy_carries_no_tokens(tmp_path):
    tokens = on_disk(tmp_path, [np.zeros(100_000, "<u2")])
    tokens.slice(0, 10)
    assert tokens.ends_N is not None
    assert len(pickle.dumps(tokens)) < 2_000


def test_a_file_that_was_cut(tmp_path):
    tokens = on_disk(tmp_path, [np.arange(100, dtype="<u2")])
    tokens.parts[0].path.write_bytes(b"short")
    with pytest.raises(ValueError, match="mmap length is greater"):
        tokens.slice(0, 10)
