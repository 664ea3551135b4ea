"""Which source a sequence comes from: known without counting, in the proportions asked for, up to the caps."""

import dataclasses
import random
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config import compose
from config.schema import differences, identity
from data.corpus import DataConfig
from data.mixture import CIRCLE, GOLDEN, MixtureSource, Plan, floor_sum, points_below, shares

EVEN = 8  # sequences: no count is farther than this from what the weights ask for

weights = st.lists(st.floats(0.001, 1000), min_size=1, max_size=6)


def plan(sources, rows=10**6, batch_size=16, temperature=1.0, seq_len=32):
    """rows: of each source an epoch, one number or by name."""
    rows = rows if isinstance(rows, dict) else dict.fromkeys(sources, rows)
    sizes = {name: count * seq_len for name, count in rows.items()}
    return Plan(sources, rows, sizes, temperature=temperature, batch_size=batch_size, seq_len=seq_len)


def weighted(*numbers, **options):
    return {f"s{i}": MixtureSource(weight=number, **options) for i, number in enumerate(numbers)}


@settings(max_examples=200, deadline=None)
@given(n=st.integers(0, 300), m=st.integers(1, 500), a=st.integers(0, 2000), b=st.integers(0, 2000))
def test_floor_sum_is_the_sum(n, m, a, b):
    assert floor_sum(n, m, a, b) == sum((a * i + b) // m for i in range(n))


@settings(max_examples=100, deadline=None)
@given(n=st.integers(0, 400), border=st.integers(0, CIRCLE))
def test_points_are_counted_as_they_lie(n, border):
    assert points_below(n, border) == sum(i * GOLDEN % CIRCLE < border for i in range(n))


@settings(max_examples=60, deadline=None)
@given(weights=weights, steps=st.integers(1, 60), batch_size=st.integers(1, 40))
def test_every_sequence_has_one_source_and_sources_count_without_gaps(weights, steps, batch_size):
    made = plan(weighted(*weights), batch_size=batch_size)
    seen = {k: [] for k in range(len(weights))}
    for step in range(steps):
        sources, numbers = made.batch(step)
        assert made.counts(step * batch_size) == tuple(map(len, seen.values()))
        for source, number in zip(sources.tolist(), numbers.tolist(), strict=True):
            seen[source].append(number)
    for numbers in seen.values():
        assert numbers == list(range(len(numbers)))


@settings(max_examples=60, deadline=None)
@given(weights=weights, n=st.integers(0, 10**12))
def test_proportions_are_those_of_the_weights_after_any_number(weights, n):
    made = plan(weighted(*weights))
    for count, weight in zip(made.counts(n), weights, strict=True):
        assert abs(count - n * Fraction(weight) / sum(map(Fraction, weights))) < EVEN


def test_proportions_hold_in_any_stretch_and_for_rare_sources():
    made = plan(weighted(0.7, 0.2999, 0.0001), batch_size=320_000)
    sources, _ = made.batch(0)
    assert (sources == 2).sum() == pytest.approx(32, abs=EVEN)
    for first in random.Random(0).choices(range(300_000), k=200):
        part = sources[first : first + 1000]
        assert abs((part == 0).sum() - 700) < 2 * EVEN


def test_without_weights_a_source_has_its_size_and_temperature_evens_out():
    sources, rows = {"large": MixtureSource(), "small": MixtureSource()}, {"large": 8100, "small": 100}
    assert plan(sources, rows).stages[0].shares == pytest.approx([81 / 82, 1 / 82])
    assert plan(sources, rows, temperature=2.0).stages[0].shares == pytest.approx([0.9, 0.1])
    assert plan(sources, rows, temperature=1e6).stages[0].shares == pytest.approx([0.5, 0.5], abs=1e-4)
    assert shares([2.0, 0.0, 6.0], 1.0) == [Fraction(1, 4), 0, Fraction(3, 4)]
    assert shares([2.0, 0.0, 6.0], 0.5) == [Fraction(1, 10), 0, Fraction(9, 10)]


def test_weights_change_at_their_steps():
    made = plan({"a": MixtureSource(weight={0: 3, 100: 1}), "b": MixtureSource(weight={50: 1})}, batch_size=8)
    of = lambda first, after: np.concatenate([made.batch(step)[0] for step in range(first, after)]).mean()
    assert of(0, 50) == 0
    assert of(50, 100) == pytest.approx(1 / 4, abs=EVEN / 400)
    assert of(100, 200) == pytest.approx(1 / 2, abs=EVEN / 800)
    assert [stage.first for stage in made.stages] == [0, 400, 800]


def test_a_source_is_read_to_its_cap_and_the_others_share_its_part():
    sources = {
        "a": MixtureSource(weight=2, epochs=1.5),
        "b": MixtureSource(weight=1, tokens=3200),
        "c": MixtureSource(weight=1),
    }
    made = plan(sources, rows={"a": 200, "b": 10**6, "c": 10**6}, batch_size=10, seq_len=32)
    assert made.caps == [300, 100, None]
    sources = np.concatenate([made.batch(step)[0] for step in range(200)])
    assert np.bincount(sources).tolist() == [300, 100, 1600]
    ends = [stage.first for stage in made.stages[1:]]
    last = {k: int(np.flatnonzero(sources == k)[-1]) for k in (0, 1)}
    assert ends == sorted(k + 1 for k in last.values()), "the next stage begins right after the last sequence"
    after_b = sources[min(ends) : max(ends)]  # 2 : 1 of what is left
    assert (after_b == 0).mean() == pytest.approx(2 / 3, abs=EVEN / len(after_b))


@settings(max_examples=40, deadline=None)
@given(
    data=st.data(),
    weights=st.lists(st.floats(0.1, 10), min_size=2, max_size=5),
    batch_size=st.integers(1, 20),
)
def test_caps_and_changes_together(data, weights, batch_size):
    """However stages follow each other: no cap is passed, none is left while it has weight, and counts add up."""
    sources = {}
    for i, weight in enumerate(weights):
        by_step = {0: weight, data.draw(st.integers(1, 30)): data.draw(st.sampled_from([0, 1.0, 5.0]))}
        sources[f"s{i}"] = MixtureSource(weight=by_step, epochs=data.draw(st.sampled_from([None, 0.5, 2.0])))
    made = plan(sources, rows={name: data.draw(st.integers(2, 80)) for name in sources}, batch_size=batch_size)
    counts, step = np.zeros(len(weights), int), 0
    while step < 60 and (step + 1) * batch_size <= made.end:
        assert made.counts(step * batch_size) == tuple(counts)
        for source, number in zip(*made.batch(step), strict=True):
            assert number == counts[source]
            counts[source] += 1
        step += 1
    for count, cap in zip(counts, made.caps, strict=True):
        assert cap is None or count <= cap
    if step < 60:
        with pytest.raises(ValueError, match=f"leave {made.end:,}: set train.steps={step} or less"):
            made.batch(step)


def test_a_mixture_that_ends_is_told_with_the_steps_that_it_has():
    made = plan(weighted(1, 3, epochs=2), rows=40, batch_size=16)
    assert made.end == 160
    with pytest.raises(
        ValueError,
        match="11 steps x 16 = 176 sequences, but .* leave 160: set train.steps=10 or less, or raise .* of s0, s1",
    ):
        made.batch(10)
    made.batch(9)


MIXED = ["data.source=mixture"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.source=mixture"], "data.source=mixture and data.mixture belong together"),
        (["data.mixture={a:{source:stdlib}}"], "data.source=mixture and data.mixture belong together"),
        (
            [*MIXED, "data.mixture={a:{sorce:stdlib}}"],
            "unknown data.mixture.a.sorce; did you mean data.mixture.a.source",
        ),
        ([*MIXED, "data.mixture={a:{source:books}}"], "data.mixture.a: data.source=books: choose one of"),
        ([*MIXED, "data.mixture={a:{weight:1}}"], "data.mixture.a: data.source=text needs data.path"),
        ([*MIXED, "data.mixture={a:{source:stdlib,weight:-1}}"], r"data.mixture.a.weight=-1.0 should be a number"),
        ([*MIXED, "data.mixture={a:{source:stdlib,weight:{x:1}}}"], r"weight=\{'x': 1\} should be .* by steps"),
        ([*MIXED, "data.mixture={a:{source:stdlib,weight:{}}}"], "names no step"),
        ([*MIXED, "data.mixture={a:{source:stdlib,weight:heavy}}"], "data.mixture.a.weight='heavy' is str"),
        ([*MIXED, "data.mixture={a:{source:stdlib,epochs:0}}"], "data.mixture.a.epochs=0.0 must be above 0"),
        ([*MIXED, "data.mixture={a:{source:mixture}}"], "data.mixture.a: a mixture cannot hold another"),
        ([*MIXED, "data.mixture={a/b:{source:stdlib}}"], "data.mixture: 'a/b' is no name for a source"),
        ([*MIXED, "data.mixture={a:stdlib}"], "data.mixture.a='stdlib' should be a group of keys: source, path"),
        ([*MIXED, "data.mixture=stdlib"], "data.mixture='stdlib' is str, but should be a mapping"),
        (["data=mixture", "data.temperature=0"], "data.temperature=0.0 must be above 0"),
        (["data=mixture", "data.mixtur.code.weight=1"], "unknown data.mixtur.code.weight"),
        (["data=mixture", "data.mixture.code.wait=1"], "unknown data.mixture.code.wait; did you mean .*code.weight"),
    ],
)
def test_mistakes_are_one_line(overrides, message):
    with pytest.raises(ValueError, match=message) as told:
        compose.load(overrides)
    assert "\n" not in str(told.value)


