"""One table through everything: screening, the fit with and without outliers, intervals, other approaches, held-out
error.

The result is plain data, the same for the terminal and for the JSON file; docs/scaling.md lists its keys.
"""

from dataclasses import dataclass, replace

import numpy as np

from scaling.fit.diagnostics import outliers, residuals_by, screen, trained, warnings
from scaling.fit.isoflop import envelope, least_losses, parabolas, slices
from scaling.fit.law_fit import Fit, fit
from scaling.fit.laws import FLOPS_PER_TOKEN_AND_PARAMETER, Law
from scaling.fit.prediction import asked_sizes, holdout, predictions
from scaling.fit.resampling import robust_size
from scaling.fit.runs_table import Table
from scaling.fit.solver import DEFAULT, Objective
from scaling.fit.uncertainty import LEVELS, Uncertainty, bootstrap, intervals_at, profile_curve

FLOORS = ("E", "L0")
DISAGREE = (
    0.05  # exponents of two approaches that differ by more, and whose intervals do not meet, contradict each other
)


@dataclass(frozen=True)
class FitRequest:
    """What is asked of a table: which law, how it is fitted, and at which budgets and sizes it is read off."""

    law: Law
    objective: Objective = DEFAULT
    draws: int = 1000  # bootstrap refits; 0: no intervals
    seed: int = 0  # of the bootstrap
    budget: float | None = None  # FLOPs to give the optimum for; None: the table's largest
    holdout_above: float | None = None  # FLOPs; runs above are predicted from those below
    curve: tuple[float, ...] = ()  # budgets in FLOPs at which the optimum and its intervals are wanted, too
    min_ratio: float = 0.0  # runs of fewer tokens a parameter are left out
    keep_all: bool = False  # fit runs too that only a robust surface speaks against
    resample: str | None = None  # what the bootstrap draws: residuals, cases or runs; None: by the table's form
    points: tuple[dict[str, float], ...] = ()  # sizes, by letter, at which losses are predicted


def analyse(table: Table, request: FitRequest) -> dict:
    """Everything about one fit, as plain data. Raises ValueError for tables that cannot be fitted."""
    read = len(table) + len(table.refused)
    whole = trained(table.ordered(), request.min_ratio)  # what is held out is taken from here, before any screening
    table = whole if request.keep_all else screen(request.law, whole)
    points = asked_sizes(request.law, request.points)
    fitted = fit(request.law, table.columns, table.columns["loss"], request.objective, request.budget)
    runs = table.columns.get("run")
    wanted = request.draws and fitted.noisy
    certain = bootstrap(fitted, request.draws, request.seed, request.resample, runs) if wanted else None
    far = outliers(fitted, table)
    result = {
        "law": {"name": request.law.name, "formula": request.law.formula, "source": request.law.source},
        "table": {"path": table.path, "sha256": table.digest, "rows": read, "used": len(table)},
        "refused": [{"line": row.line, "reason": row.reason} for row in table.refused],
        "notes": list(table.notes),
        "convention": f"C = {FLOPS_PER_TOKEN_AND_PARAMETER} N D",
        "objective": {
            "kind": request.objective.kind,
            "delta": request.objective.delta if request.objective.kind == "huber" else None,
            "residuals": "linear" if request.objective.linear else "log",
        },
        "fit": described(fitted, certain),
        "budget": budget_of(fitted),
        "bootstrap": None if certain is None else drawn(certain, request),
        "floor_profile": None if certain is None else floor_profile(fitted, certain),
        "residuals_by": residuals_by(fitted, table),
        "outliers": [vars(one) for one in far],
        "without_outliers": without_outliers(table, far, request, fitted),
        "approaches": approaches(fitted, certain, table),
        "holdout": None,
        "curve": curve(fitted, certain, request.curve),
        "predictions": predictions(fitted, certain, points) if request.points else [],
    }
    if request.holdout_above is not None:
        how = (request.keep_all, request.draws, request.seed)
        result["holdout"] = holdout(request.law, whole, request.objective, request.holdout_above, *how)
    result["warnings"] = [*warnings(fitted, table, certain), *result["approaches"].pop("disagreements", [])]
    if not fitted.noisy:
        result["warnings"].append("the residuals are rounding errors: there is no noise, so intervals are not defined")
    return result


def drawn(certain: Uncertainty, request: FitRequest) -> dict:
    """What the intervals rest on: `of` residuals, cases or runs, and how many there are to draw."""
    kept = {"draws": request.draws, "seed": request.seed, "failed": certain.failed}
    return kept | {"of": certain.kind, "independent": certain.independent}


def described(fitted: Fit, certain: Uncertainty | None) -> dict:
    """The optimum, how sure it is, and each quantity with its intervals; infinite ends are None."""
    quantities = {}
    for row, (name, value) in enumerate(fitted.quantities.items()):
        quantities[name] = {"value": value}
        for level in LEVELS if certain else ():
            ends = certain.intervals[level][row]
            quantities[name][f"interval{level * 100:.0f}"] = _ends(ends)
    return {
        "quantities": quantities,
        "objective_sum": fitted.value,
        "objective_mean": fitted.value / len(fitted.residuals),
        "starts": fitted.starts,
        "starts_reaching_best": fitted.reached,
        "converged": fitted.converged,
        "condition_number": fitted.condition,
        "residual_size": robust_size(fitted.residuals, len(fitted.theta)),
    }


