"""Step times and their shares, MFU by hand, and goodput over several lives, by a clock that the tests turn."""

import math
import random
from concurrent.futures import Future
from dataclasses import asdict
from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from parallel.pipeline.schedules import make
from performance.flops import Flops
from performance.hardware import Peak
from performance.throughput import Spent, Throughput
from tracking.metrics_file import MetricsFile, last_value

SHARES = ("perf/device_ms", "perf/data_wait_ms", "perf/host_ms")


class Loop:
    """A training loop and its device: the device begins a step when it is free, and the loop stays one step ahead."""

    def __init__(self, startup: float = 0.0, earlier: Spent | None = None, **kwargs):
        self.now, self.pending = 100.0, None
        options = {
            "flops": Flops(1e6, 2e6, 4e6),
            "peak": Peak(1e9, "a peak", ""),
            "devices": 2,
            "schedule": None,
        } | kwargs
        self.meter = Throughput(
            **options, began=self.now, compile_s=3.0, earlier=earlier or Spent(), clock=lambda: self.now
        )
        self.meter._thread = SimpleNamespace(submit=lambda _, step: step.ended)
        self.now += startup
        self.meter.start(0, 0)

    def turn(self, device: float, data: float = 0.0, host: float = 0.0) -> None:
        """Waits for data, works, dispatches a step of `device` seconds, and waits for the step before."""
        with self.meter.data_wait():
            self.now += data
        self.now += host
        end = max(self.now, self.pending or 0.0) + device
        self.dispatched(end, ready=False)
        if self.pending is not None:
            self.settle()
        self.pending = end

    def dispatched(self, end: float, *, ready: bool) -> None:
        ended = Future()
        ended.set_result(end)
        self.meter.dispatched(SimpleNamespace(is_ready=lambda: ready, ended=ended))

    def settle(self) -> None:
        self.now = max(self.now, self.pending)
        self.pending = None
        self.meter.finished()

    def pause(self, seconds: float) -> None:
        if self.pending is not None:
            self.settle()
        with self.meter.pause():
            self.now += seconds


def milliseconds(metrics: dict) -> list[float]:
    return [metrics[name] for name in SHARES]


def test_mfu_by_hand():
    """2000 tokens in 4 seconds on 2 devices, 1, 2 and 4 MFLOPs a token, of 1 GFLOP/s each."""
    loop = Loop()
    for _ in range(4):
        loop.turn(device=1.0)
    loop.settle()
    metrics = loop.meter.report(4, 2000)
    assert metrics["perf/tokens_per_s"] == 500
    assert metrics["perf/step_ms"] == metrics["perf/device_ms"] == 1000
    assert metrics["perf/model_tflops_per_device"] == 250 * 1e6 / 1e12
    assert (metrics["perf/mfu"], metrics["perf/mfu_full_attention"], metrics["perf/hfu"]) == (0.25, 0.5, 1.0)


def test_only_what_leaves_the_device_idle_is_a_share():
    hidden, waiting, slow = Loop(), Loop(), Loop()
    for _ in range(10):
        hidden.turn(device=1.0, data=0.5, host=0.25)
        waiting.turn(device=1.0, data=3.0)
        slow.turn(device=1.0, data=0.25, host=2.0)
    for loop in (hidden, waiting, slow):
        loop.settle()
    # the first step has nothing to hide behind
    assert milliseconds(hidden.meter.report(10, 10)) == pytest.approx([1000, 50, 25])
    # one step ahead: of 3 seconds for each batch, 1 is spent beside the step before
    assert milliseconds(waiting.meter.report(10, 10)) == pytest.approx([1000, (3000 + 9 * 2000) / 10, 0])
    assert milliseconds(slow.meter.report(10, 10)) == pytest.approx([1000, 25, (2000 + 9 * 1250) / 10])


