"""Minimises robust losses of residuals, many problems at once: damped Newton steps in float64, one compiled program.

The published replications disagree because first-order or quasi-Newton optimisers stop where the objective is flat:
whether they do depends on whether it is a sum or a mean (Besiroglu et al. 2024, arXiv 2404.10102). Here a step is
accepted by comparison of objectives, and the search ends when the Newton model promises less than 1e-14 of the
objective: both are the same for any multiple of it.

Huber's loss with a delta far below the residuals is nearly L1: a Newton step sees only the few runs within delta. So
delta starts at the size of the residuals and falls to its value, each stage starting from the last one's minimum.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from scaling.fit.laws import Law

KINDS = ("huber", "l1", "mse")
L1_DELTA = 1e-9  # L1 is the limit of Huber / delta: below any noise, above rounding
ROUNDING = 1e-29  # of a squared residual: a fit without noise ends here
STEPS = 200
STAGE = 0.35  # delta of a stage over that of the one before
CHUNK = 64  # problems in one call: small enough for the processor's cache, and few wait for the slowest
RUNS = 32  # tables are filled up to a multiple of it with runs of weight 0, so that one compiled program serves several
THREADS = 2
LENGTHS = (2.0, 1.0, 0.5, 0.2, 0.06)  # of a step that are tried: where a run crosses delta, the full one overshoots


@dataclass(frozen=True)
class Objective:
    """What is minimised: the sum over runs of a loss of residuals, log loss predicted less log loss measured.

    With `linear` residuals are losses predicted less losses measured: high losses then count for more.
    Raises ValueError for another kind, or a delta that is not above 0.
    """

    kind: str = "huber"  # huber | l1 | mse
    delta: float = 1e-3  # huber: residuals beyond it count linearly
    linear: bool = False  # residuals are of the loss itself, not of its log

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"objective {self.kind} is not one of {', '.join(KINDS)}")
        if not self.delta > 0:
            raise ValueError(f"huber delta {self.delta} must be above 0")

    @property
    def width(self) -> float:
        """The delta that the solver ends at."""
        return {"huber": self.delta, "l1": L1_DELTA, "mse": np.inf}[self.kind]

    def value(self, residuals: np.ndarray) -> np.ndarray:
        """The sum over the last dim, in the usual units: Huber r^2/2 or delta (|r| - delta/2), |r|, or r^2."""
        size = np.abs(residuals)
        if self.kind == "mse":
            return np.sum(size**2, axis=-1)
        if self.kind == "l1":
            return np.sum(size, axis=-1)
        return np.sum(np.where(size <= self.delta, size**2 / 2, self.delta * (size - self.delta / 2)), axis=-1)


DEFAULT = Objective()  # Hoffmann et al.'s


class Runs(NamedTuple):
    """What all problems of one call share: the runs' sizes."""

    features: np.ndarray  # [runs, k] less centre
    weights: np.ndarray  # [runs], 0 leaves a run out
    centre: np.ndarray  # [k]
    budget: np.ndarray  # log C that the optimum is asked for


class Problem(NamedTuple):
    """One fit. To fit under a condition, `pull` > 0 adds pull (quantities(theta)[which] - target)^2 / 2."""

    theta: np.ndarray  # where to start
    log_loss: np.ndarray  # [runs]
    width: np.ndarray  # Huber's delta, inf for squares
    which: np.ndarray = np.zeros((), int)
    target: np.ndarray = np.zeros(())
    pull: np.ndarray = np.zeros(())
    weights: np.ndarray = np.ones(())  # [runs] or one for all, of the runs in this fit, times those of `Runs`


class Solution(NamedTuple):
    """Where each problem's search ended; every field has the problems as its first dim."""

    theta: np.ndarray
    value: np.ndarray  # of Huber's loss over min(width, 1), without the pull
    scores: np.ndarray  # quantities there
    converged: np.ndarray


class _State(NamedTuple):
    theta: jax.Array
    damping: jax.Array
    width: jax.Array
    step: jax.Array
    done: jax.Array


