"""Checkpoint intervals and goodput against what they are for rare failures, and against a simulation."""

import random

import pytest

from planner.machine import open_machine
from planner.reliability import availability, best_interval, copies_for, goodput, reliability


def test_rare_failures_give_youngs_interval():
    assert best_interval(60, 1e9) == pytest.approx((2 * 60 * 1e9) ** 0.5, rel=0.01)


def test_the_interval_is_the_best_one():
    save, restart, mean = 120.0, 300.0, 20_000.0
    best = best_interval(save, mean)
    at = lambda interval: goodput(interval, save, restart, mean)
    assert at(best) > max(at(best / 1.5), at(best * 1.5))


def test_goodput_is_that_of_a_simulated_run():
    interval, save, restart, mean = 1000.0, 50.0, 100.0, 5000.0
    draw = random.Random(0)
    clock, done, failure = 0.0, 0, draw.expovariate(1 / mean)
    while done < 20_000:
        if clock + interval + save <= failure:
            clock, done = clock + interval + save, done + 1
            continue
        clock = failure
        failure = clock + draw.expovariate(1 / mean)
        while failure < clock + restart:  # it may fail while it restarts
            clock, failure = failure, failure + draw.expovariate(1 / mean)
        clock += restart
    assert goodput(interval, save, restart, mean) == pytest.approx(done * interval / clock, rel=0.02)


def test_more_devices_fail_more_often():
    machine = open_machine("h100")
    few, many = (reliability(machine, n, 1000, 60) for n in (64, 16_384))
    assert many.hours_between_failures == pytest.approx(50_000 / 16_384)
    assert few.goodput > many.goodput > 0.8
    assert many.hours == pytest.approx(1000 / many.goodput)


def test_copies():
    assert availability(0.1, 3) == pytest.approx(0.999)
    assert copies_for(0.1, 0.999) == 3
    assert copies_for(0.0) == 1
