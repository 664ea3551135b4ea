"""What a step's metrics become: log lines, progress, warnings. Reads them one step late, to keep the device busy."""

import logging
import math

import jax

from training.config import TrainConfig
from training.console import Console
from training.metrics import Sinks, Throughput

log = logging.getLogger("isomesh.train")
SPIKE = 6.0  # standard deviations above the running mean that make a warning


class Reporter:
    """Tells of the steps of one run."""

    def __init__(self, config: TrainConfig, first: int, meter: Throughput, sinks: Sinks, console: Console, epoch):
        self.config, self.first, self.meter, self.sinks, self.console = config, first, meter, sinks, console
        self.epoch = epoch  # step -> epochs of data read
        self.tokens_a_step = config.batch_size * config.seq_len
        self._pending: tuple[int, dict[str, jax.Array]] | None = None

    def push(self, step: int, metrics: dict[str, jax.Array]) -> int | None:
        """Takes the metrics of a step just dispatched, and settles the step before."""
        bad = self.settle()
        self._pending = (step, metrics)
        return bad

    def settle(self) -> int | None:
        """Waits for the step pushed last and tells of it. Returns its number if the run has to stop for it."""
        if self._pending is None:
            return None
        (step, values), self._pending = self._pending, None
        metrics = {name: float(value) for name, value in values.items()}
        loss, norm = metrics["train/loss"], metrics["train/grad_norm"]
        healthy, every = math.isfinite(loss) and math.isfinite(norm), self.config.log_every
        if not healthy:
            then = "the update was skipped" if self.config.nonfinite == "skip" else "stopping before it"
            log.warning("step %d is not finite: loss %s, gradient norm %s; %s", step, loss, norm, then)
        elif metrics["train/loss_spike"] > SPIKE:
            log.warning(
                "step %d: loss %.4f lies %.1f deviations above its mean", step, loss, metrics["train/loss_spike"]
            )
        if (every and (step % every == 0 or step in (self.first + 1, self.config.steps))) or not healthy:
            self._tell(step, metrics)
        return None if healthy or self.config.nonfinite == "skip" else step

    def _tell(self, step: int, metrics: dict[str, float]) -> None:
        tokens = step * self.tokens_a_step
        speed = self.meter.report(step, tokens)
        self.sinks.log(step, {"tokens": tokens, "epoch": self.epoch(step), **metrics, **speed})
        rate = speed.get("perf/tokens_per_s", math.nan)
        eta = (self.config.steps - step) * self.tokens_a_step / rate if rate > 0 else None
        self.console.progress(step, metrics["train/loss"], rate, speed.get("perf/mfu"), eta)

    def evaluated(self, step: int, loss: float, bits_per_byte: float, best: bool) -> None:
        """Tells of an evaluation."""
        values = {"eval/loss": loss, "eval/bits_per_byte": bits_per_byte}
        self.sinks.log(step, {"tokens": step * self.tokens_a_step, **values})
        self.console.evaluation(step, loss, bits_per_byte, best)
