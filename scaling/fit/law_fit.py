"""Fits one law to one table: a grid of starts, each brought to its minimum, the best one kept, and how many agree on
it."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from scaling.fit.laws import FLOPS_PER_TOKEN_AND_PARAMETER, Law, Sizes
from scaling.fit.solver import DEFAULT, Objective, Problem, Runs, Solution, quantities, residuals_of, solve

AGREE = 1e-6  # starts reach the best when their objective is within this share of it
ROUNDS, RESTARTS = 2, 48  # further starts around the best optimum so far
FARTHEST = 1.5  # how far they go, in logarithms and exponents
DERIVED = ("N exponent", "N at budget", "D at budget", "D/N at budget", "loss at budget")


@dataclass(frozen=True)
class Fit:
    """A law fitted to a table: `theta` minimises the objective. Residuals are log predicted less log measured loss,
    whatever the objective sees."""

    law: Law
    objective: Objective
    features: np.ndarray  # [runs, k] less centre
    centre: np.ndarray
    log_loss: np.ndarray  # [runs], measured
    log_budget: float  # log C that the derived quantities are for
    theta: np.ndarray
    residuals: np.ndarray  # [runs]
    starts: int
    reached: int  # starts whose minimum is the best one
    converged: bool
    condition: float  # of the residuals' Jacobian in theta, columns scaled to length 1
    unseen: tuple[str, ...]  # parameters that no run's prediction depends on

    @property
    def value(self) -> float:
        """The objective, summed over runs."""
        seen = self.residuals
        if self.objective.linear:
            seen = np.exp(self.log_loss + self.residuals) - np.exp(self.log_loss)
        return float(self.objective.value(seen))

    @property
    def degrees_of_freedom(self) -> int:
        """Runs less parameters; at least 1, since `fit` asks for one run more than parameters."""
        return len(self.log_loss) - len(self.theta)

    @property
    def noisy(self) -> bool:
        """Whether residuals are more than rounding errors. The largest tells: few runs may leave most at 0."""
        return float(np.max(np.abs(self.residuals))) > 1e-9

    @property
    def parameters(self) -> dict[str, float]:
        """By name, as in the law's formula."""
        return {name: value for name, value in self.quantities.items() if name in self.law.parameters}

    @property
    def quantities(self) -> dict[str, float]:
        """Parameters and, where the law has an optimum, what follows for the budget."""
        values = np.where(self.logged, np.exp(np.where(self.logged, self.scores, 0)), self.scores)
        return dict(zip(self.names, map(float, values), strict=True))

    @property
    def names(self) -> tuple[str, ...]:
        """The law's parameters, then what is derived for the budget; the order of `scores` and of all intervals."""
        return self.law.parameters + (DERIVED if self.law.optimum else ())

    @property
    def logged(self) -> np.ndarray:
        """Which quantities are positive and handled as logs, bool in the order of `names`."""
        return np.array(self.law.logged + ((False, True, True, True, True) if self.law.optimum else ()))

    @property
    def scores(self) -> np.ndarray:
        """Quantities as the intervals handle them, in the order of `names`: logs of the positive ones."""
        with jax.enable_x64(True):
            return np.asarray(quantities(self.law, jnp.asarray(self.theta), self.centre, jnp.asarray(self.log_budget)))

    @property
    def log_surface(self) -> np.ndarray:
        """[runs]: the fitted log losses."""
        with jax.enable_x64(True):
            return np.asarray(self.law.log_loss(jnp.asarray(self.theta), jnp.asarray(self.features), self.centre))

    @property
    def runs(self) -> Runs:
        """The solver's form of the runs' sizes."""
        return Runs(self.features, np.ones(len(self.log_loss)), self.centre, self.log_budget)

    def predict(self, sizes: Sizes) -> np.ndarray:
        """Losses of other runs, (runs,), in the unit of the fitted ones; `sizes` as of `fit`."""
        features = self.law.features(sizes) - self.centre
        with jax.enable_x64(True):
            return np.exp(np.asarray(self.law.log_loss(jnp.asarray(self.theta), jnp.asarray(features), self.centre)))