@pytest.mark.parametrize("seed", range(10))
def test_shares_add_up_to_steps_and_steps_with_pauses_to_the_clock(seed):
    draw, loop, steps, paused, stepping = random.Random(seed), Loop(startup=5.0), 0, 0.0, 0.0
    began = loop.now
    for last in [False] * 60 + [True]:
        loop.turn(draw.uniform(0.001, 2), *(draw.choice((0.0, 0.001, draw.uniform(0, 2))) for _ in range(2)))
        if draw.random() < 0.2 and not last:
            loop.pause(seconds := draw.uniform(0, 3))
            paused += seconds
        if loop.pending is None or last:
            if last:
                loop.settle()
            number = steps + draw.randint(1, 5)
            metrics = loop.meter.report(number, number)
            assert sum(milliseconds(metrics)) == pytest.approx(metrics["perf/step_ms"], rel=1e-9)
            assert min(milliseconds(metrics)) >= -1e-9
            stepping += metrics["perf/step_ms"] / 1e3 * (number - steps)
            steps = number
    assert stepping == pytest.approx(loop.now - began - paused)
    assert loop.meter.spent().productive_s == pytest.approx(stepping)
    assert loop.meter.spent().wall_s == pytest.approx(5 + stepping + paused)


def test_step_that_the_call_itself_ran_is_the_device_and_not_the_host():
    loop = Loop()
    for _ in range(3):
        with loop.meter.data_wait():
            loop.now += 0.5
        with loop.meter.pause():  # a trace that begins
            loop.now += 4.0
        loop.now += 2.0  # the call
        loop.dispatched(loop.now, ready=True)
        loop.meter.finished()
    assert milliseconds(loop.meter.report(3, 3)) == pytest.approx([2000, 500, 0])


def test_pause_beside_a_busy_device_costs_nothing():
    loop = Loop()
    loop.turn(device=10.0)
    with loop.meter.pause():
        loop.now += 1.0
    loop.turn(device=1.0)
    loop.settle()
    assert milliseconds(loop.meter.report(2, 2)) == pytest.approx([5500, 0, 0])


def test_bubble_is_what_the_schedule_predicts():
    table = make("1f1b", 4, 8)
    loop = Loop(schedule=table)
    loop.turn(device=1.0)
    loop.settle()
    assert loop.meter.report(1, 1)["perf/bubble"] == table.bubble() > 0


def test_unknown_peak_has_a_name_and_no_mfu():
    loop = Loop(peak=Peak(math.nan, "no peak known", ""))
    loop.turn(device=1.0)
    loop.settle()
    assert not {"perf/mfu", "perf/mfu_full_attention", "perf/hfu"} & loop.meter.report(1, 1).keys()
    assert loop.meter.facts()["perf/peak"] == "no peak known"
    assert "perf/peak_tflops" not in loop.meter.facts()


def test_report_without_a_new_step_is_empty_and_loses_no_time():
    loop = Loop()
    assert loop.meter.report(0, 0) == {}
    loop.turn(device=2.0)
    loop.settle()
    assert loop.meter.report(1, 10)["perf/tokens_per_s"] == 5


def test_goodput_over_three_lives(tmp_path):
    """Of 10 s of start-up and steps of 1 s: a life saved after 4 and killed after 6, one killed in its first step, and
    a last one."""
    path = tmp_path / "metrics.jsonl"

    def live(first: int, last: int, record: dict | None) -> tuple[Loop, MetricsFile]:
        loop, file = (
            Loop(startup=10.0, earlier=Spent.before(last_value(path, "perf/wall_s"), record)),
            MetricsFile(path),
        )
        file.resume(first)
        file.log(first, loop.meter.facts())
        loop.meter.step = first
        for step in range(first + 1, last + 1):
            loop.turn(device=1.0)
            loop.settle()
            file.log(step, loop.meter.report(step, step))
            if step == 4:
                saved["spent"] = asdict(loop.meter.spent())
        return loop

    saved = {}
    first = live(0, 6, None)
    assert first.meter.spent() == Spent(16, 6)
    second = live(4, 4, saved)
    assert second.meter.earlier == Spent(16, 4), "two steps are lost, their time is not"
    third = live(4, 8, saved)
    assert third.meter.spent() == Spent(16 + 10 + 14, 8)
    fresh = Spent.before(last_value(path, "perf/wall_s"), None)  # all checkpoints lost
    assert fresh == Spent(40, 0)


def test_ends_of_real_steps_are_noted_beside_the_loop():
    meter = Throughput(Flops(1, 1, 1), Peak(1.0, "", ""), 1, None, began=0.0, compile_s=0.0, earlier=Spent())
    meter.start(0, 0)
    for _ in range(3):
        with meter.data_wait():
            pass
        meter.dispatched(jnp.ones(8) + 1)
    for _ in range(3):
        meter.finished()
    metrics = meter.report(3, 3)
    assert sum(milliseconds(metrics)) == pytest.approx(metrics["perf/step_ms"])
    assert 0 < metrics["perf/step_ms"] < 60_000
