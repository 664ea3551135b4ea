"""What a step's metrics become: log lines, progress, warnings. Reads them one step late, to keep the device busy."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict

import jax
import numpy as np

from model.config import ModelConfig
from model.counts import parameter_count
from parallel.mesh import slow_network_warning
from parallel.pipeline.schedules import PipelineSchedule
from performance.flops import Flops, count_flops
from performance.hardware import Peak
from performance.throughput import Spent, Throughput
from tracking.console import Console, bytes_text, duration, human
from tracking.metrics_file import MetricsFile, last_value
from tracking.run_directory import RunDirectory
from tracking.sinks import Sink, Sinks, TensorBoardSink, WandbSink
from training.config import TrainConfig, short_warmup_warning

log = logging.getLogger("isomesh.train")
EXPECTED_MFU = 0.35  # for the duration in the header, before anything was measured
SPIKE = 6.0  # standard deviations above the running mean that make a warning


def header(
    model: ModelConfig,
    train: TrainConfig,
    mesh: jax.sharding.Mesh,
    schedule: PipelineSchedule | None,
    peak: Peak,
    flops: Flops,
    memory,
    steps: int,
) -> dict[str, str]:
    """What a run says of itself before its first step. `memory` is the compiled step's."""
    count, tokens = parameter_count(model), train.batch_size * train.seq_len
    used = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    seconds = steps * tokens * flops.model / (peak.flops * mesh.size * EXPECTED_MFU)
    active = f", {human(count.active)} active in a token" if count.idle else ""
    expected = f"about {duration(seconds)}" if math.isfinite(seconds) else "unknown"
    return {
        "parameters": f"{human(count.total)}, {human(count.embedding)} of them in embeddings{active}",
        "mesh": " ".join(f"{axis}={n}" for axis, n in mesh.shape.items() if n > 1) or "one device",
        **({} if schedule is None else {"pipeline": _in_words(schedule)}),
        "devices": f"{mesh.size} x {mesh.devices.flat[0].device_kind}, processes: {jax.process_count()}",
        "a step": f"{human(tokens)} tokens ({train.batch_size} x {train.seq_len}), {train.compute_dtype}",
        "FLOPs a token": f"{human(flops.model)}, attention as the mask has it; {human(flops.full_attention)} with full "
        f"attention; {human(flops.hardware)} with what is computed again",
        "peak a device": f"{peak.flops / 1e9:,.1f} GFLOP/s, {peak.name}",
        "memory a device": f"{bytes_text(used)}, {bytes_text(memory.temp_size_in_bytes)} of them temporary",
        "expected": f"{expected} at {EXPECTED_MFU:.0%} of the peak",
    }


def _in_words(schedule: PipelineSchedule) -> str:
    said = f"{schedule.name}: {schedule.stages} stages, {schedule.microbatches} microbatches, {schedule.ticks} ticks, "
    said += f"at most {max(schedule.peak_in_flight())} in flight, predicted bubble {schedule.bubble():.0%}"
    waits = schedule.lockstep_bubble() > schedule.bubble() + 0.005
    return said + (f", {schedule.lockstep_bubble():.0%} in lockstep" if waits else "")


def _scalars(values: dict[str, jax.Array]) -> Iterator[tuple[str, float]]:
    """Metrics on the host; those by layer under a name for each layer."""
    for name, value in values.items():
        if value.ndim:
            yield from ((f"{name}/{layer:03d}", x) for layer, x in enumerate(np.asarray(value).tolist()))
        else:
            yield name, float(value)


