"""An evaluation's numbers among a run's metrics: its metrics.jsonl and its W&B run."""

from collections.abc import Mapping
from dataclasses import asdict

from config.schema import Config
from evaluation.results import Outcome
from runtime.locks import is_locked
from tracking.metrics_file import MetricsFile
from tracking.run_directory import RunDirectory
from tracking.sinks import WandbSink


def keys(tasks: Mapping[str, Outcome]) -> dict[str, float]:
    """`eval/TASK/METRIC` and `eval/TASK/METRIC_stderr`, as a run logs them."""
    found = {}
    for name, task in tasks.items():
        place = "eval/" + "".join(c if c.isalnum() or c in "._-" else "_" for c in name)
        for metric, value in task.metrics.items():
            found[f"{place}/{metric}"] = value.value
            if value.stderr is not None:
                found[f"{place}/{metric}_stderr"] = value.stderr
    return found


def tell_run(config: Config, directory: RunDirectory, step: int, tasks: Mapping[str, Outcome]) -> None:
    """Adds the numbers to a run: to its metrics.jsonl, unless it goes on right now, and to W&B under its id."""
    values = keys(tasks)
    if not is_locked(directory.path / ".lock"):
        file = MetricsFile(directory.metrics)
        file.log(step, values)
        file.close()
    sink = WandbSink(**asdict(config.wandb), run_id=config.run.id, config={}, directory=directory.path)
    sink.log_at(step, values)
    sink.close()
