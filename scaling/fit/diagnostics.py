"""What speaks against a fit, in words: rows that cannot be right, outliers, trends, what the data do not identify."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
from scipy.stats import kruskal

from scaling.fit.law_fit import Fit, fit
from scaling.fit.laws import Law
from scaling.fit.resampling import robust_size
from scaling.fit.runs_table import Table
from scaling.fit.solver import Objective
from scaling.fit.uncertainty import Uncertainty

OUTLIER = 5.0  # residual over the residuals' robust size: 1 in 2 million for normal noise
DIVERGED = 1.5  # a loss this many times the surface's is no noise
UNITS = 30.0  # a loss that fits D this many times larger or smaller points to another unit, if it is also
FAR = 0.15  # this far from the surface, in log loss, and that D explains it
NARROW = 10.0  # N or D within this factor: exponents come from hardly any spread
ILL_CONDITIONED = 1e3
TREND = 3.0  # t value
LEVELS_MOST, LEVEL_ROWS = 12, 3  # of a column that residuals may cluster by: its values, and rows of each
CHANCE = 1e-3  # that residuals without clusters look so


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


def unseen(fitted: Fit, certain: Uncertainty | None) -> list[str]:
    """Parameters that no run depends on at the optimum. An interval that ends somewhere says more: other values fit
    worse, so these are left to it."""
    said = []
    for name in fitted.unseen:
        if certain is None:
            said.append(f"{name} is unidentified from one side or both: at the optimum no run depends on it")
            continue
        low, high = certain.intervals[0.95][fitted.names.index(name)]
        if low <= 0 and not np.isfinite(high):
            said.append(f"{name} is unidentified: no run depends on it, any value fits as well")
    return said


def clusters(fitted: Fit, table: Table) -> list[str]:
    """Columns by whose values residuals lie together: runs of several data sets, say, that one law does not describe.

    Columns of the file that were not asked for, of 2 to `LEVELS_MOST` values with `LEVEL_ROWS` rows each, are tried,
    each by a rank test (Kruskal and Wallis) at `CHANCE` over their number. Values that follow from N or D are left to
    trends.
    """
    residuals, found = -fitted.residuals, []
    tried = {name: values for name, values in table.others.items() if _labels(values, table)}
    for name, values in tried.items():
        levels = sorted(set(values))
        parts = [residuals[values == level] for level in levels]
        _, chance = kruskal(*parts)
        if chance < CHANCE / len(tried):
            means = ", ".join(f"{level} {np.mean(part):+.2%}" for level, part in zip(levels, parts, strict=True))
            text = f"residuals cluster by {name} ({means}): one law does not describe all; fit each alone"
            found.append(f'{text}, with --where "{name} == ..."')
    return found


def _labels(values: np.ndarray, table: Table) -> bool:
    counts = Counter(values)
    if not 2 <= len(counts) <= LEVELS_MOST or min(counts.values()) < LEVEL_ROWS:
        return False
    for size in (table.columns[letter] for letter in ("N", "D") if letter in table.columns):
        few = len(set(size)) <= len(size) // 2  # where each row has a size of its own, nothing can follow from it
        if few and len(set(zip(size, values, strict=True))) == len(set(size)):
            return False
    return True


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
    said += unseen(fitted, certain)
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
            over = f": so is all over {low[row]:.4g}" if low[row] > 0 else ""
            said.append(f"{name} is unidentified from above{over}")
    for letter, found in residuals_by(fitted, table).items():
        if abs(found["trend_t"]) > TREND:
            said.append(
                f"residuals trend with {letter} (t = {found['trend_t']:.1f}): the law does not describe these runs"
            )
    said += clusters(fitted, table)
    return said
