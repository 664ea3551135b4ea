"""What speaks against a fit, in words: rows that cannot be right, outliers, trends, what the data do not identify."""

from dataclasses import dataclass

import numpy as np

from scaling.fit.law_fit import Fit, fit
from scaling.fit.laws import Law
from scaling.fit.runs_table import Table
from scaling.fit.solver import Objective
from scaling.fit.uncertainty import Uncertainty, robust_size

OUTLIER = 5.0  # residual over the residuals' robust size: 1 in 2 million for normal noise
DIVERGED = 1.5  # a loss this many times the surface's is no noise
UNITS = 30.0  # a loss that fits D this many times larger or smaller points to another unit, if it is also
FAR = 0.15  # this far from the surface, in log loss, and that D explains it
NARROW = 10.0  # N or D within this factor: exponents come from hardly any spread
ILL_CONDITIONED = 1e3
TREND = 3.0  # t value


@dataclass(frozen=True)
class Outlier:
    """A run far from the surface; it stays in the fit, and a second fit goes without it."""

    line: int
    residual: float  # log measured less log fitted loss
    sizes: float  # the same over the residuals' robust size


def trained(table: Table, ratio: float) -> Table:
    """The table less runs of fewer than `ratio` tokens a parameter: hardly trained, they may follow no law of others.

    Raises ValueError where nothing is left, or the table has no N and D.
    """
    if not ratio:
        return table
    if not {"N", "D"} <= table.columns.keys():
        raise ValueError(f"--min-ratio {ratio:g} is in tokens a parameter; the table has {', '.join(table.columns)}")
    ratios = table.columns["D"] / table.columns["N"]
    if ratios.max() < ratio:
        raise ValueError(f"--min-ratio {ratio:g} leaves no run: D / N is {ratios.min():.3g} to {ratios.max():.3g}")
    below = np.flatnonzero(ratios < ratio)
    return table.without({int(row): f"D / N = {ratios[row]:.3g} is below --min-ratio {ratio:g}" for row in below})


def screen(law: Law, table: Table) -> Table:
    """The table less runs that a robust surface shows to be no measurements of it: diverged, or in another unit.

    The surface is fitted with Huber's loss at 1e-3, which a minority of bad rows hardly moves, whatever objective
    follows.
    """
    while len(table) > len(law.parameters) + 2:
        surface = fit(law, table.columns, table.columns["loss"], Objective("huber", 1e-3))
        bad = {}
        size = max(robust_size(surface.residuals, len(surface.theta)), 1e-6)
        for row in np.flatnonzero(np.abs(surface.residuals) > 2 * OUTLIER * size):
            above = np.exp(-surface.residuals[row])
            factor = _factor_of_tokens(surface, table, row) if "D" in law.inputs else None
            if above > DIVERGED:
                bad[int(row)] = f"diverged? its loss is {above:.2f} times the fitted surface's"
            elif factor is not None and abs(np.log(factor)) > np.log(UNITS) and abs(np.log(above)) > FAR:
                bad[int(row)] = (
                    f"units mixed up (tokens against examples?): its loss is that of {factor:.3g} times its D"
                )
        if not bad or len(bad) > len(table) // 3:
            return table
        table = table.without({row: f"{reason} (--keep-all fits it all the same)" for row, reason in bad.items()})
    return table


def _factor_of_tokens(surface: Fit, table: Table, row: int) -> float | None:
    """How many times its D a run's loss speaks for; None where no D within 5 powers of ten explains it."""
    factors = np.geomspace(1e-5, 1e5, 401)
    sizes = {letter: np.repeat(table.columns[letter][row], len(factors)) for letter in surface.law.inputs}
    sizes["D"] = sizes["D"] * factors
    gap = np.log(surface.predict(sizes)) - surface.log_loss[row]
    crossed = np.flatnonzero(np.diff(np.sign(gap)))
    return float(factors[crossed[0]]) if len(crossed) else None


def outliers(fitted: Fit, table: Table) -> list[Outlier]:
    """Runs whose residual is beyond `OUTLIER` robust sizes, largest first."""
    size = max(robust_size(fitted.residuals, len(fitted.theta)), 1e-9)
    ratio = -fitted.residuals / size
    rows = np.flatnonzero(np.abs(ratio) > OUTLIER)
    found = [Outlier(int(table.lines[row]), float(-fitted.residuals[row]), float(ratio[row])) for row in rows]
    return sorted(found, key=lambda one: -abs(one.sizes))


