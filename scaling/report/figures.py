"""The figures of a scaling report, each drawn from the dict of scaling.report.content.assemble. PNG bytes out."""

import io

import numpy as np
from scipy.interpolate import pchip_interpolate

from scaling.fit.diagnostics import OUTLIER
from scaling.fit.laws import LAWS, predict
from scaling.report.markup import number

DPI = 160
SMOOTH = 100  # points of a curve between the budgets at which it is known
BLUE, ORANGE, GREEN, RED, GREY = "#0072b2", "#d55e00", "#009e73", "#b2182b", "#8a8a8a"
WORDS = {"N": "parameters N", "D": "training tokens D", "C": "training compute C (FLOPs)", "U": "unique tokens U"}
LOSS = "held-out loss (nats a token)"
STYLE = {
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.7,
    "axes.labelsize": 10,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "figure.facecolor": "white",
}


def draw(report: dict) -> dict[str, bytes]:
    """File name -> PNG of every figure that the report allows; equal reports give equal bytes.

    Raises ValueError without matplotlib.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ValueError("a report needs matplotlib for its figures: install the extra `dev`") from None
    made = {}
    for name, function in wanted(report).items():
        with rc_context(STYLE):
            figure = Figure(figsize=(5.6, 4.3), layout="constrained")
            axes = figure.subplots()
            function(axes, report)
            _ticks(axes)
            _legend(figure, axes)
            content = io.BytesIO()
            figure.savefig(content, format="png", dpi=DPI, metadata={"Software": None})
        made[f"{name}.png"] = content.getvalue()
    return made


def wanted(report: dict) -> dict:
    """Name -> function of each figure that the report has data for."""
    result, absent = report["analysis"], report["absent"]
    found = {}
    if "compute" not in absent:
        found["loss_compute"] = loss_against_compute
    if report["isoflop"]:
        found["isoflop"] = parabolas
    if result["curve"]:
        found |= {"n_opt": lambda axes, report: optimum(axes, report, "N")}
        found |= {"d_opt": lambda axes, report: optimum(axes, report, "D")}
    for letter in result["residuals_by"]:
        found[f"residuals_{letter.lower()}"] = lambda axes, report, letter=letter: residuals(axes, report, letter)
    if result["holdout"]:
        found |= {"extrapolation": extrapolation, "extrapolation_error": extrapolation_error}
    if result["floor_profile"]:
        found["floor_profile"] = floor_profile
    return found


def _legend(figure, axes) -> None:
    """Below the axes, where it covers nothing."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        columns = 2 if max(map(len, labels)) > 14 else 3
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, columnspacing=1.4, handlelength=1.8)


def _ticks(axes) -> None:
    """Log axes of less than two decades get labels between the powers of ten, but no more than fit."""
    from matplotlib.ticker import LogFormatterSciNotation, LogLocator, NullFormatter

    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() != "log":
            continue
        axis.set_minor_formatter(NullFormatter())
        low, high = axis.get_view_interval()
        if (decades := np.log10(high / low)) < 2:
            axis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades > 0.7 else (1, 1.5, 2, 3, 4, 5, 6, 8)))
            axis.set_major_formatter(LogFormatterSciNotation(minor_thresholds=(np.inf, np.inf)))


def _colours(values: np.ndarray):
    """A colour for each value by its log, dark to light but never too light for white paper."""
    from matplotlib import colormaps

    logs = np.log(values)
    return colormaps["viridis"](0.88 * (logs - logs.min()) / max(np.ptp(logs), 1e-12))


def _column(runs: list[dict], name: str) -> np.ndarray:
    return np.array([run[name] for run in runs])


def _curve(report: dict, letter: str) -> tuple[np.ndarray, ...]:
    """C, and the law's optimum there with the ends of its 80% band (nan where it is open or not known), smooth."""
    points = report["analysis"]["curve"]
    ends = [[np.nan if end is None else end for end in one[letter].get("interval80", (None, None))] for one in points]
    low, high = np.array(ends, float).T
    compute = np.log([one["C"] for one in points])
    fine = np.linspace(compute[0], compute[-1], SMOOTH)
    # An open end anywhere leaves a gap there: straight lines keep it, a smooth one cannot.
    join = lambda y: pchip_interpolate(compute, y, fine) if np.isfinite(y).all() else np.interp(fine, compute, y)
    smooth = lambda values: np.exp(join(np.log(values)))
    return np.exp(fine), *map(smooth, ([one[letter]["value"] for one in points], low, high))


