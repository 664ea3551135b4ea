"""Words about a plan: the table, why the second lost, what binds, how far from the roofline, what would fit."""

import contextlib
import math
from dataclasses import replace

from config.layout import requirements
from parallel.mesh import AXES, MeshConfig, resolve
from planner.cost import Planner, Prediction
from planner.reliability import reliability
from planner.search import Found, Pins, Weighed, meshes, search

WORDS = {
    "matmul": "matmuls",
    "attention": "attention",
    "memory": "elementwise work (memory bandwidth)",
    "kernels": "gaps between kernels",
    "optimizer": "the optimizer",
    "bubble": "the pipeline's bubble",
    "uncounted": "what is not counted",
}
COMPUTING = ("matmul", "attention", "memory", "kernels", "optimizer")
MOST_DEVICES = 4096  # that are tried where fewer do not do
SAVE_GB_S = 2.0  # that a device writes of a checkpoint, before training goes on


def duration(seconds: float) -> str:
    """Of a step."""
    return f"{seconds * 1e3:,.1f} ms" if seconds < 10 else f"{seconds:,.2f} s"


def word(part: str) -> str:
    """What a part of a step is called."""
    return WORDS.get(part, f"exchanges over {part}")


def link(planner: Planner, prediction: Prediction, axis: str) -> str:
    """The network that an axis runs over."""
    line = planner.lines(prediction.layout)[axis]
    fast = "the torus" if planner.machine.torus else "the fast network inside a domain"
    return fast if line.within == line.size else "the network between domains"


def table(planner: Planner, weighed: list[Weighed]) -> str:
    """One line a layout, the fastest first."""
    head = f"{'':>3}{'step':>12}{'tokens/s':>13}{'MFU':>7}{'HFU':>7}{'GB':>8}{'bubble':>8}{'waits':>7}  layout"
    lines = [head]
    for place, p in enumerate((planner.predict(w.layout) for w in weighed), 1):
        waits = sum(seconds for part, seconds in p.seconds.items() if part not in WORDS)
        shares = f"{p.seconds.get('bubble', 0) / p.step:>8.1%}{waits / p.step:>7.1%}"
        rates = f"{duration(p.step):>12}{p.tokens_per_s:>13,.0f}{p.mfu:>7.1%}{p.hfu:>7.1%}"
        moments = ", moments in 16 bits" if p.layout.moment_dtype else ""
        lines.append(f"{place:>3}{rates}{p.memory.total / 1e9:>8.1f}{shares}  {p.layout.told()}{moments}")
    return "\n".join(lines)


def why_second(best: Prediction, second: Prediction) -> str:
    """Why the runner-up lost: the parts of a step that it has more of."""
    more = {
        part: second.seconds.get(part, 0.0) - best.seconds.get(part, 0.0) for part in {*best.seconds, *second.seconds}
    }
    worst = sorted((part for part in more if more[part] > 0 and part != "uncounted"), key=lambda part: -more[part])[:2]
    slower = second.step / best.step - 1
    if not worst or slower < 1e-6:
        return f"{second.layout.told()} is as fast"
    causes = " and ".join(f"{word(part)} +{duration(more[part])}" for part in worst)
    return f"{second.layout.told()} is {slower:.1%} slower: {causes}"


def what_binds(planner: Planner, p: Prediction, found: Found) -> list[str]:
    """The largest part of a step, and whether memory forbids something faster."""
    largest = max((part for part in p.seconds if part != "uncounted"), key=lambda part: p.seconds[part])
    over = f" on {link(planner, p, largest)}" if largest not in WORDS else ""
    lines = [f"{word(largest)}{over}: {p.seconds[largest] / p.step:.0%} of a step"]
    waits = {axis: seconds for axis, seconds in p.seconds.items() if axis not in WORDS and seconds > 0.01 * p.step}
    for axis, seconds in sorted(waits.items(), key=lambda item: -item[1]):
        hidden = p.hidden.get(axis, 0.0)
        beside = f", {duration(hidden)} more run beside computation" if hidden else ""
        lines.append(f"exchanges over {axis} on {link(planner, p, axis)}: {seconds / p.step:.1%} of a step{beside}")
    faster = min((w for w in found.too_large if w.step < p.step), key=lambda w: w.step, default=None)
    if faster is not None:
        told = f"{faster.layout.told()} would be {p.step / faster.step - 1:.1%} faster"
        lines.append(f"memory: {told} with {faster.memory / 1e9:.1f} GB a device, of {p.limit / 1e9:.1f}")
    return lines


def roofline(planner: Planner, p: Prediction) -> str:
    """How far the plan is from what the data sheet allows."""
    least = p.flops / p.peak
    lost = {part: seconds for part, seconds in p.seconds.items() if part not in ("matmul", "attention")}
    useful = p.seconds["matmul"] + p.seconds["attention"]
    rate = f"{duration(useful - least)} since matmuls and attention run below the peak or again"
    rest = ", ".join(f"{word(part)} {duration(s)}" for part, s in sorted(lost.items(), key=lambda x: -x[1])[:3])
    return f"{duration(least)} at the peak, {p.step / least:.2f} times that: {rate}; {rest}"


