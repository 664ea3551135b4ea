"""python -m scaling coord-check: do activations and their changes depend on the width or the depth?"""

import argparse
from dataclasses import replace
from pathlib import Path

import jax

from config.compose import load
from config.layout import mesh_sizes
from parallel.mesh import make_mesh
from runtime.start import start
from scaling.console import show_coordinates, wide_console
from scaling.strict_json import write
from scaling.transfer.activations import at_width, measure
from scaling.transfer.coordinates import Check, judge, picture
from training.job import make_job

NOT_FLAT = 1


def add_coord_check(options: argparse.ArgumentParser) -> None:
    """Adds the options of `python -m scaling coord-check` to its parser, and `command`, which runs with them."""
    options.set_defaults(command=run_coordinate_check)
    options.add_argument("overrides", nargs="*", metavar="key=value", help="of the config, as for train.py")
    whole = lambda text: tuple(int(word) for word in text.split(","))
    sizes = options.add_mutually_exclusive_group()
    sizes.add_argument("--widths", type=whole, default=(64, 128, 256, 512), help="(default: 64,128,256,512)")
    sizes.add_argument("--layers", type=whole, help="vary the depth instead, as in 2,4,8,16")
    options.add_argument("--steps", type=int, default=8, help="on one batch (default: 8)")
    options.add_argument("--seeds", type=int, default=2, help="to average over (default: 2)")
    options.add_argument("--png", type=Path, metavar="FILE", help="draw changes against sizes")
    options.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")


def run_coordinate_check(options: argparse.Namespace) -> int:
    """Trains every size for a few steps and judges; NOT_FLAT if one coordinate grows or shrinks.

    Raises ValueError for the user's mistakes.
    """
    for name in ("steps", "seeds"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} {getattr(options, name)} must be 1 or more")
    dial, sizes = ("layers", options.layers) if options.layers else ("width", options.widths)
    if len(set(sizes)) < 2 or min(sizes) < 1:
        raise ValueError(f"--{dial.replace('width', 'widths')} {sizes} must be 2 or more different sizes above 0")
    config = load([*options.overrides, "optimizer.schedule=constant", "optimizer.warmup_steps=0"])
    found = {size: coordinates(config, dial, size, options.seeds, options.steps) for size in sorted(set(sizes))}
    check = Check(dial, {size: of[0] for size, of in found.items()}, {size: of[1] for size, of in found.items()})
    m, o = config.model, config.optimizer
    title = f"{m.parametrization}, {o.name}, lr {o.lr:g}, after {options.steps} steps"
    lines = judge(check)
    show_coordinates(title, check, lines, wide_console())
    if options.png:
        picture(check, title, options.png)
    if options.json:
        plain = lambda series: {str(s): {name: list(v) for name, v in of.items()} for s, of in series.items()}
        numbers = {"title": title, "dial": dial, "flat": all(line.flat for line in lines)}
        numbers |= {"slopes": {line.name: {"size": line.size, "change": line.change} for line in lines}}
        numbers |= {"sizes": plain(check.sizes), "changes": plain(check.changes)}
        write(options.json, numbers)
    return 0 if all(line.flat for line in lines) else NOT_FLAT


def coordinates(config, dial: str, size: int, seeds: int, steps: int):
    """The measurements of scaling.transfer.activations for one size, on the mesh that the config asks for."""
    model = at_width(config.model, size) if dial == "width" else replace(config.model, layers=size)
    config = replace(config, model=model, train=replace(config.train, grad_accumulation=1))
    start(config.runtime)
    axes = mesh_sizes(config, jax.device_count())
    mesh = make_mesh(axes)
    with jax.set_mesh(mesh):
        return measure(make_job(config, mesh), seeds, steps)
