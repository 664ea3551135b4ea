"""Everything that a scaling report says, as one plain dict: the analysis of a table and what its sections need besides.

No drawing and no HTML. Each section that the table does not allow has its reason in `absent`.
"""

import platform
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from scipy.special import stdtrit

from scaling.fit.analysis import FitRequest, analyse
from scaling.fit.isoflop import LEVEL
from scaling.fit.laws import Law, predict
from scaling.fit.runs_table import Table, read_table
from scaling.fit.table_files import read_rows

RESULTS, SWEEP = "results.jsonl", "sweep.yaml"
AS_COLLECTED = {"N": "parameters", "D": "tokens", "C": "flops", "loss": "loss", "group": "group", "run": "run"}
BEYOND = 10.0  # times the largest budget: what is predicted unless a budget is given
CURVE = 12  # budgets at which the bands are computed; between them they are drawn straight in logs
BAND = 0.8
GROUPS = 4  # to hold the largest out: the rest is still enough for a power law
PROVENANCE = ("commit", "code_digest", "machine", "schedule", "batch_size")
TOO_LARGE = 2.0  # residuals this many times the seeds' spread are not noise alone


@dataclass(frozen=True)
class ReportRequest:
    """How the table of a report is fitted, and which budget it predicts."""

    law: Law
    draws: int  # bootstrap refits
    seed: int = 0  # of the bootstrap
    budget: float | None = None  # FLOPs; None: `BEYOND` times the largest run's
    holdout_above: float | None = None  # FLOPs; None: the largest group is held out
    min_ratio: float = 0.0  # runs of fewer tokens a parameter are left out


def locate(experiment: Path) -> Path:
    """The table of an experiment's folder, or the file itself. Raises ValueError where there is none."""
    table = experiment / RESULTS if experiment.is_dir() else experiment
    if not table.is_file():
        made = f"; python -m scaling collect {experiment / SWEEP} writes it" if experiment.is_dir() else ""
        raise ValueError(f"there is no {table}{made}")
    return table


def columns_of(path: Path) -> dict[str, str]:
    """The columns named as `collect` names them, as far as the table has values there.

    `run` is one only for rows that are points along a run. Raises ValueError for a table without rows.
    """
    _, rows, _ = read_rows(path)
    there = {key for _, row in rows for key, value in row.items() if value not in (None, "")}
    points = any(row.get("kind") == "point" for _, row in rows)
    return {letter: name for letter, name in AS_COLLECTED.items() if name in there and (letter != "run" or points)}


def assemble(path: Path, names: dict[str, str], request: ReportRequest) -> dict:
    """The whole report of a table whose columns are `names`. Raises ValueError for tables that cannot be fitted."""
    table = read_table(path, names)
    budget = request.budget
    if budget is None and request.law.optimum:
        budget = BEYOND * float(table.columns["C"].max())
    absent: dict[str, str] = {}
    above = request.holdout_above
    if above is None:
        above, absent["extrapolation"] = split(table, len(request.law.parameters))
    curve = () if budget is None else grid(table, budget)
    wanted = FitRequest(
        request.law,
        draws=request.draws,
        seed=request.seed,
        budget=budget,
        holdout_above=above,
        min_ratio=request.min_ratio,
        curve=curve,
    )
    result = analyse(table, wanted)
    refused = {row["line"]: row["reason"] for row in result["refused"]}
    used = table.without({row: "" for row, line in enumerate(table.lines) if int(line) in refused})
    _, raw, _ = read_rows(path)
    report = {
        "analysis": result,
        "runs": runs_of(used, dict(raw), result, request.law),
        "headline": headline(result, used),
        "isoflop": isoflop(result, used, absent),
        "held_out_group": held_out(result, used),
        "seeds": seeds(used, result, absent),
        "provenance": provenance(path, raw),
    }
    if not request.law.optimum:
        for section in ("headline", "optimum"):
            absent[section] = f"the law {request.law.name} has no best N and D for a budget"
    if "C" not in used.columns:
        absent["compute"] = "the table has no C, nor N and D"
    report["absent"] = {section: why for section, why in absent.items() if why}
    report["warnings"] = [*warnings(report, used), *result["warnings"]]
    return report