def solve(law: Law, runs: Runs, problems: Problem) -> Solution:
    """Solves many problems; every field of `problems` has a leading dim, or is one value for all. Numpy in and out."""
    dims = Problem(1, 1, 0, 0, 0, 0, 1)
    problems = problems._replace(weights=problems.weights * np.ones(len(runs.weights)))
    count = max(len(x) if np.ndim(x) > dim else 1 for x, dim in zip(problems, dims, strict=True))
    spare = -len(runs.weights) % RUNS
    filled = lambda x, axis: np.concatenate([x, np.take(x, [0] * spare, axis=axis)], axis=axis)
    weights = np.concatenate([runs.weights, np.zeros(spare)]).astype(float)
    shared = Runs(filled(runs.features, 0), weights, np.asarray(runs.centre, float), np.float64(runs.budget))
    rows = [
        np.broadcast_to(x, (count, *np.shape(x)[np.ndim(x) - dim :])) for x, dim in zip(problems, dims, strict=True)
    ]
    rows[1], rows[6] = filled(rows[1], 1), filled(rows[6], 1)
    types = Problem(float, float, float, np.int32, float, float, float)

    def call(begin: int) -> Solution:
        picked = np.minimum(np.arange(begin, begin + CHUNK), count - 1)
        with jax.enable_x64(True):
            chunk = Problem(*(np.asarray(x[picked], kind) for x, kind in zip(rows, types, strict=True)))
            return Solution(*map(np.asarray, _solve_chunk(law, shared, chunk)))

    with ThreadPoolExecutor(THREADS) as pool:
        parts = list(pool.map(call, range(0, count, CHUNK)))
    return Solution(*(np.concatenate(part)[:count] for part in zip(*parts, strict=True)))


def huber(residuals: jax.Array, width: jax.Array) -> jax.Array:
    """Huber's loss over min(width, 1), so that it tends to L1, and not to nothing, as width falls."""
    size = jnp.abs(residuals)
    inside = jnp.minimum(size, width)  # also right for an infinite width
    return (inside**2 / 2 + inside * (size - inside)) / jnp.minimum(width, 1.0)


def quantities(law: Law, theta: jax.Array, centre: jax.Array, budget: jax.Array) -> jax.Array:
    """The law's parameters, logs of the positive ones; where it has an optimum: the exponent of the optimal N in C, and
    for the budget the logs of the optimal N, D, D/N and of the loss there."""
    natural = law.natural(theta, centre)
    if law.optimum is None:
        return natural
    best, slope = jax.jvp(lambda log_c: law.optimum(theta, centre, log_c), (budget,), (jnp.ones_like(budget),))
    log_loss = law.log_loss(theta, best - centre, centre)
    return jnp.concatenate([natural, jnp.stack([slope[0], best[0], best[1], best[1] - best[0], log_loss])])


def residuals_of(law: Law, log_predicted: jax.Array, log_loss: jax.Array) -> jax.Array:
    """What the objective sees: differences of log losses, or of losses for a law that is fitted so."""
    if law.linear:
        return jnp.exp(log_predicted) - jnp.exp(log_loss)
    return log_predicted - log_loss


def _residuals(law: Law, runs: Runs, problem: Problem, theta: jax.Array) -> jax.Array:
    return residuals_of(law, law.log_loss(theta, runs.features, runs.centre), problem.log_loss)


def _off_target(law: Law, runs: Runs, problem: Problem, theta: jax.Array) -> jax.Array:
    return quantities(law, theta, runs.centre, runs.budget)[problem.which] - problem.target


def _objective(law: Law, runs: Runs, problem: Problem, width: jax.Array, theta: jax.Array) -> jax.Array:
    fit = jnp.sum(runs.weights * problem.weights * huber(_residuals(law, runs, problem, theta), width))
    return fit + problem.pull * _off_target(law, runs, problem, theta) ** 2 / 2