def _budget(axes, report: dict, letter: str) -> None:
    """The prediction: a point with its 80% interval on a dotted line."""
    head = report["headline"]
    value, ends = head[letter]["value"], head[letter].get("interval80", (None, None))
    axes.axvline(head["budget"], color=RED, linestyle=":", linewidth=1.2)
    if None in ends:
        axes.plot(head["budget"], value, "D", color=RED, markersize=5, label="at the budget")
        return
    error = [[value - ends[0]], [ends[1] - value]]
    axes.errorbar(
        head["budget"], value, error, fmt="D", color=RED, capsize=6, markersize=4, zorder=5, label="at the budget, 80%"
    )


def _law(axes, report: dict, letter: str, label: str) -> None:
    compute, value, low, high = _curve(report, letter)
    axes.plot(compute, value, color=BLUE, label=label)
    if np.isfinite(low).any():
        axes.fill_between(compute, low, high, color=BLUE, alpha=0.22, linewidth=0, label="its 80% band")


def loss_against_compute(axes, report: dict) -> None:
    """Every run by C and loss, coloured by N or grey; curves of runs; the law's least loss with its band."""
    runs = report["runs"]
    compute, loss = _column(runs, "C"), _column(runs, "loss")
    names = dict.fromkeys(run.get("run", "") for run in runs)
    for name in names if len(names) < len(runs) else ():
        mine = sorted((run["C"], run["loss"]) for run in runs if run.get("run") == name)
        axes.plot(*zip(*mine, strict=True), color=GREY, linewidth=0.7, zorder=1)
    if report["analysis"]["curve"]:
        _law(axes, report, "loss", "least loss by the law")
        _budget(axes, report, "loss")
    if "N" in runs[0]:
        from matplotlib.colors import LogNorm

        dots = axes.scatter(compute, loss, 26, _column(runs, "N"), cmap="viridis", norm=LogNorm(), zorder=3)
        dots.set(edgecolor="white", linewidth=0.4)
        axes.figure.colorbar(dots, ax=axes, label=WORDS["N"], pad=0.02)
    else:
        axes.scatter(compute, loss, 26, GREY, zorder=3)
    _outliers(axes, runs, "C", "loss")
    axes.set(xscale="log", xlabel=WORDS["C"], ylabel=LOSS)


def _outliers(axes, runs: list[dict], x: str, y: str, scale: float = 1) -> None:
    """Red circles around the outliers, with their lines in the table."""
    far = [run for run in runs if run["outlier"]]
    for place, run in enumerate(far):
        label = "outlier, and its line" if place == 0 else None
        axes.plot(run[x], scale * run[y], "o", color=RED, fillstyle="none", markersize=11, label=label, zorder=4)
        near = {"textcoords": "offset points", "xytext": (9, 5), "color": RED, "fontsize": 9}
        axes.annotate(str(run["line"]), (run[x], scale * run[y]), **near)


def parabolas(axes, report: dict) -> None:
    """Loss against N, a colour a budget: runs, the fitted parabola, its minimum; refused slices in grey."""
    slices, runs = report["isoflop"]["slices"], {run["line"]: run for run in report["runs"]}
    for cut, colour in zip(slices, _colours(np.array([cut["C"] for cut in slices])), strict=True):
        mine = [runs[line] for line in cut["lines"]]
        n, loss = _column(mine, "N"), _column(mine, "loss")
        if cut["refused"]:
            axes.plot(n, loss, "x", color=GREY, markersize=6, label=f"C = {number(cut['C'], 3)}: refused")
            continue
        axes.plot(n, loss, "o", color=colour, markersize=5, label=f"C = {number(cut['C'], 3)}")
        along = np.geomspace(n.min(), n.max(), 100)
        axes.plot(along, cut["loss"] + cut["curvature"] * np.log(along / cut["N"]) ** 2, color=colour, linewidth=1.3)
        axes.plot(cut["N"], cut["loss"], "*", color=ORANGE, markersize=13, markeredgecolor="white", zorder=4)
    _outliers(axes, report["runs"], "N", "loss")
    if any(not cut["refused"] for cut in slices):
        axes.plot([], [], "*", color=ORANGE, markersize=11, label="minimum")
    axes.set(xscale="log", xlabel=WORDS["N"], ylabel=LOSS)


def optimum(axes, report: dict, letter: str) -> None:
    """The optimal N, or D, against C: the law's and the parabolas' power law, their bands, and the slices' minima."""
    _law(axes, report, letter, f"law's {letter}_opt")
    found = report["isoflop"]
    if found and found["line"]:
        compute = _column(found["line"], "C")
        line, low, high = (_column(found["line"], name) for name in ("N", "low", "high"))
        if letter == "D":
            line, low, high = (compute / 6 / n for n in (line, high, low))
        axes.plot(compute, line, "--", color=ORANGE, label="parabolas' power law")
        axes.fill_between(compute, low, high, color=ORANGE, alpha=0.15, linewidth=0, label="its 80% band")
    kept = [cut for cut in found["slices"] if not cut["refused"]] if found else []
    if kept:
        compute, n = _column(kept, "C"), _column(kept, "N")
        value = n if letter == "N" else compute / 6 / n
        axes.plot(compute, value, "*", color=ORANGE, markersize=12, markeredgecolor="white", label="parabolas' minima")
    _budget(axes, report, letter)
    axes.set(xscale="log", yscale="log", xlabel=WORDS["C"], ylabel=f"optimal {WORDS[letter]}")


