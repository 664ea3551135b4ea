"""Every legal layout of a run on so many devices: mesh x schedule x chunks x microbatches x remat x moments."""

import itertools
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from config.layout import context_requirements, requirements
from config.schema import Config
from parallel.config import ContextConfig
from parallel.mesh import AXES, MicrobatchRequirement, StageRequirement
from parallel.pipeline.schedules import DEFAULT_CHUNKS
from planner.cost import Planner
from planner.layout import Layout
from planner.software import SCHEDULES

STYLES = ("ring", "ulysses")  # gather is for short sequences, which are not cut
SCHEDULED = StageRequirement | MicrobatchRequirement  # what depends on a schedule, not on a mesh alone
SHORTEST = 1024  # tokens of a sequence that context leaves on a device
DEEPEST = 16  # times as many microbatches as stages: more shorten the bubble by less than a hundredth
SLOWEST = 3  # times as long a step as the best found so far: layouts that must take longer are not weighed
REMATS = ("none", "attention", "dots", "full")


@dataclass(frozen=True, slots=True)
class Weighed:
    """A layout with what decides its place; `Planner.predict` tells the rest."""

    layout: Layout
    step: float  # seconds
    memory: float  # bytes of a device


@dataclass(frozen=True)
class Found:
    """What a search has found: layouts that fit, the fastest first, and those that do not, the smallest first."""

    fitting: list[Weighed]
    too_large: list[Weighed]
    seconds: float  # that the search took

    @property
    def considered(self) -> int:
        """Layouts that were weighed."""
        return len(self.fitting) + len(self.too_large)

    def meshes(self) -> list[Weighed]:
        """The best layout of each mesh, the fastest first."""
        best: dict[tuple, Weighed] = {}
        for w in self.fitting:
            layout = w.layout
            mesh = (layout.pipe, layout.data, layout.fsdp, layout.expert, layout.context, layout.tensor)
            best.setdefault(mesh, w)
        return list(best.values())


@dataclass(frozen=True)
class Pins:
    """What the user has decided: only the keys that were given."""

    mesh: Mapping[str, int]  # by axis
    schedule: str | None = None
    chunks: int | None = None
    microbatches: int | None = None  # of a pipeline
    accumulation: int | None = None
    remat: str | None = None
    moment_dtype: str | None = None
    style: str | None = None

    def __post_init__(self):
        if self.schedule and self.schedule not in SCHEDULES:
            choices = ", ".join(SCHEDULES)
            raise ValueError(f"pipeline.schedule={self.schedule}: a planner weighs {choices}, and no table of a file")


def pins_of(config: Config, given: list[str]) -> Pins:
    """The pins of a config whose overrides are `given`, as key=value. An axis of -1 is left open."""
    keys = {override.partition("=")[0].lstrip("+~") for override in given}
    mesh = {axis: getattr(config.mesh, axis) for axis in AXES if f"mesh.{axis}" in keys}
    pick = lambda key, value: value if key in keys else None
    return Pins(
        {axis: size for axis, size in mesh.items() if size != -1},
        pick("pipeline.schedule", config.pipeline.schedule),
        pick("pipeline.chunks", config.pipeline.chunks) or None,
        pick("pipeline.microbatches", config.pipeline.microbatches) or None,
        pick("train.grad_accumulation", config.train.grad_accumulation),
        pick("train.remat", config.train.remat),
        pick("optimizer.moment_dtype", config.optimizer.moment_dtype),
        pick("context.style", config.context.style),
    )


