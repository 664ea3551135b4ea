"""Efficiency factors from real runs: python -m planner calibrate RUN [RUN ...] fits them and keeps them by machine.

A run tells its layout (config.yaml) and how long its steps took (metrics.jsonl). The shares of the data sheet's figures
that machines sustain (`planner.machine.Sustained`) are moved as far as the runs ask for, and no further: what no run
tells of stays as it is.
"""

import json
import math
import re
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from scipy.optimize import least_squares

from config.compose import load_run
from config.layout import mesh_sizes
from config.schema import Config
from parallel.config import schedule_for
from planner.cost import Planner, Prediction
from planner.layout import Layout, layout_of
from planner.machine import Machine, Sustained, calibration_file, known, open_machine, written
from planner.software import program

TRUST = 0.1  # in the factors as they were: a change by this share weighs as much as a prediction that is off by it
BOUNDS = 0.02, 1.5


@dataclass(frozen=True)
class Observation:
    """What a run tells."""

    path: Path
    config: Config
    hardware: str
    devices: int
    layout: Layout
    step: float  # seconds
    memory: float | None  # bytes of a device that the compiled step needs

    def predicted(self, machine: Machine) -> Prediction:
        """Of the run's layout on a machine like this."""
        return Planner(self.config, machine, self.devices, program("isomesh", machine.platform)).predict(self.layout)


def observe(path: Path, devices: int | None = None) -> Observation:
    """Reads a run. Raises ValueError where it tells too little."""
    config, metrics = load_run(path), path / "metrics.jsonl"
    steps, memory, peak = [], None, ""
    for line in metrics.read_text().splitlines() if metrics.is_file() else ():
        try:
            record = json.loads(line)
        except ValueError:  # a damaged line
            continue
        peak, memory = record.get("perf/peak", peak), record.get("perf/memory_gb", memory)
        steps += [record["perf/step_ms"]] if record.get("perf/step_ms") else []
    steps = steps[1:] if len(steps) > 1 else steps  # the first line is that of the first step
    if not steps:
        raise ValueError(f"{metrics} has no perf/step_ms: run with train.log_every below train.steps")
    hardware = _hardware(peak)
    if hardware is None:
        raise ValueError(
            f"{path} ran on {peak or 'an unknown device'}, and machines are known for {', '.join(known())}"
        )
    count = devices or _devices(config, hardware)
    if count is None:
        raise ValueError(f"{path} does not say on how many devices it ran, since mesh.fsdp=-1: add --devices N")
    sizes = mesh_sizes(config, count)
    schedule = schedule_for(config.pipeline, config.train.batch_size // config.train.grad_accumulation, sizes)
    layout = layout_of(config, sizes, schedule and schedule.microbatches)
    size = None if memory is None else 1e9 * memory
    return Observation(path, config, hardware, count, layout, statistics.median(steps) / 1e3, size)


def _hardware(peak: str) -> str | None:
    """The machine that a run's perf/peak names."""
    kind = peak.partition(",")[0]
    found = next((name for name in known() if re.search(open_machine(name).kind, kind)), None)
    return found or ("cpu" if " cores" in peak else None)


def _devices(config: Config, hardware: str) -> int | None:
    sizes = config.mesh.sizes.values()
    if -1 not in sizes:
        return math.prod(sizes)
    return config.runtime.cpu_devices * (config.runtime.processes or 1) if hardware == "cpu" else None


def fit(observations: list[Observation], machine: Machine) -> Sustained:
    """The factors with which predictions come closest to the runs, in the logarithm, near those of the machine."""
    names = list(asdict(machine.sustained))
    before = np.array([getattr(machine.sustained, name) for name in names])

    def off(logarithms: np.ndarray) -> np.ndarray:
        tried = replace(machine, sustained=Sustained(**dict(zip(names, np.exp(logarithms), strict=True))))
        errors = [math.log(o.predicted(tried).step / o.step) for o in observations]
        return np.array([*errors, *(TRUST * (logarithms - np.log(before)))])

    found = least_squares(off, np.log(before), bounds=np.log(BOUNDS))
    return Sustained(**{name: round(float(x), 4) for name, x in zip(names, np.exp(found.x), strict=True)})


def calibrate(paths: list[Path], devices: int | None = None) -> str:
    """Fits and keeps the factors of every machine that the runs ran on; returns what to tell. Raises ValueError."""
    observations, lines = [observe(path, devices) for path in paths], []
    for name in sorted({o.hardware for o in observations}):
        ours, plain = [o for o in observations if o.hardware == name], open_machine(name, calibrated=False)
        sustained = fit(ours, plain)
        fitted = replace(plain, sustained=sustained)
        lines.append(f"{plain.name}, {len(ours)} runs")
        for o in ours:
            before, after = (o.predicted(machine) for machine in (plain, fitted))
            memory = after.memory.total - after.memory.fragmentation
            held = "" if o.memory is None else f"; memory {memory / o.memory - 1:+.1%} of {o.memory / 1e9:.2f} GB"
            errors = f"{before.step / o.step - 1:+.1%} before, {after.step / o.step - 1:+.1%} now"
            lines.append(f"  {o.path}: {1e3 * o.step:,.1f} ms a step, predicted {errors}{held}")
        kept = {"sustained": asdict(sustained), "runs": len(ours), "date": time.strftime("%Y-%m-%d")}
        file = calibration_file(name)
        written(file, json.dumps(kept, indent=1).encode())
        factors = ", ".join(f"{key} {value:g}" for key, value in asdict(sustained).items())
        lines.append(f"  sustained: {factors}; kept in {file}")
    return "\n".join(lines)