def residuals_by(fitted: Fit, table: Table) -> dict[str, dict]:
    """For each size: mean residual (log measured less fitted) of the lowest, middle and highest third, and a trend's
    t."""
    found = {}
    for letter in dict.fromkeys((*fitted.law.inputs, "C")):
        if letter not in table.columns:
            continue
        values = table.columns[letter]
        order = np.argsort(values, kind="stable")
        thirds = [float(np.mean(-fitted.residuals[part])) for part in np.array_split(order, 3)]
        rank = np.argsort(order).astype(float)
        rank -= rank.mean()
        slope = rank @ -fitted.residuals / (rank @ rank)
        rest = -fitted.residuals + fitted.residuals.mean() - slope * rank
        error = np.sqrt(max(rest @ rest, 1e-300) / max(fitted.degrees_of_freedom, 1) / (rank @ rank))
        found[letter] = {"thirds": thirds, "trend_t": float(slope / error)}
    return found


def warnings(fitted: Fit, table: Table, certain: Uncertainty | None) -> list[str]:
    """What a reader must know before using the numbers; empty where nothing speaks against them."""
    law, said = fitted.law, []
    if fitted.reached < 2:
        said.append(f"only {fitted.reached} of {fitted.starts} starts reached the best optimum: it may not be the best")
    if not fitted.converged:
        said.append("the optimiser did not finish: the optimum is flat or at infinity")
    if fitted.condition > ILL_CONDITIONED:
        said.append(f"condition number {fitted.condition:.2g}: the runs hardly tell the parameters apart")
    for letter in law.inputs:
        values = table.columns[letter]
        if letter in "ND" and values.max() < NARROW * values.min():
            spread = values.max() / values.min()
            said.append(
                f"{letter} spans a factor of {spread:.3g} only: its exponent rests on little, do not extrapolate"
            )
    said += [f"{name} is unidentified: no run depends on it, any value fits as well" for name in fitted.unseen]
    if "U" in law.inputs and not np.any(table.columns["D"] > table.columns["U"]):
        said.append("no run repeats data: R_D* is unidentified")
    if "group" in table.columns and (count := len(set(table.columns["group"]))) < 3:
        said.append(f"too few budgets: {count}; a power law through the optima needs 3 or more")
    low, high = (None, None) if certain is None else certain.intervals[0.95].T
    for row, name in enumerate(fitted.names if certain else ()):
        if not fitted.logged[row] and name != "N exponent" and low[row] <= 0:
            said.append(f"{name} is unidentified: its 95% interval reaches {low[row]:.3g}")
        elif low[row] == 0 or not np.isfinite(low[row]):
            words = (
                "any value down to 0 fits, so extrapolation to a floor is not supported" if name in ("E", "L0") else ""
            )
            said.append(f"{name} is unidentified from below" + (f": {words}" if words else ""))
        if not np.isfinite(high[row]):
            said.append(f"{name} is unidentified from above")
    for letter, found in residuals_by(fitted, table).items():
        if abs(found["trend_t"]) > TREND:
            said.append(
                f"residuals trend with {letter} (t = {found['trend_t']:.1f}): the law does not describe these runs"
            )
    return said


def holdout(law: Law, table: Table, objective: Objective, above: float) -> dict:
    """Fits the runs with C up to `above` and predicts the others: relative errors, predicted over measured less 1.

    Raises ValueError where either part is too small or there is no C.
    """
    if "C" not in table.columns:
        raise ValueError(f"a held-out fit needs C, or N and D; the table has {', '.join(table.columns)}")
    compute = table.columns["C"]
    low, high = compute <= above, compute > above
    if not high.any() or low.sum() <= len(law.parameters):
        raise ValueError(
            f"holdout above {above:g} leaves {low.sum()} runs to fit and {high.sum()} to predict;"
            f" C runs from {compute.min():.3g} to {compute.max():.3g} and {law.name} needs {len(law.parameters) + 1}"
        )
    part = lambda which: {name: values[which] for name, values in table.columns.items()}
    fitted = fit(law, part(low), table.columns["loss"][low], objective)
    predicted, measured = fitted.predict({k: part(high)[k] for k in law.inputs}), table.columns["loss"][high]
    errors = predicted / measured - 1
    return {
        "above": above,
        "fitted_runs": int(low.sum()),
        "parameters": fitted.parameters,
        "median_absolute_error": float(np.median(np.abs(errors))),
        "largest_absolute_error": float(np.max(np.abs(errors))),
        "runs": [
            {"line": int(line), "C": float(c), "measured": float(y), "predicted": float(p), "error": float(e)}
            for line, c, y, p, e in zip(table.lines[high], compute[high], measured, predicted, errors, strict=True)
        ],
    }