def residuals(axes, report: dict, letter: str) -> None:
    """Each run's residual against one size, with the means of its thirds and the size of the noise."""
    runs = sorted(report["runs"], key=lambda run: run[letter])
    size, values = report["analysis"]["fit"]["residual_size"], _column(runs, letter)
    axes.axhspan(-100 * size, 100 * size, color=GREY, alpha=0.16, linewidth=0, label="one residual size")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.plot(values, 100 * _column(runs, "residual"), "o", color=BLUE, markersize=4.5, alpha=0.8, label="runs")
    thirds = report["analysis"]["residuals_by"][letter]["thirds"]
    for place, (part, mean) in enumerate(zip(np.array_split(values, 3), thirds, strict=True)):
        label = "mean of a third" if place == 0 else None
        axes.plot([part[0], part[-1]], [100 * mean] * 2, color=ORANGE, linewidth=2.5, label=label)
    for edge in (-OUTLIER, OUTLIER) if any(run["outlier"] for run in runs) else ():
        axes.axhline(100 * edge * size, color=RED, linestyle=":", linewidth=1)
    _outliers(axes, runs, letter, "residual", 100)
    positive = values.min() > 0
    axes.set(xlabel=WORDS.get(letter, letter), ylabel="log measured less log fitted loss (%)")
    axes.set_xscale("log" if positive else "linear")


def _predicted(report: dict) -> tuple[list[dict], np.ndarray]:
    """All runs, and what the law predicts that was fitted below the threshold only."""
    law, runs = LAWS[report["analysis"]["law"]["name"]], report["runs"]
    sizes = {letter: _column(runs, letter) for letter in law.inputs}
    return runs, predict(law, report["analysis"]["holdout"]["parameters"], sizes)


def extrapolation(axes, report: dict) -> None:
    """Predicted against measured loss: on the diagonal the prediction is right."""
    runs, predicted = _predicted(report)
    measured, above = _column(runs, "loss"), _column(runs, "C") > report["analysis"]["holdout"]["above"]
    ends = [min(measured.min(), predicted.min()), max(measured.max(), predicted.max())]
    axes.plot(ends, ends, color="black", linewidth=0.8, label="predicted = measured")
    axes.plot(measured[~above], predicted[~above], "o", color=GREY, markersize=5, label="fitted")
    axes.plot(measured[above], predicted[above], "D", color=RED, markersize=6, label="held out")
    axes.set(xlabel=f"measured {LOSS}", ylabel="predicted loss")
    axes.set_aspect("equal", adjustable="datalim")


def extrapolation_error(axes, report: dict) -> None:
    """The relative error of each prediction against C, on both sides of the threshold."""
    runs, predicted = _predicted(report)
    held = report["analysis"]["holdout"]
    compute, error = _column(runs, "C"), 100 * (predicted / _column(runs, "loss") - 1)
    above = compute > held["above"]
    axes.axhline(0, color="black", linewidth=0.8)
    axes.axvline(held["above"], color="black", linestyle=":", linewidth=1.2, label="fitted below, predicted above")
    axes.plot(compute[~above], error[~above], "o", color=GREY, markersize=5, label="fitted")
    axes.plot(compute[above], error[above], "D", color=RED, markersize=6, label="held out")
    axes.set(xscale="log", xlabel=WORDS["C"], ylabel="predicted over measured loss, less 1 (%)")


def floor_profile(axes, report: dict) -> None:
    """How much worse the fit is for other values of the floor, and the interval that the threshold cuts out."""
    found = report["analysis"]["floor_profile"]
    interval = report["analysis"]["fit"]["quantities"][found["name"]]["interval95"]
    value, height = np.array(found["value"]), np.array(found["F"])
    shown = height <= 6 * found["threshold95"]
    axes.plot(value[shown], height[shown], "o-", color=BLUE, markersize=4, label=f"profile of {found['name']}")
    axes.axhline(found["threshold95"], color=RED, linestyle="--", linewidth=1.2, label="95% threshold")
    low, high = (edge if end is None else end for end, edge in zip(interval, axes.get_xlim(), strict=True))
    axes.axvspan(low, high, color=BLUE, alpha=0.12, linewidth=0, label="95% interval")
    axes.set(xlabel=f"{found['name']} (nats a token)", ylabel="rise of the objective (F)")