def divisors(n: int) -> list[int]:
    """In rising order."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return small + [n // d for d in reversed(small) if d * d != n]


def meshes(config: Config, devices: int, pins: Pins) -> Iterator[dict[str, int]]:
    """All legal meshes of `devices` that keep the pins. A dense model has no use for the expert axis, and a sequence
    is cut over context only where that leaves SHORTEST tokens of it or more; unless they are pinned.
    """
    whole = replace(config, train=replace(config.train, grad_accumulation=1))
    later = (*context_requirements(config), *(r for r in requirements(whole) if isinstance(r, SCHEDULED)))
    asked = [r for r in requirements(whole) if r not in later]
    model, train = config.model, config.train
    most = {
        "pipe": model.layers,
        "data": train.batch_size,
        "fsdp": train.batch_size,
        "expert": model.experts or 1,
        "context": max(train.seq_len // SHORTEST, 1),
        "tensor": model.heads,
    }

    def spread(left: int, names: tuple[str, ...]) -> Iterator[dict[str, int]]:
        name, *others = names
        if name in pins.mesh:
            choices = [pins.mesh[name]] if left % pins.mesh[name] == 0 else []
        elif not others:
            choices = [left] if left <= most[name] else []
        else:
            choices = [d for d in divisors(left) if d <= most[name]]
        for size in choices:
            if not others and size != left:
                continue
            for rest in spread(left // size, tuple(others)) if others else ({},):
                yield {name: size} | rest

    for sizes in spread(devices, ("tensor", "context", "expert", "pipe", "data", "fsdp")):
        ordered = {axis: sizes[axis] for axis in AXES}
        if not any(r.problem(ordered) for r in asked):
            yield ordered


def layouts(
    config: Config,
    sizes: Mapping[str, int],
    pins: Pins,
    *,
    grouped: bool = False,
    schedules: tuple[str, ...] = SCHEDULES,
) -> Iterator[Layout]:
    """All layouts on one mesh, with the `schedules` that a program has. `grouped`: interleaved microbatches come in
    groups of as many as there are stages.
    """
    rows = config.train.batch_size // (sizes["data"] * sizes["fsdp"] * sizes["expert"])
    styles = _styles(config, sizes, pins)
    remats = [pins.remat] if pins.remat else REMATS
    layers, pipe = config.model.layers, sizes["pipe"]
    if pipe == 1:
        cuts = [pins.accumulation] if pins.accumulation else divisors(rows)
        for cut in cuts:
            if rows % cut == 0:
                for remat, style in itertools.product(remats, styles):
                    yield Layout(**sizes, microbatches=cut, remat=remat, style=style)
        return
    for schedule in [pins.schedule] if pins.schedule else schedules:
        for chunks in _chunks(schedule, layers, pipe, pins):
            for cut in [pins.microbatches] if pins.microbatches else divisors(rows):
                few = (
                    cut > DEEPEST * pipe
                    or (cut < pipe and cut < rows)
                    or (grouped and schedule == "interleaved" and cut % pipe)
                )
                if rows % cut == 0 and (not few or pins.microbatches):
                    how = {"schedule": schedule, "chunks": chunks, "microbatches": cut}
                    for remat, style in itertools.product(remats, styles):
                        yield Layout(**sizes, **how, remat=remat, style=style)


def _styles(config: Config, sizes: Mapping[str, int], pins: Pins) -> list[str]:
    """How attention may cross the context axis of a mesh; a placeholder where there is none."""
    if sizes["context"] == 1:
        return [config.context.style]
    of = lambda style: context_requirements(replace(config, context=ContextConfig(style)))
    styles = [pins.style] if pins.style else [config.context.style, *STYLES]
    return [style for style in dict.fromkeys(styles) if not any(r.problem(sizes) for r in of(style))]


def _chunks(schedule: str, layers: int, pipe: int, pins: Pins) -> list[int]:
    if schedule != "interleaved":
        return [n for n in [DEFAULT_CHUNKS[schedule]] if pipe * n <= layers]
    if pins.chunks:
        return [pins.chunks] if pipe * pins.chunks <= layers else []
    most = layers // pipe
    found = [n for n in divisors(most) if 1 < n <= 24] or ([2] if most >= 2 else [])
    return found[:: max(-(-len(found) // 4), 1)]  # four of them


def search(planner: Planner, pins: Pins) -> Found:
    """All layouts that may matter. Moments in 16 bits change a run's numbers: they are taken only where 32 bits do not
    fit. A mesh whose parameters, moments and gradients alone do not fit is left out while others fit, and so is one on
    which the least that a step can take is SLOWEST times the best that was found before.
    """
    began, limit = time.perf_counter(), planner.machine.limit
    fitting, too_large, left = [], [], []
    best = math.inf
    for sizes in meshes(planner.config, planner.devices, pins):
        at_least = least_memory(planner, sizes, pins)
        if at_least > limit:
            left.append((at_least, sizes))
            continue
        for number, weighed in enumerate(_weighed(planner, sizes, pins)):
            if weighed.memory > limit:
                too_large.append(weighed)
            else:
                fitting.append(weighed)
                best = min(best, weighed.step)
            if number == 0 and least_step(planner, weighed.layout) > SLOWEST * best:
                break
    smallest = min((w.memory for w in too_large), default=math.inf)
    for at_least, sizes in sorted(left, key=lambda one: one[0]) if not fitting else ():
        if at_least < smallest:
            too_large += _weighed(planner, sizes, pins)
            smallest = min(w.memory for w in too_large) if too_large else smallest
    fitting.sort(key=lambda w: w.step)
    too_large.sort(key=lambda w: w.memory)
    return Found(fitting, too_large, time.perf_counter() - began)


def _weighed(planner: Planner, sizes: Mapping[str, int], pins: Pins) -> Iterator[Weighed]:
    """The layouts on one mesh, each with its time and its memory."""
    config, software, limit, asked = planner.config, planner.software, planner.machine.limit, pins.moment_dtype
    halved = _may_halve(planner, pins)
    for layout in layouts(config, sizes, pins, grouped=not software.lockstep, schedules=software.schedules):
        layout = replace(layout, moment_dtype=asked) if asked else layout
        step, memory = planner.weigh(layout)
        if memory > limit and halved and memory - planner.saved_by_halving(layout) <= limit:
            layout = replace(layout, moment_dtype="bfloat16")
            step, memory = planner.weigh(layout)
        yield Weighed(layout, step, memory)


def _may_halve(planner: Planner, pins: Pins) -> bool:
    """Whether moments in 16 bits are a choice."""
    wide = planner.config.optimizer.name != "adafactor" and planner.config.train.param_dtype == "float32"
    return pins.moment_dtype is None and wide and planner.software.narrow_moments


def least_memory(planner: Planner, sizes: Mapping[str, int], pins: Pins) -> float:
    """Bytes of a device on a mesh, for parameters, their moments and their gradients alone."""
    narrow = "bfloat16" if _may_halve(planner, pins) else pins.moment_dtype or ""
    return planner.state_bytes(Layout(**sizes, moment_dtype=narrow))


def least_step(planner: Planner, layout: Layout) -> float:
    """Seconds that a step takes on the mesh of this layout at least: without a pipeline's bubble, with the fewest
    microbatches, nothing computed again unless the layout says so.
    """
    return planner.base(layout).together