def fit(law: Law, sizes: Sizes, loss: np.ndarray, objective: Objective = DEFAULT, budget: float | None = None) -> Fit:
    """Fits a law to runs; deterministic.

    Sizes: arrays by the letters of `law.inputs`; loss: nats a token (or seconds, for a law of time). `budget` in
    FLOPs is what optimal sizes are given for, the largest of the table unless said. Raises ValueError where there is
    too little to fit.
    """
    law = replace(law, linear=objective.linear)
    sizes = {letter: np.asarray(sizes[letter], float) for letter in law.inputs}
    loss = np.asarray(loss, float)
    _check(law, sizes, loss)
    features, log_loss = law.features(sizes), np.log(loss)
    centre = features.mean(0)
    features = features - centre
    if budget is None:
        budget = FLOPS_PER_TOKEN_AND_PARAMETER * np.max(sizes["N"] * sizes["D"]) if law.optimum else 1.0
    starts = law.starts(features, log_loss, centre)
    runs = Runs(features, np.ones(len(loss)), centre, np.log(budget))
    found = solve(law, runs, Problem(starts, log_loss, objective.width))
    if not np.isfinite(found.value.min()):
        raise ValueError(f"{law.name}: no start has a finite objective; are all sizes positive and in one unit?")
    residual = jax.jit(lambda theta: residuals_of(law, law.log_loss(theta, features, centre), log_loss))
    for seed in range(ROUNDS):
        again = solve(law, runs, Problem(_around(residual, found, seed), log_loss, objective.width))
        found = Solution(*(np.concatenate(pair) for pair in zip(found, again, strict=True)))
    best = int(np.argmin(found.value))
    with jax.enable_x64(True):
        theta = jnp.asarray(found.theta[best])
        residuals = np.asarray(law.log_loss(theta, jnp.asarray(features), centre)) - log_loss
        jacobian = np.asarray(jax.jacfwd(residual)(theta))
    rounding = 1e-22 * len(loss) / min(objective.width, 1)
    length = np.maximum(np.linalg.norm(jacobian, axis=0), 1e-300)
    return Fit(
        law=law,
        objective=objective,
        features=features,
        centre=centre,
        log_loss=log_loss,
        log_budget=float(np.log(budget)),
        theta=np.asarray(theta),
        residuals=residuals,
        starts=len(found.value),
        reached=int(np.sum(found.value <= found.value[best] * (1 + AGREE) + rounding)),
        converged=bool(found.converged[best]),
        condition=float(np.linalg.cond(jacobian / length)),
        unseen=tuple(name for name, x in zip(law.parameters, length, strict=True) if x < 1e-12 * length.max()),
    )


def _around(residual: Callable, found: Solution, seed: int) -> np.ndarray:
    """Starts (RESTARTS, parameters) near the best optimum, as far away as the runs leave it uncertain.

    Huber's loss with a small delta has many local optima, one beside the other.
    """
    best = found.theta[np.argmin(found.value)]
    with jax.enable_x64(True):
        residuals, jacobian = np.asarray(residual(best)), np.asarray(jax.jacfwd(residual)(best))
    spread = max(float(np.sqrt(np.mean(residuals**2))), 1e-12)
    _, singular, directions = np.linalg.svd(np.nan_to_num(jacobian), full_matrices=False)
    reach = spread / np.maximum(singular, spread / FARTHEST)  # a direction that no run sees would go anywhere
    rng = np.random.default_rng(seed)
    drawn = rng.normal(size=(RESTARTS, len(reach))) * rng.choice([0.5, 1.5, 4.0], (RESTARTS, 1))
    return best + np.clip(drawn * reach, -FARTHEST, FARTHEST) @ directions


def _check(law: Law, sizes: dict[str, np.ndarray], loss: np.ndarray) -> None:
    needed = len(law.parameters) + 1
    if len(loss) < needed:
        raise ValueError(
            f"{law.name} has {len(law.parameters)} parameters and needs {needed} runs or more; got {len(loss)}"
        )
    for name, values in {**sizes, "loss": loss}.items():
        zero_allowed = name == "S2"
        if values.shape != loss.shape or not np.all(np.isfinite(values)) or (not zero_allowed and np.any(values <= 0)):
            raise ValueError(f"{name}: {len(loss)} finite positive numbers are needed; got shape {values.shape}")
    for group in law.vary or [(name,) for name in law.inputs if name != "S2"]:
        if all(np.all(sizes[name] == sizes[name][0]) for name in group):
            values = " and ".join(f"{name} is {sizes[name][0]:g}" for name in group)
            raise ValueError(f"{law.name}: {values} in every run, so its term cannot be told from a constant")
