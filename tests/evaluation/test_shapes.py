"""Shapes hold every row once, are few, and pad little."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.shapes import Costs, Limits, choose_shapes, padded

LIMITS = Limits(tokens_multiple=1, rows_multiple=1, batch_tokens=256, longest=1 << 20)
FREE, DEAR = Costs(place=0.25, shape=0), Costs(place=0.25, shape=1e12)


def cost(found, costs) -> float:
    spent = lambda shape, members: len(members) * (shape.tokens + costs.place * shape.places)
    return sum(costs.shape + spent(shape, members) for shape, members in found)


@settings(max_examples=50, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(1, 300), st.integers(0, 40)), min_size=1, max_size=40),
    multiples=st.tuples(st.integers(1, 6), st.integers(1, 4)),
    shape=st.sampled_from([0, 50, 1e9]),
)
def test_every_row_fits_once_where_the_mesh_divides(rows, multiples, shape):
    lengths, places = np.array(rows).T
    places = np.minimum(places, lengths)
    limits = Limits(*multiples, batch_tokens=256, longest=1 << 20)
    found = choose_shapes(lengths, places, limits, Costs(0.25, shape))
    assert sorted(itertools.chain(*(members for _, members in found))) == list(range(len(rows)))
    for shape, members in found:
        assert lengths[members].max() <= shape.tokens
        assert places[members].max() <= shape.places
        assert shape.tokens % limits.tokens_multiple == shape.rows % limits.rows_multiple == 0
        assert shape.rows <= max(limits.batch_tokens // shape.tokens, 1) + limits.rows_multiple - 1
        assert list(itertools.chain(*shape.batches(members))) == list(members)


def test_one_shape_where_compiling_is_dear_and_tight_ones_where_it_is_free():
    lengths, places = np.array([5, 9, 60, 61, 200]), np.array([1, 1, 1, 1, 1])
    assert len(choose_shapes(lengths, places, LIMITS, DEAR)) == 1
    assert [shape.tokens for shape, _ in choose_shapes(lengths, places, LIMITS, FREE)] == [8, 16, 64, 208]


def test_no_other_cut_is_cheaper():
    draw, costs = np.random.default_rng(0), Costs(place=0.5, shape=120)
    lengths, places = draw.integers(1, 90, 30), draw.integers(1, 4, 30)
    ours = cost(choose_shapes(lengths, places, LIMITS, costs), costs)
    sizes = np.array([padded(int(n), LIMITS) for n in lengths])
    borders = sorted(set(sizes))
    for count in range(len(borders)):
        for chosen in itertools.combinations(borders[:-1], min(count, 3)):
            total, low = 0, 0
            for high in (*chosen, borders[-1]):
                inside = (sizes > low) & (sizes <= high)
                total += costs.shape + inside.sum() * (
                    high + costs.place * (1 << int(places[inside].max() - 1).bit_length())
                )
                low = high
            assert ours <= total + 1e-9


@pytest.mark.parametrize("length", [1, 7, 17, 100, 1000, 4097])
def test_padding_is_at_most_an_eighth_beyond_a_few_tokens(length):
    assert length <= padded(length, LIMITS) <= max(length + 7, length * 1.125)
    assert padded(length, Limits(1, 1, 256, longest=length)) == length