def _directions(law: Law, runs: Runs, problem: Problem, state: _State) -> tuple[jax.Array, jax.Array]:
    """The Newton step and the step of the reweighted squares that bound the objective from above, damped alike."""
    values = lambda theta: _residuals(law, runs, problem, theta)
    gap = lambda theta: _off_target(law, runs, problem, theta)
    size, jacobian, curvature = _expand(values, state.theta)
    off, slope, bend = _expand(gap, state.theta)
    width, scale = state.width, jnp.minimum(state.width, 1.0)
    weights = runs.weights * problem.weights
    inside = weights / scale * (jnp.abs(size) <= width)
    bounding = weights / scale * jnp.minimum(1.0, width / jnp.maximum(jnp.abs(size), 1e-300))
    gradient = jacobian.T @ (bounding * size) + problem.pull * off * slope
    pulled = problem.pull * jnp.outer(slope, slope)
    newton = (jacobian.T * inside) @ jacobian + jnp.tensordot(bounding * size, curvature, 1)
    newton += pulled + problem.pull * off * bend
    bound = (jacobian.T * bounding) @ jacobian + pulled
    unit = jnp.sqrt(jnp.maximum(jnp.diag(bound), 1e-300))
    system = jnp.stack([newton, bound]) / jnp.outer(unit, unit) + state.damping * jnp.eye(len(unit))
    right = jnp.broadcast_to(-gradient / unit, (2, len(unit)))[..., None]
    return jnp.linalg.solve(system, right)[..., 0] / unit, gradient


def _expand(function, theta: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A function's value, first and second derivatives, by forward mode: a handful of parameters, many runs."""
    first = jax.jacfwd(function)
    return function(theta), first(theta), jax.jacfwd(first)(theta)


def _advance(law: Law, runs: Runs, problem: Problem, state: _State) -> _State:
    """One step: the best of both directions and several lengths if it lowers the objective, else more damping."""
    steps, gradient = _directions(law, runs, problem, state)
    lengthened = jnp.concatenate([length * steps for length in LENGTHS])
    tried = jnp.concatenate([state.theta[None], state.theta + lengthened])
    values = jax.vmap(lambda theta: _objective(law, runs, problem, state.width, theta))(tried)
    before, after = values[0], jnp.where(jnp.isfinite(values[1:]), values[1:], jnp.inf)
    chosen = jnp.argmin(after)
    better = after[chosen] < before
    nothing_left = before <= ROUNDING * jnp.sum(runs.weights * problem.weights) / jnp.minimum(state.width, 1.0)
    promise = jnp.abs(steps[0] @ gradient)
    # A stage ends when no step helps any more, or when what remains to gain is next to nothing.
    settled = (promise <= 1e-14 * before) | nothing_left | (~better & (state.damping > 1e6))
    last = state.width <= problem.width
    early = ~last & better & (before - after[chosen] < 0.03 * before)  # only the last stage need be finished
    over = settled | early
    damping = jnp.where(better, jnp.maximum(state.damping / 10, 1e-15), state.damping * 30 + 1e-9)
    return _State(
        theta=jnp.where(better, tried[1 + chosen], state.theta),
        damping=jnp.where(over, 1e-6, damping),
        width=jnp.where(over, jnp.maximum(state.width * STAGE, problem.width), state.width),
        step=state.step + 1,
        done=settled & last,
    )


def _solve_one(law: Law, runs: Runs, problem: Problem) -> Solution:
    size = jnp.abs(_residuals(law, runs, problem, problem.theta))
    weights = runs.weights * problem.weights
    size = jnp.sum(jnp.where(jnp.isfinite(size), size, 1.0) * weights) / jnp.sum(weights)
    first = jnp.maximum(size, problem.width)
    start = _State(problem.theta, jnp.float64(1e-3), first, jnp.int32(0), jnp.bool_(False))
    going = lambda state: ~state.done & (state.step < STEPS)
    end = jax.lax.while_loop(going, partial(_advance, law, runs, problem), start)
    value = jnp.sum(weights * huber(_residuals(law, runs, problem, end.theta), problem.width))
    scores = quantities(law, end.theta, runs.centre, runs.budget)
    return Solution(end.theta, jnp.where(jnp.isfinite(value), value, jnp.inf), scores, end.done)


@partial(jax.jit, static_argnums=0)
def _solve_chunk(law: Law, runs: Runs, problems: Problem) -> Solution:
    return jax.vmap(partial(_solve_one, law, runs))(problems)