class Reporter:
    """Tells of the steps of one run."""

    def __init__(self, config: TrainConfig, first: int, meter: Throughput, sinks: Sinks, console: Console, read):
        self.config, self.first, self.meter, self.sinks, self.console = config, first, meter, sinks, console
        self.read = read  # step -> metrics of the data read before it
        self.tokens_a_step = config.batch_size * config.seq_len
        self._pending: tuple[int, dict[str, jax.Array]] | None = None

    def push(self, step: int, metrics: dict[str, jax.Array]) -> int | None:
        """Takes the metrics of a step just dispatched, and settles the step before."""
        self.meter.dispatched(metrics["train/loss"])
        if step == self.first + 1 and self.config.log_every:  # now, so that a life that ends early has left its trace
            self.sinks.log(self.first, {"tokens": self.first * self.tokens_a_step, **self.meter.facts()})
        bad = self.settle()
        self._pending = (step, metrics)
        return bad

    def settle(self) -> int | None:
        """Waits for the step pushed last and tells of it. Returns its number if the run has to stop for it."""
        if self._pending is None:
            return None
        (step, values), self._pending = self._pending, None
        metrics = dict(_scalars(values))
        self.meter.finished()
        loss, norm, size = (metrics[f"train/{name}"] for name in ("loss", "grad_norm", "param_norm"))
        healthy, every = all(map(math.isfinite, (loss, norm, size))), self.config.log_every
        spiked = healthy and metrics["train/loss_spike"] > SPIKE
        self.sinks.stepped(step, metrics, finite=healthy, spiked=spiked)
        if not healthy:
            skips, applied = self.config.nonfinite == "skip", math.isfinite(loss) and math.isfinite(norm)
            then = "the update was skipped" if skips else "stopping before it"
            if applied:  # the step decides before it updates
                then = "entries that would overflow stay as they were" + ("" if skips else "; stopping after it")
            values = f"loss {loss}, gradient norm {norm}, parameter norm after it {size}"
            log.warning("step %d is not finite: %s; %s", step, values, then)
        elif spiked:
            log.warning(
                "step %d: loss %.4f lies %.1f deviations above its mean", step, loss, metrics["train/loss_spike"]
            )
        if (every and (step % every == 0 or step in (self.first + 1, self.config.steps))) or not healthy:
            self._tell(step, metrics)
        return None if healthy or self.config.nonfinite == "skip" else step

    def _tell(self, step: int, metrics: dict[str, float]) -> None:
        tokens = step * self.tokens_a_step
        speed = self.meter.report(step, tokens)
        self.sinks.log(step, {"tokens": tokens, **self.read(step), **metrics, **speed})
        rate = speed.get("perf/tokens_per_s", math.nan)
        eta = (self.config.steps - step) * self.tokens_a_step / rate if rate > 0 else None
        self.console.progress(step, metrics["train/loss"], rate, speed.get("perf/mfu"), eta)

    def evaluated(self, step: int, found, best: bool) -> None:
        """Tells of an evaluation; `found` is its training.heldout.Evaluation."""
        values = {"eval/loss": found.loss} | {f"eval/{name}": value for name, value in found.metrics.items()}
        values |= {} if found.bits_per_byte is None else {"eval/bits_per_byte": found.bits_per_byte}
        values |= {f"eval/loss/{name}": loss for name, loss in found.by_source.items()}
        self.sinks.log(step, {"tokens": step * self.tokens_a_step, **values})
        self.console.evaluation(step, found.loss, found.bits_per_byte, best, found.by_source | found.metrics)

    def answered(self, step: int, values: dict[str, float]) -> None:
        """Tells how a model did in the tasks of an evaluation, by the keys that are logged."""
        self.sinks.log(step, {"tokens": step * self.tokens_a_step, **values})
        shown = {key.removeprefix("eval/"): x for key, x in values.items() if not key.endswith("_stderr")}
        self.console.note(f"step {step}: {', '.join(f'{key} {x:.4g}' for key, x in shown.items())}")


def introduce(
    config,
    run: RunDirectory,
    job,
    console: Console,
    facts: dict[str, str],
    read: Callable[[int], dict[str, float]],
    peak: Peak,
    memory,
    compile_s: float,
    began: float,
    restored,
    more: list[Sink],
) -> Reporter:
    """Says what is about to be trained, and opens all that its metrics go to.

    `config` is the whole of a run's, `job` its training.job.Job, `facts` what else the header says, `read` gives the
    metrics of the data before a step, `memory` is the compiled step's, `restored` the checkpoint that it goes on from
    or None, `began` the clock when the process began, `more` the sinks that are open already.
    Raises OSError where metrics.jsonl cannot be cut to the step that the run goes on from.
    """
    t, mesh, primary = config.train, job.mesh, jax.process_index() == 0
    first = restored.step if restored else 0
    if job.trainable is not None:
        size = sum(leaf.size for leaf in jax.tree.leaves(job.saved["params"]))
        facts = {"trained": f"{human(size)} parameters, adapter={config.adapter.kind}"} | facts
    chosen = {"specs": job.description.specs, "trained": job.trainable}
    flops = count_flops(config.model, t, mesh, config.context.style, packed=config.data.segments, **chosen)
    console.header(header(config.model, t, mesh, job.schedule, peak, flops, memory, t.steps - first) | facts)
    for warning in filter(None, (slow_network_warning(mesh), short_warmup_warning(config.optimizer, t.steps))):
        console.warn(warning)
    console.compiled(compile_s, f"{time.perf_counter() - began:.1f} s since the start")
    earlier = Spent.before(
        last_value(run.metrics, "perf/wall_s"), restored and restored.record
    )  # before its lines are set aside
    if restored:
        console.note(f"resumed after step {first} from {restored.directory}")
    elif primary and run.set_metrics_aside():
        console.warn(f"{run.path} had metrics and no checkpoint: starting anew, the old lines are kept beside")
    meter = Throughput(flops, peak, mesh.size, job.schedule, began, compile_s, earlier)
    return Reporter(t, first, meter, open_sinks(config, run, peak, first, more, primary=primary), console, read)


def open_sinks(config, run: RunDirectory, peak: Peak, first: int, more: list[Sink], *, primary: bool) -> Sinks:
    """Where the metrics of a run go, besides `more`, ready for what comes after step `first`.

    `config` is the whole of a run's. Raises OSError where metrics.jsonl cannot be cut to that step.
    """
    sinks = [MetricsFile(run.metrics), *([TensorBoardSink(run.path / "tb")] if config.metrics.tensorboard else [])]
    logged = asdict(config) | {"peak": asdict(peak)}
    sinks.append(WandbSink(**asdict(config.wandb), run_id=config.run.id, config=logged, directory=run.path))
    sinks = Sinks([*sinks, *more], primary)
    sinks.resume(first)
    sinks.start()
    return sinks
