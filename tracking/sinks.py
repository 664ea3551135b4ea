"""Where a run's metrics are written: metrics.jsonl, W&B, TensorBoard. What they mean: docs/metrics.md.

Prometheus' is in prometheus.py.
"""

import contextlib
import dataclasses
import importlib.util
import logging
import os
from pathlib import Path

log = logging.getLogger("isomesh.metrics")

WANDB_MODES = ("offline", "online", "disabled")


@dataclasses.dataclass(frozen=True)
class WandbConfig:
    """How a run is told to Weights & Biases. Raises ValueError for an unknown mode or an empty project."""

    mode: str = "offline"  # offline (upload later with `wandb sync`) | online | disabled
    project: str = "isomesh"  # W&B project
    entity: str | None = None  # W&B user or team; null: the account's default
    name: str | None = None  # display name; null: W&B invents one
    group: str | None = None  # groups the runs of a sweep or of several seeds
    tags: tuple[str, ...] = ()  # labels to filter by

    def __post_init__(self):
        if self.mode not in WANDB_MODES:
            raise ValueError(f"wandb.mode={self.mode} is unknown; choose one of {', '.join(WANDB_MODES)}")
        if not self.project:
            raise ValueError("wandb.project is empty; name a project, or set wandb.mode=disabled")


@dataclasses.dataclass(frozen=True)
class MetricsConfig:
    """Where metrics go besides metrics.jsonl and W&B.

    Raises ValueError for a port that is none, an empty host, or TensorBoard without the package that writes its files.
    """

    tensorboard: bool = False  # also write TensorBoard event files (needs the extra `tensorboard`)
    prometheus_port: int = 0  # process 0 answers Prometheus here, at /metrics; 0: off
    prometheus_host: str = "127.0.0.1"  # the address of that port; 0.0.0.0: other machines may read the metrics

    def __post_init__(self):
        if self.tensorboard and importlib.util.find_spec("tensorboardX") is None:
            raise ValueError(NO_TENSORBOARD)
        if not 0 <= self.prometheus_port < 2**16:
            raise ValueError(f"metrics.prometheus_port={self.prometheus_port} is no port: 1 to {2**16 - 1}, 0 for none")
        if not self.prometheus_host:
            raise ValueError("metrics.prometheus_host is empty; 127.0.0.1 is this machine, 0.0.0.0 all")


NO_TENSORBOARD = "tensorboardX is not installed; install the extra `tensorboard`, or set metrics.tensorboard=false"

# ---------------------------------------------------------------------------------------------------------------------
# Sinks: none of them may stop a run that trains


class Sink:
    """Where metrics go. Constructing a sink touches nothing; `start`, or else the first use, opens it."""

    def start(self) -> None:
        """Opens it, after `resume`; a second call does nothing."""

    def resume(self, step: int) -> None:
        """Forgets what lies after step `step`, the last one that the run still has; comes before anything is logged.

        Raises OSError where that cannot be forgotten.
        """

    def log(self, step: int, metrics: dict) -> None:
        """Takes metrics after `step` steps by their logged names; values are numbers, strings or booleans."""

    def stepped(self, step: int, metrics: dict, *, finite: bool, spiked: bool) -> None:
        """Takes a step's metrics, every step's and not only those that are logged.

        finite: loss and norms are numbers. spiked: the loss lies far above its running mean.
        """

    def log_samples(self, step: int, rows: list[tuple[str, str]]) -> None:
        """Takes texts of the model after `step` steps, as (prompt, continuation)."""

    def close(self) -> None:
        """Writes what is left and lets go of files and ports; a second call does nothing."""


