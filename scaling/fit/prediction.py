"""Losses of runs that were not fitted, with intervals: at sizes that are asked for, and of runs held out.

An interval is the prediction times exp(-+ sqrt(F) s): s the spread of the bootstrap's refits there, F the threshold
that this bootstrap has measured. The curve's holds the law's loss, if the law is right; a run's adds the noise of
one run.
"""

import jax
import jax.numpy as jnp
import numpy as np

from scaling.fit.diagnostics import outliers, screen
from scaling.fit.law_fit import Fit, fit
from scaling.fit.laws import FLOPS_PER_TOKEN_AND_PARAMETER, Law, Sizes
from scaling.fit.runs_table import Table
from scaling.fit.solver import Objective
from scaling.fit.uncertainty import LEVELS, Uncertainty, bootstrap


def predictions(fitted: Fit, certain: Uncertainty | None, sizes: Sizes) -> list[dict]:
    """One row for each run of `sizes`: its sizes, `loss`, and with a bootstrap `interval95`, `interval80` of the curve
    and `run95`, `run80` of one new run."""
    losses = fitted.predict(sizes)
    rows = []
    for place, loss in enumerate(losses):
        rows.append({letter: float(np.asarray(sizes[letter])[place]) for letter in fitted.law.inputs})
        rows[-1]["loss"] = float(loss)
    if certain is None:
        return rows
    drawn = _log_losses(fitted, certain.thetas, sizes) - np.log(losses)
    spread = 1.4826 * np.nanmedian(np.abs(drawn), axis=0)
    for level in LEVELS:
        factor = np.sqrt(np.median(certain.thresholds[level]))
        ends = {"interval": factor * spread, "run": factor * np.hypot(spread, certain.noise)}
        for name, reach in ends.items():
            for row, log_reach in zip(rows, reach, strict=True):
                row[f"{name}{level * 100:.0f}"] = [float(row["loss"] * np.exp(sign * log_reach)) for sign in (-1, 1)]
    return rows


def _log_losses(fitted: Fit, thetas: np.ndarray, sizes: Sizes) -> np.ndarray:
    """[thetas, runs]."""
    features = fitted.law.features({letter: np.asarray(sizes[letter], float) for letter in fitted.law.inputs})
    with jax.enable_x64(True):
        moved = jnp.asarray(features - fitted.centre)
        return np.asarray(jax.vmap(lambda theta: fitted.law.log_loss(theta, moved, fitted.centre))(jnp.asarray(thetas)))


def asked_sizes(law: Law, points: tuple[dict[str, float], ...]) -> dict[str, np.ndarray]:
    """Arrays by letter from points such as {"N": 1e9, "D": 2e10}; D follows from C and N where only these are given.

    Raises ValueError for a point that lacks a size of the law, or has one that it does not know.
    """
    whole = []
    for point in points:
        point = dict(point)
        if {"N", "C"} <= point.keys() and "D" not in point:
            point["D"] = point["C"] / (FLOPS_PER_TOKEN_AND_PARAMETER * point["N"])
        missing = [letter for letter in law.inputs if letter not in point]
        if spare := sorted(point.keys() - {*law.inputs, "C"}):
            raise ValueError(f"the law {law.name} does not know {', '.join(spare)}; it reads {', '.join(law.inputs)}")
        if missing:
            given = ", ".join(f"{letter}={value:g}" for letter, value in point.items())
            raise ValueError(f"a prediction at {given} needs {', '.join(missing)} too: {law.formula}")
        whole.append(point)
    return {letter: np.array([point[letter] for point in whole]) for letter in law.inputs}


def holdout(
    law: Law, table: Table, objective: Objective, above: float, keep_all: bool, draws: int = 0, seed: int = 0
) -> dict:
    """Fits the runs with C up to `above` and predicts all others: errors are predicted over measured less 1.

    `table` is the one before any screening: the runs below are screened by a surface of their own, and no run above is
    left out for its loss. Raises ValueError where either part is too small or there is no C.
    """
    if "C" not in table.columns:
        raise ValueError(f"a held-out fit needs C, or N and D; the table has {', '.join(table.columns)}")
    compute = table.columns["C"]
    high = compute > above
    if not high.any() or (~high).sum() <= len(law.parameters):
        raise ValueError(
            f"holdout above {above:g} leaves {(~high).sum()} runs to fit and {high.sum()} to predict;"
            f" C runs from {compute.min():.3g} to {compute.max():.3g} and {law.name} needs {len(law.parameters) + 1}"
        )
    below = table.without({int(row): "held out" for row in np.flatnonzero(high)})
    refused_before = len(below.refused)
    below = below if keep_all else screen(law, below)
    fitted = fit(law, below.columns, below.columns["loss"], objective)
    certain = bootstrap(fitted, draws, seed, runs=below.columns.get("run")) if draws and fitted.noisy else None
    rows = []
    predicted = predictions(fitted, certain, {letter: table.columns[letter][high] for letter in law.inputs})
    for line, c, y, one in zip(table.lines[high], compute[high], table.columns["loss"][high], predicted, strict=True):
        ends = {name: value for name, value in one.items() if name.startswith(("interval", "run"))}
        rows.append({"line": int(line), "C": float(c), "measured": float(y), "predicted": one["loss"]})
        rows[-1] |= {"error": one["loss"] / float(y) - 1, **ends}
    rows.sort(key=lambda row: (row["C"], row["line"]))
    errors = np.abs([row["error"] for row in rows])
    return {
        "above": above,
        "fitted_runs": len(below),
        "screened": len(below.refused) - refused_before,
        "outliers": [one.line for one in outliers(fitted, below)],
        "parameters": fitted.parameters,
        "median_absolute_error": float(np.median(errors)),
        "largest_absolute_error": float(np.max(errors)),
        "inside95": None if certain is None else sum(_holds(row) for row in rows),
        "runs": rows,
    }


def _holds(row: dict) -> bool:
    """Whether the measured loss lies in the interval of one new run."""
    return row["run95"][0] <= row["measured"] <= row["run95"][1]
