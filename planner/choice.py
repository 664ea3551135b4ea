"""The planner inside a run: the layout that mesh=auto takes, and what a run's header and metrics say was predicted."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from config.schema import Config
from parallel.axes import AXES
from parallel.config import ContextConfig, schedule_for
from parallel.mesh import MeshConfig
from planner.cost import Planner
from planner.explain import duration
from planner.layout import layout_of
from planner.machine import Machine, known, machine_of
from planner.search import Pins, search
from planner.software import program
from runtime.memory import temporary_bytes

Read = Callable[[int], Mapping[str, float]]


def planned(config: Config, devices: Sequence[Any]) -> Config:
    """The config of a run on these jax devices; with mesh=auto the fastest layout that fits, by prediction.

    What differs from its default is kept: axes of the mesh, schedule, microbatches, remat. Nothing is changed that
    changes a run's numbers. Raises ValueError where no machine is known for the devices, or no layout fits.
    """
    if not config.mesh.auto:
        return config
    kind, machine = devices[0].device_kind, _machine(devices)
    if machine is None:
        raise ValueError(
            f"mesh=auto: no machine is known for {kind}, but for {', '.join(known())}; set mesh.* yourself"
        )
    planner = Planner(config, machine, len(devices), program("isomesh", machine.platform))
    found = search(planner, _pins(config))
    if not found.fitting:
        why = f"the smallest needs {found.too_large[0].memory / 1e9:.1f} GB" if found.too_large else "none is legal"
        raise ValueError(f"mesh=auto: no layout on {len(devices)} x {kind} fits ({why}); python -m planner tells more")
    layout = found.fitting[0].layout
    chosen = layout.applied(config)
    return replace(chosen, mesh=replace(chosen.mesh, auto=True))


def _pins(config: Config) -> Pins:
    """What a run's config has decided: whatever is not as by default, and all that its numbers depend on."""
    default, pipeline, train = MeshConfig(), config.pipeline, config.train
    sizes = {axis: getattr(config.mesh, axis) for axis in AXES}
    return Pins(
        {axis: size for axis, size in sizes.items() if size not in (getattr(default, axis), -1)},
        schedule=None if pipeline == type(pipeline)() else pipeline.schedule,
        chunks=pipeline.chunks or None,
        microbatches=pipeline.microbatches or None,
        accumulation=train.grad_accumulation if train.grad_accumulation > 1 else None,
        remat=train.remat if train.remat != "none" else None,
        moment_dtype=config.optimizer.moment_dtype,
        style=config.context.style if config.context.style != ContextConfig().style else None,
    )


def _machine(devices: Sequence[Any]) -> Machine | None:
    """The machine of these devices, with the memory that they say they have."""
    machine = machine_of(devices[0].device_kind)
    if machine is None:
        return None
    if machine.platform == "cpu":
        return replace(machine, memory_gib=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    limit = (devices[0].memory_stats() or {}).get("bytes_limit")
    return machine if limit is None else replace(machine, memory_gib=limit / 2**30, usable=1.0)


def forecast(config: Config, mesh: Any, memory: Any, facts: dict[str, str], read: Read) -> tuple[dict[str, str], Read]:
    """A run's facts and the metrics of its steps, with what was predicted beside them.

    mesh: the jax Mesh; memory: the compiled step's account; facts: what the header says; read: step -> metrics.
    """
    devices, sizes = list(mesh.devices.flat), dict(mesh.shape)
    used = (memory.argument_size_in_bytes + temporary_bytes(memory, devices[0].platform)) / 1e9
    machine, metrics = _machine(devices), {"perf/memory_gb": used}
    schedule = schedule_for(config.pipeline, config.train.batch_size // config.train.grad_accumulation, sizes)
    of_a_file = config.pipeline.schedule.endswith(".csv")
    if machine is None or config.train.compute_dtype not in machine.peak_tflops or of_a_file:
        return facts, lambda step: {**read(step), **metrics}
    planner = Planner(config, machine, len(devices), program("isomesh", machine.platform))
    p = planner.predict(layout_of(config, sizes, schedule and schedule.microbatches))
    needed = (p.memory.total - p.memory.fragmentation) / 1e9
    metrics |= {"perf/predicted_step_ms": 1e3 * p.step, "perf/predicted_memory_gb": needed}
    how = "mesh=auto: " if config.mesh.auto else ""
    told = f"{how}{duration(p.step)} a step, MFU {p.mfu:.0%}, {needed:,.2f} GB a device; the compiler says {used:,.2f}"
    return facts | {"predicted": told}, lambda step: {**read(step), **metrics}
