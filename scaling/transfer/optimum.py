"""Does the best learning rate (or another key) stay where it is when the model grows? Read off a sweep's rows.

The optimum of a size is the vertex of the parabola through the best value of the key and its two neighbours, loss
against the logarithm of the key; with several seeds, through their mean losses.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Optimum:
    """The best value of the key for one size."""

    size: float
    losses: dict[float, float]  # value of the key -> mean loss over seeds, values rising
    value: float | None  # at the vertex; None where it is refused
    loss: float | None  # there
    by_seed: tuple[float, ...]  # the vertex from each seed alone, where it has one
    refused: str = ""  # why there is no vertex


@dataclass(frozen=True)
class Transfer:
    """The optima of one family of models, such as those of one parametrization."""

    name: str
    optima: tuple[Optimum, ...]  # sizes rising

    @property
    def factor(self) -> float | None:
        """Largest optimum over smallest, over all sizes; None where a size has none."""
        found = [optimum.value for optimum in self.optima]
        return None if None in found else max(found) / min(found)


def vertex(losses: dict[float, float]) -> tuple[float, float]:
    """Best value and its loss. Raises ValueError where the least loss has no neighbour on a side."""
    values = sorted(losses)
    place = min(range(len(values)), key=lambda i: losses[values[i]])
    if place in (0, len(values) - 1):
        end = "lowest" if place == 0 else "highest"
        raise ValueError(f"the {end} of {len(values)} values, {values[place]:g}, is the best: the optimum lies beyond")
    near = values[place - 1 : place + 2]
    a, b, c = np.polyfit(np.log(near), [losses[value] for value in near], 2)
    return math.exp(-b / (2 * a)), float(c - b * b / (4 * a))


def transfers(rows: Iterable[dict], key: str, size: str, split: str) -> list[Transfer]:
    """The optima of `key` by `size`, for each value of `split`. Rows without a loss (diverged) are left out.

    Raises ValueError for a column that no row has, and for a size with fewer than 3 values of the key.
    """
    seen: dict[str, dict[float, dict[float, dict]]] = {}
    sound = [row for row in rows if row.get("loss") is not None]
    for name in (key, size, split):
        if not any(name in row for row in sound):
            names = sorted({name for row in sound for name in row})
            raise ValueError(f"no row with a loss has {name}; there are: {', '.join(names)}")
    for row in sound:
        of_value = seen.setdefault(str(row[split]), {}).setdefault(row[size], {}).setdefault(row[key], {})
        if (seed := row.get("seed", 0)) in of_value:
            raise ValueError(f"{split} {row[split]}, {size} {row[size]}, {key} {row[key]:g}, seed {seed}: there twice")
        of_value[seed] = row["loss"]
    return [
        Transfer(name, tuple(_optimum(one, sizes[one], f"{name}, {size} {one}") for one in sorted(sizes)))
        for name, sizes in seen.items()
    ]


def _optimum(size: float, seen: dict[float, dict], name: str) -> Optimum:
    seeds = sorted({seed for of_value in seen.values() for seed in of_value})
    whole = {value: float(np.mean([*seen[value].values()])) for value in sorted(seen) if len(seen[value]) == len(seeds)}
    if len(whole) < 3:
        raise ValueError(f"{name}: {len(whole)} values with every seed; a parabola needs 3")
    alone = []
    for seed in seeds if len(seeds) > 1 else ():
        try:
            alone.append(vertex({value: seen[value][seed] for value in whole})[0])
        except ValueError:
            continue
    try:
        return Optimum(size, whole, *vertex(whole), tuple(alone))
    except ValueError as error:
        return Optimum(size, whole, None, None, tuple(alone), str(error))


def picture(found: list[Transfer], key: str, size: str, path: Path) -> None:
    """Writes a PNG: loss against the key, a panel for each family, a line for each size.

    Raises ValueError without matplotlib.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ValueError(f"--png {path} needs matplotlib: install the extra `dev`") from None
    figure = Figure(figsize=(4.4 * len(found), 3.8), layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False, sharey=True)[0]
    for axis, family in zip(panels, found, strict=True):
        for place, optimum in enumerate(family.optima):
            color = colormaps["viridis"](0.85 * place / max(1, len(family.optima) - 1))
            axis.plot(
                *zip(*optimum.losses.items(), strict=True), "o-", ms=4, color=color, label=f"{size} {optimum.size}"
            )
            if optimum.value is not None:
                axis.plot(optimum.value, optimum.loss, "*", ms=13, color=color, markeredgecolor="black")
        moved = "an optimum lies beyond the grid" if family.factor is None else f"best moves by {family.factor:.2f}x"
        axis.set(xscale="log", xlabel=key, title=f"{family.name}: {moved}")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    panels[0].set_ylabel("held-out loss, nats a token")
    figure.savefig(path, dpi=130, metadata={"Software": None})