def test_values_of_a_source_can_be_set_and_are_kept_in_the_config_of_a_run(tmp_path):
    found = compose.load(["data=mixture", "data.mixture.code.weight={0: 2, 30: 1}", "data.mixture.reviews.epochs=3"])
    assert found.data.mixture["code"] == MixtureSource("stdlib", weight={0: 2, 30: 1})
    assert found.data.mixture["reviews"].epochs == 3
    (tmp_path / "config.yaml").write_text(compose.to_yaml(found))
    assert compose.load_run(tmp_path) == found
    assert compose.load(["data=mixture"]).run.dir != found.run.dir


def test_where_else_a_source_lies_is_no_other_run():
    default = compose.load([])

    def identity_with(code, *, turned=False, **settings):
        sources = {"code": code, "notes": MixtureSource("stdlib", weight=1)}
        sources = dict(reversed(sources.items())) if turned else sources
        return identity(dataclasses.replace(default, data=DataConfig("mixture", mixture=sources, **settings)))

    here = identity_with(MixtureSource("prepared", "corpus", weight=2))
    there = MixtureSource("prepared", "corpus", weight=2, replicas=("elsewhere",))
    assert identity_with(there, turned=True, cache="there") == here
    changed = identity_with(MixtureSource("prepared", "corpus", weight={0: 2, 9: 3}))
    assert differences(changed, here) == ["data.mixture.code.weight (2 there, {'0': 2, '9': 3} asked)"]


def test_a_source_has_the_settings_of_a_run_that_reads_it_alone():
    mixed = compose.load(["data=mixture", "data.heldout=0.2", "data.segments=true"]).data
    assert mixed.of_mixture("code") == DataConfig("stdlib", heldout=0.2, segments=True)