def grid(table: Table, budget: float) -> tuple[float, ...]:
    """Budgets from the smallest run's to the largest or the one asked for, which is among them."""
    compute = table.columns["C"]
    ends = min(compute.min(), budget), max(compute.max(), budget)
    return tuple(sorted({*map(float, np.geomspace(*ends, CURVE)[1:-1]), *map(float, ends), float(budget)}))


def split(table: Table, parameters: int) -> tuple[float | None, str]:
    """A threshold in C below the largest group, or None and why there is none."""
    if not {"group", "C"} <= table.columns.keys():
        return None, "no column says which budget a run belongs to, so none is held out; --holdout-above cuts at a C"
    groups, compute = table.columns["group"], table.columns["C"]
    order = sorted(set(groups), key=lambda group: float(np.median(compute[groups == group])))
    if len(order) < GROUPS:
        return None, f"{len(order)} budgets; holding the largest out needs {GROUPS} or more"
    last = groups == order[-1]
    if compute[~last].max() >= compute[last].min():
        return None, f"the largest budget, {order[-1]}, overlaps others in C; --holdout-above says where to cut"
    if (~last).sum() <= parameters:
        return None, f"below the largest budget are {(~last).sum()} runs, and the fit needs {parameters + 1}"
    return float(np.sqrt(compute[~last].max() * compute[last].min())), ""


def held_out(result: dict, used: Table) -> list[str]:
    """Names of the groups that were predicted and not fitted."""
    if not result["holdout"] or "group" not in used.columns:
        return []
    return sorted(set(used.columns["group"][used.columns["C"] > result["holdout"]["above"]]))


def runs_of(used: Table, raw: dict[int, dict], result: dict, law: Law) -> list[dict]:
    """Each fitted run: sizes, loss, the law's, the residual (log measured less fitted), and what the table calls it."""
    parameters = {name: one["value"] for name, one in result["fit"]["quantities"].items() if name in law.parameters}
    fitted = predict(law, parameters, used.columns)
    far = {one["line"] for one in result["outliers"]}
    runs = []
    for row, line in enumerate(map(int, used.lines)):
        sizes = {key: values[row].item() for key, values in used.columns.items()}
        residual = float(np.log(sizes["loss"] / fitted[row]))
        facts = {key: raw[line][key] for key in ("label", "seed", "source") if raw[line].get(key) is not None}
        runs.append({"line": line, **facts, **sizes, "fitted": float(fitted[row]), "residual": residual})
        runs[-1] |= {"outlier": line in far}
    return runs


def headline(result: dict, used: Table) -> dict | None:
    """The prediction for the budget, and how far beyond the data it lies."""
    if result["budget"] is None:
        return None
    largest = float(used.columns["C"].max())
    found = {name: result["fit"]["quantities"][f"{name} at budget"] for name in ("N", "D", "D/N", "loss")}
    return {"budget": result["budget"], "largest": largest, "beyond": result["budget"] / largest, **found}


