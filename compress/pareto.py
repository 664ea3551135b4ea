"""Several compressions of one model beside each other: what each recipe costs, as a table and as a picture."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Point:
    """A model, as its cost.json tells of it."""

    name: str
    disk: int  # bytes
    memory: int
    loss: float  # nats a token of held-out text; of an encoder that of its task's rows
    change: float  # of the loss, as a share of that of the model before
    stderr: float  # of `change`
    reads: float | None  # tokens a second
    writes: float | None
    task: dict[str, float]  # metrics of the run's own task, the one that picks the best checkpoint first


def points_of(folders: list[Path]) -> list[Point]:
    """The model before, and what each folder holds. Raises ValueError for costs that are not of one model and text."""
    costs = [_cost(folder) for folder in folders]
    first = costs[0]
    for folder, cost in zip(folders, costs, strict=True):
        for name in ("loss", "memory"):
            if cost["before"][name] != first["before"][name]:
                told = f"{cost['before'][name]}, that of {folders[0]} {first['before'][name]}"
                raise ValueError(f"{folder}: its model had {name} {told}: they are not of one model and one text")
    return [_point("before", first, "before"), *(_point(_name(cost, costs), cost, "after") for cost in costs)]


def best(points: list[Point]) -> list[Point]:
    """Those of which no other is at once no larger in memory and no worse in loss, the smallest first."""
    found, lowest = [], float("inf")
    for point in sorted(points, key=lambda one: (one.memory, one.loss)):
        if point.loss < lowest:
            found.append(point)
            lowest = point.loss
    return found


def table(points: list[Point]) -> str:
    """Lines of Markdown; what is best for its size is in bold."""
    front, base = best(points), points[0]
    names = ["disk, MB", "memory, MB", "", "held-out loss", "change", *list(base.task)[:1], "tokens/s read", "written"]
    lines = [f"| | {' | '.join(names)} |", "|---" + "|---:" * len(names) + "|"]
    for p in points:
        name = f"**{p.name}**" if p in front else p.name
        change = "" if p is base else f"{p.change:+.2%} ± {p.stderr:.2%}"
        speeds = ["" if speed is None else f"{speed:,.0f}" for speed in (p.reads, p.writes)]
        sizes = f"{p.disk / 1e6:,.2f} | {p.memory / 1e6:,.2f} | {p.memory / base.memory:.3f}x"
        metric = [f"{value:.4f}" for value in list(p.task.values())[:1]]
        lines.append(f"| {name} | {sizes} | {p.loss:.5f} | {change} | {' | '.join([*metric, *speeds])} |")
    return "".join(f"{line}\n" for line in lines)


def draw(points: list[Point], path: Path) -> None:
    """Bytes in memory against held-out loss, as an SVG or PNG; a line joins the best. Raises ValueError, OSError."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("the picture needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(8.5, 4), dpi=130, layout="tight")
    axes, front = figure.subplots(), best(points)
    axes.step([p.memory / 1e6 for p in front], [p.loss for p in front], where="post", color="#9db7d5", zorder=1)
    ordered = sorted(points, key=lambda p: p.loss)
    for number, p in enumerate(ordered, 1):  # names would lie on each other: they stand beside the picture
        color = "#1f4e8c" if p in front else "#8a8a8a"
        error = p.stderr * points[0].loss
        axes.errorbar(p.memory / 1e6, p.loss, yerr=error, marker="o", markersize=5, color=color, capsize=2)
        place = {"xytext": (5 if number % 2 else -5, 3), "ha": "left" if number % 2 else "right"}
        axes.annotate(str(number), (p.memory / 1e6, p.loss), textcoords="offset points", fontsize=8, **place)
    names = "\n".join(f"{number}  {p.name}" for number, p in enumerate(ordered, 1))
    axes.text(1.02, 1, names, transform=axes.transAxes, va="top", fontsize=8)
    axes.set(xscale="log", xlabel="parameters in memory, MB", ylabel="held-out loss, nats a token")
    for ticks in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        ticks(lambda value, _: f"{value:,.4g}")
    axes.grid(alpha=0.3, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    beside = path.with_name(f".{path.name}")
    figure.savefig(beside, format=path.suffix[1:])
    beside.replace(path)


def _cost(folder: Path) -> dict[str, Any]:
    path = folder / "cost.json"
    try:
        cost = json.loads(path.read_text())
        if cost["before"]["loss"] is None:  # no model of text: the loss of its task's rows stands there
            for side in ("before", "after"):
                cost[side]["loss"] = cost[side].get("task", {}).get("loss")
            if cost["before"]["loss"] is None:
                raise ValueError("it has no loss")
            cost["change"] = cost["after"]["loss"] / cost["before"]["loss"] - 1
        return cost
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} tells no costs of python -m compress: {error}") from None


def _name(cost: dict[str, Any], costs: list[dict[str, Any]]) -> str:
    """The recipe, and the options in which it differs from others of that recipe."""
    asked = cost["provenance"]["recipe"]
    alike = [one["provenance"]["recipe"] for one in costs if one["recipe"] == cost["recipe"]]
    names = [name for name in ("group", "tables", "wide", "share", "sizes") if asked[name]]
    differ = [name for name in names if any(one[name] != asked[name] for one in alike)]
    return " ".join([cost["recipe"], *(f"{name}={_told(asked[name])}" for name in differ)])


def _told(value: Any) -> str:
    pairs = [f"{key}={size}" for key, size in value.items()] if isinstance(value, dict) else value
    return ",".join(pairs) if isinstance(pairs, list | tuple) else str(pairs)


def _point(name: str, cost: dict[str, Any], side: str) -> Point:
    its, is_after = cost[side], side == "after"
    stderr = (cost["stderr"] or 0.0) / cost["before"]["loss"] if is_after else 0.0
    sizes = its["disk"], its["memory"], its["loss"], cost["change"] if is_after else 0.0
    return Point(name, *sizes, stderr, its["reads"], its["writes"], its.get("task", {}))
