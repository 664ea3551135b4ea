"""Limits: never above, in any minute, over all replicas; and all that was not used is there again."""

import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.access.limits import DAY, LEASE_SECONDS, LIMITS, MINUTE, SLICE, Limits, Quotas, Refused, Taken
from serving.access.store import open_store

SECRET = b"s" * 40


class Clock:
    """A clock that is set."""

    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def clock():
    return Clock()


@pytest.fixture(scope="module")
def store(tmp_path_factory, clock):
    return open_store(tmp_path_factory.mktemp("state"), SECRET, clock)


@pytest.fixture
def subject(request, store, clock):
    clock.now += 2 * DAY
    Quotas(store, "one").beat()
    return f"holder:{time.monotonic_ns()}"


@settings(max_examples=40, deadline=None)
@given(
    asks=st.lists(st.tuples(st.floats(0, 40), st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=40),
    most=st.integers(1, 8),
    tokens=st.integers(4, 40),
)
def test_no_minute_has_more_than_its_limit(store, clock, asks, most, tokens):
    """Against a log of all that was let in: above the limit never, refused only where a slice more is full."""
    quotas, limits = Quotas(store, "one"), Limits(requests_a_minute=most, tokens_a_minute=tokens)
    clock.now += DAY
    quotas.beat()
    subject = f"holder:{time.monotonic_ns()}"
    let_in: list[tuple[float, int]] = []
    for number, (pause, wanted, used) in enumerate(asks):
        clock.now += pause
        used = min(used, wanted)
        taken = quotas.take(f"{subject}-{number}", {subject: limits}, wanted)
        window = lambda length: [one for one in let_in if one[0] > clock.now - length]
        if isinstance(taken, Taken):
            let_in.append((clock.now, wanted))
            assert len(window(MINUTE)) <= most
            assert sum(count for _, count in window(MINUTE)) <= tokens
            quotas.settle(taken, used)
            let_in[-1] = (clock.now, used)
        else:
            longer = window(MINUTE + SLICE[MINUTE])
            full = {
                "requests_a_minute": len(longer) + 1 > most,
                "tokens_a_minute": sum(count for _, count in longer) + wanted > tokens,
            }
            assert full[taken.limit]
            assert 0 <= taken.retry_after <= MINUTE + SLICE[MINUTE]


def test_a_refusal_says_when_there_is_room(store, clock, subject):
    quotas, limits = Quotas(store, "one"), {subject: Limits(requests_a_minute=2)}
    for number in range(2):
        assert isinstance(quotas.take(f"{subject}{number}", limits, 0), Taken)
        clock.now += 5
    refused = quotas.take(f"{subject}2", limits, 0)
    assert (refused.limit, refused.most) == ("requests_a_minute", 2)
    clock.now += refused.retry_after - 0.01
    assert isinstance(quotas.take(f"{subject}3", limits, 0), Refused)
    clock.now += 0.02
    assert isinstance(quotas.take(f"{subject}4", limits, 0), Taken)


def test_what_one_limit_refuses_the_others_do_not_count(store, subject):
    quotas = Quotas(store, "one")
    both = {subject: Limits(requests_a_minute=2, tokens_a_day=100), f"{subject}-role": Limits(tokens_a_minute=10)}
    for number in range(5):
        assert isinstance(quotas.take(f"{subject}{number}", both, 11), Refused)
    assert isinstance(quotas.take(f"{subject}a", both, 10), Taken)
    assert isinstance(quotas.take(f"{subject}b", both, 0), Taken)
    assert quotas.take(f"{subject}c", both, 0).limit == "requests_a_minute"


def test_tokens_a_day(store, clock, subject):
    quotas, limits = Quotas(store, "one"), {subject: Limits(tokens_a_day=100)}
    taken = quotas.take(f"{subject}a", limits, 90)
    quotas.settle(taken, 60)
    assert isinstance(quotas.take(f"{subject}b", limits, 40), Taken)
    clock.now += DAY - 1
    quotas.beat()
    assert isinstance(quotas.take(f"{subject}c", limits, 1), Refused)
    clock.now += SLICE[DAY] + 1
    quotas.beat()
    assert isinstance(quotas.take(f"{subject}d", limits, 100), Taken)


def test_a_request_that_did_not_run_is_not_counted_and_settles_once(store, subject):
    quotas, limits = Quotas(store, "one"), {subject: Limits(requests_a_minute=1, tokens_a_minute=5, concurrent=1)}
    taken = quotas.take(f"{subject}a", limits, 5)
    for _ in range(3):
        quotas.settle(taken, 0, ran=False)
    taken = quotas.take(f"{subject}b", limits, 5)
    assert isinstance(taken, Taken)
    quotas.settle(taken, 5)
    assert isinstance(quotas.take(f"{subject}c", limits, 0), Refused)


def test_an_answer_that_was_lost_is_asked_for_again_without_taking_twice(store, subject):
    quotas, limits = Quotas(store, "one"), {subject: Limits(requests_a_minute=1, concurrent=1)}
    assert quotas.take(f"{subject}a", limits, 3) == quotas.take(f"{subject}a", limits, 3)
    assert isinstance(quotas.take(f"{subject}b", limits, 3), Refused)


def test_requests_at_once_come_back_when_a_replica_dies_or_leaves(store, clock, subject):
    one, other = Quotas(store, "one"), Quotas(store, "other")
    other.beat()
    limits = {subject: Limits(concurrent=2)}
    first = one.take(f"{subject}a", limits, 0)
    assert isinstance(other.take(f"{subject}b", limits, 0), Taken)
    assert other.take(f"{subject}c", limits, 0).limit == "concurrent"
    one.settle(first, 0)
    assert isinstance(one.take(f"{subject}d", limits, 0), Taken)
    clock.now += LEASE_SECONDS - 1
    one.beat()  # `other` is dead and says nothing
    assert isinstance(one.take(f"{subject}e", limits, 0), Refused)
    clock.now += 2
    assert isinstance(one.take(f"{subject}f", limits, 0), Taken)
    assert isinstance(one.take(f"{subject}g", limits, 0), Refused)
    one.leave()
    other.beat()
    assert isinstance(other.take(f"{subject}h", limits, 0), Taken)


def test_threads_on_two_connections_get_exactly_the_limit(tmp_path):
    stores = [open_store(tmp_path, SECRET) for _ in range(2)]
    quotas = [Quotas(store, f"replica{number}") for number, store in enumerate(stores)]
    limits = {"holder:x": Limits(requests_a_minute=50, tokens_a_minute=10_000, concurrent=1000)}
    got: list = []

    def hammer(name: str, mine: Quotas) -> None:
        for number in range(30):
            got.append(mine.take(f"{name}-{number}", limits, 3))

    for mine in quotas:
        mine.beat()
    began = time.time()
    threads = [threading.Thread(target=hammer, args=(f"t{number}", quotas[number % 2])) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.time() - began < MINUTE
    assert sum(isinstance(one, Taken) for one in got) == 50
    assert {one.limit for one in got if isinstance(one, Refused)} == {"requests_a_minute"}


def test_limits_that_are_none():
    with pytest.raises(ValueError, match="no limit 'speed': requests_a_minute, tokens_a_minute"):
        Limits().changed({"speed": 3})
    assert Limits(context=3).counted is False
    assert LIMITS == ("requests_a_minute", "tokens_a_minute", "tokens_a_day", "concurrent", "context")
