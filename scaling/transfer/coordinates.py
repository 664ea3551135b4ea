"""A coordinate check's verdict: do activations, and their change in the first steps, depend on the size of the model?

Slopes are those of straight lines through logarithms: 0.5 is growth with the square root of the size.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

TOLERANCE = 0.2  # largest slope that is called flat: twice what 4 widths and 2 seeds leave of noise and of small sizes


@dataclass(frozen=True)
class Check:
    """Root mean squares by size and name: of activations (steps + 1,) and of their change since the start (steps,)."""

    dial: str  # width | layers: what the sizes count
    sizes: dict[int, dict[str, np.ndarray]]
    changes: dict[int, dict[str, np.ndarray]]

    @property
    def names(self) -> list[str]:
        """The coordinates to compare; layer 3 of 4 and layer 3 of 16 are not the same thing."""
        within = "layer " if self.dial == "layers" else "none"
        return [name for name in self.changes[min(self.changes)] if not name.startswith(within)]


@dataclass(frozen=True)
class Line:
    """One coordinate after the last step."""

    name: str
    size: float  # slope of its root mean square; it may fall (logits begin at zero in the limit), but not grow
    change: float  # slope of its change, which must be flat

    @property
    def flat(self) -> bool:
        """Whether the coordinate does not depend on the size."""
        return self.size <= TOLERANCE and abs(self.change) <= TOLERANCE


def slope(values: dict[int, float]) -> float:
    """The exponent a of value = c size^a, by least squares; nan where a value is not above 0 and finite."""
    x, y = np.array(list(values)), np.array(list(values.values()))
    if not (np.isfinite(y) & (y > 0)).all():
        return float("nan")
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def judge(check: Check) -> list[Line]:
    """The slopes of every coordinate after the last step, over the larger half of the sizes: what is left of the noise
    of initial weights falls with the size in every parametrization. A size that diverged has the slope nan: not flat.
    """
    large = sorted(check.sizes)[-max(2, -(-len(check.sizes) // 2)) :]
    last = lambda series, name: slope({size: float(series[size][name][-1]) for size in large})
    return [Line(name, last(check.sizes, name), last(check.changes, name)) for name in check.names]


def picture(check: Check, title: str, path: Path) -> None:
    """Writes a PNG: each coordinate's change against the size, a line a step. Raises ValueError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ValueError(f"--png {path} needs matplotlib: install the extra `dev`") from None
    columns = min(4, len(check.names))
    rows = -(-len(check.names) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.8 * rows + 0.6), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    sizes, steps = sorted(check.changes), len(next(iter(check.changes[min(check.changes)].values())))
    lines = {line.name: line for line in judge(check)}
    for axis, name in zip(axes.flat, check.names, strict=False):
        for step in range(steps):
            shade = str(0.75 * (1 - (step + 1) / steps))
            values = [check.changes[size][name][step] for size in sizes]
            axis.plot(sizes, values, "o-", color=shade, label=f"step {step + 1}", markersize=3, linewidth=1)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        good = lines[name].flat
        axis.set_title(f"{name}: slope {lines[name].change:+.2f}", color="black" if good else "firebrick", fontsize=10)
        axis.set_xlabel(check.dial)
    for axis in axes.flat[len(check.names) :]:
        axis.set_axis_off()
    axes[0, 0].set_ylabel("RMS of the change since the start")
    axes[0, 0].legend(fontsize=7)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