def memory_told(p: Prediction) -> str:
    """Memory by part."""
    parts = sorted(p.memory.parts().items(), key=lambda part: -part[1])
    told = " + ".join(f"{name} {size / 1e9:.1f}" for name, size in parts if size > 5e7 or name == "parameters")
    return f"{p.memory.total / 1e9:.1f} of {p.limit / 1e9:.1f} GB: {told}"


def exchanges_told(planner: Planner, p: Prediction) -> list[str]:
    """Every kind of exchange: on which axis and network, how often, how much, how long."""
    rows, M = planner.rows(p.layout), p.layout.microbatches
    often = {"forward": rows * M, "backward": rows * M, "microbatch": M, "step": 1}
    lines = []
    for e in p.exchanges:
        times = e.times * often[e.beside]
        total = f"{times * e.bytes / 1e9:,.2f} GB, {duration(times * e.seconds)}"
        lines.append(
            f"{e.axis:8}{e.kind:32}{times:>8,.0f} x {e.bytes / 1e6:>10,.2f} MB = {total} on {link(planner, p, e.axis)}"
        )
    return lines


def cost_told(planner: Planner, p: Prediction, tokens: float) -> list[str]:
    """Hours and money for a token budget, with failures and without."""
    machine, devices = planner.machine, planner.devices
    hours = tokens / p.tokens_per_s / 3600
    stored = p.memory.parameters + p.memory.moments
    r = reliability(machine, devices, hours, stored / (SAVE_GB_S * 1e9))
    spent = r.hours * devices
    price = machine.price_per_hour
    money = "" if price is None else f", {spent * price:,.0f} at {price} an hour"
    return [
        f"{tokens:.3g} tokens: {r.hours_without:,.1f} hours without failures, {r.hours:,.1f} with {r.failures:.1f} "
        f"expected; {spent:,.0f} device-hours{money}",
        f"one failure in {r.hours_between_failures:,.1f} hours on {devices:,} devices: a checkpoint every "
        f"{r.interval_minutes:,.1f} minutes is best, goodput {r.goodput:.1%}",
    ]


def nothing_legal(planner: Planner, pins: Pins) -> str:
    """One line: what the pins contradict, with the meshes that are legal without them."""
    config, devices = planner.config, planner.devices
    fixed = math.prod(pins.mesh.values())
    if devices % fixed:
        asked = " ".join(f"mesh.{axis}={size}" for axis, size in pins.mesh.items() if size > 1)
        return f"{asked} = {fixed} devices does not divide --devices {devices}; use a multiple of {fixed}"
    with contextlib.suppress(StopIteration):
        sizes = next(meshes(config, devices, Pins(pins.mesh)))
        told = " ".join(f"mesh.{axis}={size}" for axis, size in sizes.items() if size > 1) or "one device"
        rows = config.train.batch_size // (sizes["data"] * sizes["fsdp"] * sizes["expert"])
        cut = pins.accumulation or pins.microbatches
        if cut:
            return (
                f"no mesh cuts its sequences into {cut} parts: on {told} a shard has {rows}, so use a divisor of that"
            )
        return f"no schedule fits model.layers={config.model.layers} on the meshes that are left, such as {told}"
    sizes = {axis: pins.mesh.get(axis, 1) for axis in AXES}
    free = [axis for axis in ("fsdp", "data") if axis not in pins.mesh]
    if free:
        sizes[free[0]] = devices // fixed
    try:
        resolve(MeshConfig(**sizes), devices, requirements(config))
    except ValueError as error:
        return str(error)
    return f"no mesh of {devices} devices is legal for train.batch_size={config.train.batch_size} and these sizes"


def nothing_fits(planner: Planner, found: Found, pins: Pins) -> str:
    """One line with the arithmetic, and the nearest way out. There are layouts in found.too_large."""
    least = planner.predict(found.too_large[0].layout)
    said = (
        f"no layout of {found.considered:,} fits: the smallest, {least.layout.told()}, needs "
        f"{least.memory.total / 1e9:.1f} GB a device, and {planner.machine.name} has {least.limit / 1e9:.1f} to give"
    )
    ways = []
    if pins != Pins({}):
        free = search(planner, Pins({}))
        if free.fitting:
            ways.append("without what is pinned " + " ".join(free.fitting[0].layout.overrides()) + " fits")
    for times in (2, 4, 8, 16, 32, 64):
        config = planner.config
        more = replace(config, train=replace(config.train, batch_size=config.train.batch_size * times))
        larger = Planner(more, planner.machine, planner.devices * times, planner.software)
        if larger.devices > MOST_DEVICES:
            break
        loose = {axis: n for axis, n in pins.mesh.items() if axis not in ("data", "fsdp")}
        loose = replace(pins, mesh=loose, remat=pins.remat or "full", style=pins.style or "ulysses")
        if fits := search(larger, loose).fitting:
            ways.append(f"{larger.devices:,} devices do, with " + " ".join(fits[0].layout.overrides()))
            break
    return f"{said}; {'; '.join(ways) or 'use a smaller model or a shorter sequence'}"
