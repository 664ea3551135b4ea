"""A run's metrics for Prometheus: the newest values at http://HOST:PORT/metrics. Their names: docs/metrics.md.

Written on the standard library, since training needs no package that only servers need. The loop replaces a few dicts
and waits for nobody; a scrape is rendered in a thread of its own, from what those dicts held at that moment.
"""

import contextlib
import math
import re
import time
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from runtime.scrapes import Scrapes
from tracking.sinks import MetricsConfig, Sink


class Exported(NamedTuple):
    """How a key of metrics.jsonl is exported: in base units, under a name that ends as Prometheus has it."""

    name: str
    help: str
    scale: float = 1.0  # what the key's value is multiplied by
    labels: tuple[str, ...] = ()  # what the rest of the key, behind this one and divided by /, is called
    kind: str = "gauge"


# Steps and tokens go back where a run resumes from an earlier checkpoint, so they are gauges: deriv(), not rate().
KEYS = {
    "step": Exported("train_step", "Steps done."),
    "tokens": Exported("train_tokens", "Tokens read until then."),
    "epoch": Exported("train_epoch", "Passes over the data."),
    "train/loss": Exported("train_loss", "Mean cross-entropy of the newest step, in nats a token."),
    "train/accuracy": Exported("train_accuracy_ratio", "Share of tokens that were predicted rightly."),
    "train/grad_norm": Exported("train_grad_norm", "Global norm of the gradient before clipping."),
    "train/grad_norm_ratio": Exported("train_grad_norm_ratio", "Norm of the gradient over its running mean."),
    "train/param_norm": Exported("train_param_norm", "Global norm of the parameters after the step."),
    "train/loss_spike": Exported("train_loss_spike", "Deviations of the loss above its running mean."),
    "train/lr": Exported("train_learning_rate", "Learning rate of the step."),
    "train/skipped": Exported("train_skipped_steps", "Steps that were not finite and were left out."),
    "train/z_loss": Exported("train_z_loss", "The z-loss, in nats a token."),
    "eval/loss": Exported("eval_loss", "Cross-entropy of the held-out text, in nats a token."),
    "eval/bits_per_byte": Exported("eval_bpb", "Bits for each byte of the held-out text."),
    "eval/loss/": Exported("eval_source_loss", "eval_loss of one source of a mixture.", labels=("source",)),
    "eval/": Exported("eval_task", "How well the model does in a task.", labels=("task", "metric")),
    "data/share/": Exported("data_share_ratio", "Share of the sequences read from a source.", labels=("source",)),
    "data/epoch/": Exported("data_epoch", "Passes over a source.", labels=("source",)),
    "moe/load_max_over_mean": Exported("moe_load_max_over_mean", "Tokens of the busiest expert over the mean."),
    "moe/load/": Exported("moe_load", "The same of one layer.", labels=("layer",)),
    "moe/dropped": Exported("moe_dropped_ratio", "Share of assignments beyond an expert's capacity."),
    "moe/router_entropy": Exported("moe_router_entropy", "Entropy of a token's scores, in nats."),
    "moe/auxiliary_loss": Exported("moe_auxiliary_loss", "Balance and z-losses of routers, in nats a token."),
    "perf/tokens_per_s": Exported("perf_tokens_per_second", "Tokens a second of the whole mesh."),
    "perf/step_ms": Exported("perf_step_seconds", "From the end of a step to the end of the next.", 1e-3),
    "perf/device_ms": Exported("perf_device_seconds", "Of a step: the device was busy.", 1e-3),
    "perf/data_wait_ms": Exported("perf_data_wait_seconds", "Of a step: the loop waited for data.", 1e-3),
    "perf/host_ms": Exported("perf_host_seconds", "Of a step: the device waited for the host.", 1e-3),
    "perf/model_tflops_per_device": Exported("perf_model_flops_per_second", "Model FLOPs, of one device.", 1e12),
    "perf/mfu": Exported("perf_mfu_ratio", "Model FLOPs over the device's peak."),
    "perf/mfu_full_attention": Exported("perf_mfu_full_attention_ratio", "The same as if attention were full."),
    "perf/hfu": Exported("perf_hfu_ratio", "The same with what is computed again."),
    "perf/memory_gb": Exported("perf_memory_bytes", "What the compiled step needs on a device.", 1e9),
    "perf/predicted_step_ms": Exported("perf_predicted_step_seconds", "A step, as the planner predicts it.", 1e-3),
    "perf/predicted_memory_gb": Exported("perf_predicted_memory_bytes", "Of a device, as predicted.", 1e9),
    "perf/bubble": Exported("perf_bubble_ratio", "Idle share of a pipeline's stages, as predicted."),
    "perf/wall_s": Exported("perf_wall_seconds", "Wall time of all lives of the run."),
    "perf/goodput": Exported("perf_goodput_ratio", "Of that time, steps whose results the run still has."),
    "perf/peak_tflops": Exported("perf_peak_flops_per_second", "Peak of one device.", 1e12),
    "perf/compile_s": Exported("perf_compile_seconds", "Compiling the training step."),
    "perf/startup_s": Exported("perf_startup_seconds", "From the start of the process to its first step."),
}
# What no line of metrics.jsonl says.
STARTED = Exported("train_start_timestamp_seconds", "When this life of the run began.")
LAST_STEP = Exported("train_last_step_timestamp_seconds", "When the newest step was done.")
PLANNED = Exported("train_planned_steps", "Steps that the run is to have at its end.")
SPIKES = Exported("train_loss_spikes_total", "Steps whose loss was a spike, in this life.", kind="counter")
NONFINITE = Exported("train_nonfinite_steps_total", "Steps that were not finite, in this life.", kind="counter")
INFO = Exported("run_info", "The run that the other metrics are of.", labels=("run",))
BESIDE = (STARTED, LAST_STEP, PLANNED, SPIKES, NONFINITE, INFO)