def curve(fitted: Fit, certain: Uncertainty | None, budgets: tuple[float, ...]) -> list[dict]:
    """The optimum at each budget: C, and N, D and loss with their intervals; empty for a law without an optimum."""
    points = []
    for budget in budgets if fitted.law.optimum else ():
        values = replace(fitted, log_budget=float(np.log(budget))).quantities
        ends = None if certain is None else intervals_at(fitted, certain, budget)
        point: dict = {"C": float(budget)}
        for letter in ("N", "D", "loss"):
            row = fitted.names.index(f"{letter} at budget")
            point[letter] = {"value": values[f"{letter} at budget"]}
            for level in LEVELS if ends else ():
                point[letter][f"interval{level * 100:.0f}"] = _ends(ends[level][row])
        points.append(point)
    return points


def _ends(interval: np.ndarray) -> list[float | None]:
    return [float(end) if np.isfinite(end) else None for end in interval]


def budget_of(fitted: Fit) -> float | None:
    """The FLOPs that optimal sizes are given for; None for a law without an optimum."""
    return float(np.exp(fitted.log_budget)) if fitted.law.optimum else None


def floor_profile(fitted: Fit, certain: Uncertainty) -> dict | None:
    """The profile of the law's floor: values, and F there against the 95% threshold."""
    name = next((name for name in FLOORS if name in fitted.names), None)
    if name is None:
        return None
    row = fitted.names.index(name)
    spread = 1.4826 * np.median(np.abs(certain.draws[:, row] - fitted.scores[row]))
    reached, statistic = profile_curve(fitted, row, max(spread, 1e-12))
    threshold = float(certain.thresholds[0.95][row])
    return {"name": name, "value": np.exp(reached).tolist(), "F": statistic.tolist(), "threshold95": threshold}


def without_outliers(table: Table, far: list, request: FitRequest, fitted: Fit) -> dict | None:
    """The fit without the outliers, at the same budget; None where there are none, or too few runs would be left."""
    rows = {int(np.flatnonzero(table.lines == one.line)[0]): "outlier" for one in far}
    if not rows or len(table) - len(rows) <= len(request.law.parameters):
        return None
    rest, budget = table.without(rows), float(np.exp(fitted.log_budget))
    return described(fit(request.law, rest.columns, rest.columns["loss"], request.objective, budget), None)


def approaches(fitted: Fit, certain: Uncertainty | None, table: Table) -> dict:
    """The exponent of the optimal N in C by each approach that the table allows, side by side, never averaged."""
    found, columns = {}, table.columns
    if fitted.law.optimum is None or not {"N", "C"} <= columns.keys():
        return found
    budget = float(np.exp(fitted.log_budget))
    row = fitted.names.index("N exponent")
    interval = None if certain is None else _ends(certain.intervals[0.95][row])
    found["parametric"] = {"exponent": fitted.quantities["N exponent"], "interval95": interval}
    if "group" in columns:
        cuts = slices(columns["N"], columns["C"], columns["loss"], columns["group"])
        found["isoflop"] = _approach(parabolas(cuts), budget, "fewer than 3 budgets have an interior minimum")
        if losses := least_losses(cuts):
            found["isoflop"] |= {"loss": losses.at(budget), "loss_exponent": losses.exponent}
        found["isoflop"]["slices"] = [
            {"name": cut.name, "runs": cut.runs, "C": float(np.exp(cut.log_c)), "refused": cut.refused}
            | ({} if cut.refused else {"N": float(np.exp(cut.log_n)), "loss": cut.loss, "curvature": cut.curvature})
            for cut in cuts
        ]
    if "run" in columns:
        law = envelope(columns["N"], columns["C"], columns["loss"], columns["run"])
        found["envelope"] = _approach(law, budget, "fewer than 3 runs lie on the envelope between its ends")
    found["disagreements"] = list(_disagreements(found))
    return found


def _approach(law, budget: float, refusal: str) -> dict:
    if law is None:
        return {"refused": refusal}
    best = law.optimum(budget)
    return {
        "exponent": law.exponent,
        "interval95": list(law.interval),
        "budgets": law.budgets,
        "N": best["N"],
        "D": best["D"],
    }


def _disagreements(found: dict):
    known = [(name, one) for name, one in found.items() if None not in (one.get("interval95") or [None])]
    for place, (name, one) in enumerate(known):
        for other_name, other in known[place + 1 :]:
            (low, high), (other_low, other_high) = one["interval95"], other["interval95"]
            apart = high < other_low or other_high < low
            if apart and abs(one["exponent"] - other["exponent"]) > DISAGREE:
                yield (
                    f"the approaches disagree: N_opt grows as C^{one['exponent']:.3f} by {name}"
                    f" and as C^{other['exponent']:.3f} by {other_name}; none is averaged away"
                )