class Sinks(Sink):
    """Hands everything to each sink in turn; on any but the primary process to none."""

    def __init__(self, sinks: list[Sink], primary: bool):
        self.sinks = sinks if primary else []

    def start(self) -> None:
        for sink in self.sinks:
            sink.start()

    def resume(self, step: int) -> None:
        for sink in self.sinks:
            sink.resume(step)

    def log(self, step: int, metrics: dict) -> None:
        for sink in self.sinks:
            sink.log(step, metrics)

    def stepped(self, step: int, metrics: dict, *, finite: bool, spiked: bool) -> None:
        for sink in self.sinks:
            sink.stepped(step, metrics, finite=finite, spiked=spiked)

    def log_samples(self, step: int, rows: list[tuple[str, str]]) -> None:
        for sink in self.sinks:
            sink.log_samples(step, rows)

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()


class WandbSink(Sink):
    """The same keys in Weights & Biases, under a run id that stays the same across restarts.

    mode: offline (files under directory/wandb, uploaded later by `wandb sync`), online, or disabled, which does not
    even import wandb. Whatever fails in W&B is one warning, and the run trains on without it.
    """

    def __init__(self, mode, project, entity, run_id, name, group, tags, config: dict, directory):
        self.mode, self.directory = mode, Path(directory)
        self._options = {"mode": mode, "project": project, "entity": entity, "id": run_id, "resume": "allow"}
        self._options |= {"name": name, "group": group, "tags": list(tags), "config": config, "dir": str(directory)}
        self._run = None

    def start(self) -> None:
        if self.mode == "disabled" or self._run is not None:
            return
        with self._guard():
            self.directory.mkdir(parents=True, exist_ok=True)
            import wandb

            # The console belongs to the run: W&B neither prints nor captures.
            self._run = wandb.init(**self._options, settings=wandb.Settings(silent=True, console="off"))

    def log(self, step: int, metrics: dict) -> None:
        self.start()
        with self._guard():
            if self._run is not None:
                values = {k: v.item() if hasattr(v, "item") else v for k, v in metrics.items()}
                self._run.log({"step": step, **values}, step=step)

    def log_at(self, step: int, metrics: dict) -> None:
        """Logs metrics of a step that the run may have passed, as a later evaluation of it does.

        W&B takes its own steps in order only, so these are drawn over the value `step`.
        """
        self.start()
        with self._guard():
            if self._run is not None:
                for key in metrics:
                    self._run.define_metric(key, step_metric="step")
                self._run.log({"step": step, **metrics})

    def log_samples(self, step: int, rows: list[tuple[str, str]]) -> None:
        """Logs (prompt, continuation) pairs as the table `samples`."""
        self.start()
        with self._guard():
            if self._run is not None:
                import wandb

                table = wandb.Table(columns=["step", "prompt", "continuation"], data=[[step, *row] for row in rows])
                self._run.log({"samples": table}, step=step)

    def finish(self) -> None:
        """Flushes and ends the W&B run; it can be resumed under the same id."""
        with self._guard():
            run, self._run = self._run, None
            if run is not None:
                run.finish()

    close = finish  # the name that all sinks share

    @contextlib.contextmanager
    def _guard(self):
        try:
            yield
        except Exception as error:
            self._run, self.mode = None, "disabled"
            lines = str(error).strip().splitlines() or [type(error).__name__]
            log.warning("W&B failed (%s); the run goes on without it", lines[0])


class TensorBoardSink(Sink):
    """The same keys as TensorBoard event files. Raises ValueError when tensorboardX is not installed."""

    def __init__(self, directory: str | os.PathLike):
        if importlib.util.find_spec("tensorboardX") is None:
            raise ValueError(NO_TENSORBOARD)
        self.directory = Path(directory)
        self._writer = None

    def log(self, step: int, metrics: dict) -> None:
        for key, value in metrics.items():
            if not isinstance(value, str):
                self._open(step).add_scalar(key, float(value), step)

    def log_samples(self, step: int, rows: list[tuple[str, str]]) -> None:
        for number, (prompt, continuation) in enumerate(rows):
            self._open(step).add_text(f"samples/{number}", f"**{prompt}**{continuation}", step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _open(self, step: int):
        if self._writer is None:
            from tensorboardX import SummaryWriter

            # An earlier life of the run may have gone further than its last checkpoint: this one begins here.
            self._writer = SummaryWriter(str(self.directory), purge_step=step)
        return self._writer
