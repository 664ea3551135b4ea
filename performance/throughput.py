"""How fast a run is and how much of its time it uses: step times and their shares, FLOP/s, MFU, goodput."""

import collections
import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import jax

from parallel.pipeline.schedules import PipelineSchedule
from performance.flops import Flops
from performance.hardware import Peak

Spans = list[tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class Spent:
    """Seconds of a run, in all its lives: from the start of the process to its last sign of life, and of these the
    steps whose results it still has. Time between lives does not count.
    """

    wall_s: float = 0.0
    productive_s: float = 0.0

    @classmethod
    def before(cls, wall_s: float | None, record: dict | None) -> "Spent":
        """What the earlier lives spent: productive up to the checkpoint whose record this is (None: nothing), and wall
        time up to the last line of metrics.jsonl (its perf/wall_s), which may be of steps that are lost.
        """
        saved = cls(**(record or {}).get("spent", {}))
        return cls(max(saved.wall_s, wall_s or 0.0), saved.productive_s)


@dataclasses.dataclass(frozen=True)
class _Dispatched:
    """A step on its way: when the device could begin, and what the host did since the step before."""

    began: float
    waits: Spans
    pauses: Spans
    ended: "Future[float]"


class Throughput:
    """Turns what the loop and the device did into the `perf/` metrics of the interval since the last report.

    Nothing is synchronised for it: a thread of its own waits for each step and notes when the device was done. A step's
    time reaches from the end of the step before to its own, less what `pause` covers of it, and divides without rest:
    - the device was busy: from the end of the step before, or this step's dispatch where that came later;
    - it had nothing to do, and the loop waited for data;
    - it had nothing to do, and the host did anything else: Python, dispatch, logging.
    What the host does while the device is busy costs nothing, and is not counted.

    flops: of a token. devices: how many share the tokens. schedule: a pipeline's, whose predicted idle share is
    logged beside what was measured. began: the clock when the process began. compile_s: seconds that the step took to
    compile. earlier: what other lives of the run have spent.
    """

    def __init__(
        self,
        flops: Flops,
        peak: Peak,
        devices: int,
        schedule: PipelineSchedule | None,
        began: float,
        compile_s: float,
        earlier: Spent,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.flops, self.peak, self.devices, self.clock = flops, peak, devices, clock
        self.bubble = schedule.bubble() if schedule else 0.0
        self.began, self.compile_s, self.earlier = began, compile_s, earlier
        self.productive_s = 0.0  # of this life
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="throughput")

    # ------------------------------------------------------------------------------------------------ what happens

    def start(self, step: int, tokens: int) -> None:
        """Begins the first interval after `step` steps and `tokens` tokens; what came before was start-up."""
        self.step, self.tokens = step, tokens
        self._ended = self._handed = self.clock()
        self._waits: Spans = []
        self._pauses: Spans = []
        self._underway: collections.deque[_Dispatched] = collections.deque()
        self.device_s = self.data_s = self.host_s = 0.0

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Within it the loop does something else than steps: evaluation, a blocking checkpoint."""
        began = self.clock()
        try:
            yield
        finally:
            self._handed = self.clock()
            self._pauses.append((began, self._handed))

    @contextlib.contextmanager
    def data_wait(self) -> Iterator[None]:
        """Within it the loop waits for its next batch; its step is dispatched right after."""
        began = self.clock()
        try:
            yield
        finally:
            self._handed = self.clock()
            self._waits.append((began, self._handed))

    def dispatched(self, result: jax.Array) -> None:
        """To be called as soon as a step was dispatched, with one of its results."""
        # a step that is done already was run by the call itself, as CPUs do with small ones
        began = self._handed if result.is_ready() else self.clock()
        ended = self._thread.submit(self._wait, result)
        self._underway.append(_Dispatched(began, self._waits, self._pauses, ended))
        self._waits, self._pauses = [], []

    def finished(self) -> None:
        """To be called when the oldest step that was dispatched is known to be done."""
        step = self._underway.popleft()
        before, began = self._ended, max(self._ended, step.began)
        self._ended = max(began, step.ended.result())
        idle = (before, began)
        paused, data = _overlap(step.pauses, idle), _overlap(step.waits, idle)
        self.device_s += self._ended - began
        self.data_s += data
        self.host_s += began - before - paused - data
        self.productive_s += self._ended - before - paused

    def _wait(self, result: jax.Array) -> float:
        with contextlib.suppress(Exception):  # the loop meets the error itself
            result.block_until_ready()
        return self.clock()

    # ------------------------------------------------------------------------------------------------ what is told

    def spent(self) -> Spent:
        """Seconds of all lives of the run until now, and how many of them steps took whose results it has."""
        return Spent(self.earlier.wall_s + self.clock() - self.began, self.earlier.productive_s + self.productive_s)

    def facts(self) -> dict[str, float | str]:
        """What is told once in a life, when its first step is under way."""
        known = {"perf/peak_tflops": self.peak.flops / 1e12} if math.isfinite(self.peak.flops) else {}
        return {
            "perf/peak": self.peak.name,
            **known,
            "perf/compile_s": self.compile_s,
            "perf/startup_s": self.clock() - self.began,
            "perf/wall_s": self.spent().wall_s,
        }

    def report(self, step: int, tokens: int) -> dict[str, float]:
        """The interval's metrics, and the start of the next; step and tokens are totals. Empty without a new step."""
        steps, seconds = step - self.step, self.device_s + self.data_s + self.host_s
        if steps <= 0 or seconds <= 0:
            return {}
        tokens_per_s = (tokens - self.tokens) / seconds
        per_device = tokens_per_s / self.devices
        spent = self.spent()
        metrics = {
            "perf/tokens_per_s": tokens_per_s,
            "perf/step_ms": 1e3 * seconds / steps,
            "perf/device_ms": 1e3 * self.device_s / steps,
            "perf/data_wait_ms": 1e3 * self.data_s / steps,
            "perf/host_ms": 1e3 * self.host_s / steps,
            "perf/model_tflops_per_device": per_device * self.flops.model / 1e12,
            "perf/bubble": self.bubble,
            "perf/goodput": spent.productive_s / spent.wall_s,
            "perf/wall_s": spent.wall_s,
        }
        if math.isfinite(self.peak.flops):
            metrics["perf/mfu"] = per_device * self.flops.model / self.peak.flops
            metrics["perf/mfu_full_attention"] = per_device * self.flops.full_attention / self.peak.flops
            metrics["perf/hfu"] = per_device * self.flops.hardware / self.peak.flops
        self.step, self.tokens = step, tokens
        self.device_s = self.data_s = self.host_s = 0.0
        return metrics


def _overlap(spans: Spans, within: tuple[float, float]) -> float:
    """Seconds of `within` that the spans cover; they do not cover each other."""
    return sum(max(0.0, min(end, within[1]) - max(begin, within[0])) for begin, end in spans)