def isoflop(result: dict, used: Table, absent: dict[str, str]) -> dict | None:
    """Slices with their runs' lines, and the power law through their minima with its 80% band along the curve."""
    found = result["approaches"].get("isoflop")
    if found is None:
        absent["isoflop"] = "no column says which budget a run belongs to (--group), or the law has no best N"
        return None
    groups = used.columns["group"]
    slices = [cut | {"lines": used.lines[groups == cut["name"]].tolist()} for cut in found["slices"]]
    if "refused" in found:
        absent["power law"] = found["refused"]
        return {"slices": slices, "line": []}
    budgets = np.array([point["C"] for point in result["curve"]])
    where = np.log([cut["C"] for cut in slices if not cut["refused"]])
    degrees, spread = len(where) - 2, float(np.sum((where - where.mean()) ** 2))
    wide, narrow = (stdtrit(degrees, (1 + level) / 2) for level in (LEVEL, BAND))
    # The exponent's interval is t s / sqrt(spread); the line's at x is t s sqrt(1 / n + (x - mean)^2 / spread).
    reach = (found["interval95"][1] - found["exponent"]) / wide * narrow
    band = reach * np.sqrt(spread / len(where) + (np.log(budgets) - where.mean()) ** 2)
    best = found["N"] * (budgets / result["budget"]) ** found["exponent"]
    line = zip(budgets, best, best * np.exp(-band), best * np.exp(band), strict=True)
    return {"slices": slices, "line": [dict(zip(("C", "N", "low", "high"), map(float, x), strict=True)) for x in line]}


def seeds(used: Table, result: dict, absent: dict[str, str]) -> dict | None:
    """Runs that differ in their seed only: the spread of their losses, which is the noise that residuals are judged by.

    Spreads are standard deviations of log loss; `spread` pools the sizes.
    """
    if not {"N", "D"} <= used.columns.keys():
        absent["seeds"] = "the table has no N and D to tell runs of one size"
        return None
    sizes = Counter(zip(used.columns["N"], used.columns["D"], strict=True))
    rows = []
    for (n, d), count in sorted((size, count) for size, count in sizes.items() if count > 1):
        losses = used.columns["loss"][(used.columns["N"] == n) & (used.columns["D"] == d)]
        spread = float(np.std(np.log(losses), ddof=1))
        rows.append({"N": float(n), "D": float(d), "runs": count, "mean": float(losses.mean()), "spread": spread})
    if not rows:
        absent["seeds"] = "no size was run with more than one seed, so residuals have no noise to be judged by"
        return None
    degrees = sum(row["runs"] - 1 for row in rows)
    pooled = float(np.sqrt(sum((row["runs"] - 1) * row["spread"] ** 2 for row in rows) / degrees))
    ratio = result["fit"]["residual_size"] / pooled if pooled else None
    return {"sizes": rows, "spread": pooled, "degrees_of_freedom": degrees, "residuals_over_spread": ratio}


def provenance(path: Path, raw: list[tuple[int, dict]]) -> dict:
    """Where the rows come from, as they say themselves, the sweep's file beside them, and versions of what fitted."""
    counts = {key: Counter(str(row[key]) for _, row in raw if row.get(key) is not None) for key in PROVENANCE}
    sweep = path.with_name(SWEEP)
    return {
        "from": {key: dict(sorted(found.items())) for key, found in counts.items() if found},
        "sweep": sweep.read_text(errors="replace") if sweep.is_file() else None,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("jax", "numpy", "scipy")},
    }


def warnings(report: dict, used: Table) -> list[str]:
    """What the report adds to the analysis' own warnings."""
    result, head, noise, said = report["analysis"], report["headline"], report["seeds"], []
    if refused := len(result["refused"]):
        rows = result["table"]["rows"]
        said.append(f"{refused} of {rows} rows are refused, each with its reason under Provenance")
    if far := [str(one["line"]) for one in result["outliers"]]:
        said.append(f"outliers, {len(far)} of {len(used)} runs, stay in the fit: line {', '.join(far)} of the table")
    if head and head["beyond"] > BEYOND * 1.001:
        said.append(f"the budget lies {head['beyond']:.3g} times beyond the largest run: bands suppose the law to hold")
    if result["bootstrap"] is None:
        said.append("there was no bootstrap, so there are neither intervals nor bands")
    if noise and noise["residuals_over_spread"] and noise["residuals_over_spread"] > TOO_LARGE:
        ratio = noise["residuals_over_spread"]
        said.append(f"residuals are {ratio:.3g} times the spread of seeds: more than noise, the law misses something")
    return said