Values = dict[tuple[Exported, tuple[str, ...]], float]  # (metric, values of its labels) -> value


def exported(key: str) -> tuple[Exported, tuple[str, ...]]:
    """What a key of metrics.jsonl is exported as, with the values of its labels."""
    if key in KEYS and not KEYS[key].labels:
        return KEYS[key], ()
    for start in sorted((start for start in KEYS if start.endswith("/") and key.startswith(start)), key=len)[::-1]:
        rest = key.removeprefix(start).split("/", len(KEYS[start].labels) - 1)
        if len(rest) == len(KEYS[start].labels):
            return KEYS[start], tuple(rest)
    return Exported(re.sub(r"\W", "_", key, flags=re.ASCII), f"{key} of metrics.jsonl."), ()


def render(values: Values) -> str:
    """Prometheus' text format 0.0.4: each metric with its help, its type and its samples together."""
    by_metric: dict[Exported, list[str]] = {}
    for (metric, labels), value in values.items():
        pairs = ",".join(f'{name}="{_escaped(text)}"' for name, text in zip(metric.labels, labels, strict=True))
        sample = f"isomesh_{metric.name}{f'{{{pairs}}}' if pairs else ''} {_number(value)}"
        by_metric.setdefault(metric, []).append(sample)
    lines = []
    for metric, samples in by_metric.items():
        name = f"isomesh_{metric.name}"
        lines += [f"# HELP {name} {metric.help}", f"# TYPE {name} {metric.kind}", *samples]
    return "".join(f"{line}\n" for line in lines)


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    if math.isfinite(value):
        return repr(value)
    return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"


class PrometheusSink(Sink):
    """Answers scrapes from its construction to `close`. Raises ValueError where the port cannot be had.

    run: its name, planned: steps that it is to have; both are told with the metrics.
    """

    def __init__(self, host: str, port: int, run: str, planned: int):
        counts = {(SPIKES, ()): 0.0, (NONFINITE, ()): 0.0}
        self._values: Values = {(INFO, (run,)): 1.0, (STARTED, ()): time.time(), (PLANNED, ()): planned, **counts}
        self._scrapes = Scrapes(host, port, self.text, "metrics.prometheus_host=", "metrics.prometheus_port=")
        self.port = self._scrapes.port

    def log(self, step: int, metrics: dict) -> None:
        self._take({"step": step, **metrics})

    def stepped(self, step: int, metrics: dict, *, finite: bool, spiked: bool) -> None:
        """Counts spikes and steps that were not finite, and notes when the step was done."""
        self._take({"step": step, **metrics})
        counts = {SPIKES: spiked, NONFINITE: not finite}
        more = {(metric, ()): self._values[metric, ()] + count for metric, count in counts.items()}
        self._values = self._values | more | {(LAST_STEP, ()): time.time()}

    def _take(self, metrics: Mapping) -> None:
        numbers = {key: float(value) for key, value in metrics.items() if not isinstance(value, str)}
        named = {exported(key): value for key, value in numbers.items()}
        # a new dict each time: a scrape that is being rendered has its own
        self._values = self._values | {at: value * at[0].scale for at, value in named.items()}

    def text(self) -> str:
        """What a scrape is answered with."""
        return render(self._values)

    def close(self) -> None:
        if self._scrapes is not None:
            self._scrapes.close()
            self._scrapes = None


@contextlib.contextmanager
def exporter(config: MetricsConfig, run: str, planned: int, primary: bool) -> Iterator[list[Sink]]:
    """The sink that answers scrapes while what is inside runs; none where the port is 0, or in any but process 0."""
    if not config.prometheus_port or not primary:
        yield []
        return
    with contextlib.closing(PrometheusSink(config.prometheus_host, config.prometheus_port, run, planned)) as sink:
        yield [sink]
