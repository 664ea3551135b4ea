"""The laws that can be fitted: each predicts a log loss from parameters and a run's sizes, and says where to start.

Letters of a run's sizes: N parameters, D training tokens, U unique tokens among them, C = 6 N D training FLOPs, M = D
/ N tokens for each parameter; S1, S2 areas of a learning-rate schedule; F FLOPs of a step, P devices, V bytes that a
device exchanges in a step.

A law works on `theta`, unbounded numbers, and on `features`, the logs of sizes less their means over the table
(`centre`). Coefficients are then terms' sizes in the middle of the data, which hardly depend on exponents: a far
better conditioned problem than A and B themselves, which lie at N = D = 1.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np

# 2 forward, 4 backward. Attention's own FLOPs are not counted, and N is whatever the table calls parameters.
FLOPS_PER_TOKEN_AND_PARAMETER = 6

Sizes = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Law:
    """One parametric law. Functions of theta are JAX's and take one theta; `starts` gives many, as rows."""

    name: str
    formula: str  # as people write it
    source: str
    inputs: tuple[str, ...]  # letters of the sizes it reads
    parameters: tuple[str, ...]  # as in the formula
    logged: tuple[bool, ...]  # which of `parameters` are positive: `natural` gives their logs
    features: Callable[[Sizes], np.ndarray]  # [runs, k], not centred
    log_loss: Callable  # (theta, features [..., k] less centre, centre) -> log loss [...]
    natural: Callable  # (theta, centre) -> parameters, logs of the positive ones
    starts: Callable  # (features less centre, log losses, centre) -> [starts, len(theta)]
    optimum: Callable | None = None  # (theta, centre, log C) -> logs of N and D of the best run; features are these two
    vary: tuple[tuple[str, ...], ...] | None = None  # of each group of sizes one must vary; None: each size on its own
    linear: bool = False  # set by the objective: residuals are of losses, not of their logs


def _log_sum(*terms) -> jax.Array:
    """log of the sum of exp(terms), never overflowing."""
    most = jax.lax.stop_gradient(reduce(jnp.maximum, terms))
    return most + jnp.log(sum(jnp.exp(term - most) for term in terms))


def _logs(*letters: str) -> Callable[[Sizes], np.ndarray]:
    return lambda sizes: np.log(np.stack([sizes[letter] for letter in letters], axis=-1))


def _rows(*choices) -> np.ndarray:
    return np.array(list(product(*choices)))


def _shares(log_loss: np.ndarray, floors: tuple[float, ...], splits: tuple[float, ...]) -> list[tuple[float, ...]]:
    """Log sizes of (floor, first term, second term): a share of the least loss, and what is left of the mean, split."""
    low, mean = np.exp(log_loss.min()), np.exp(log_loss.mean())
    left = [(low * floor, mean - low * floor) for floor in floors]
    return [tuple(np.log([floor, rest * split, rest * (1 - split)])) for floor, rest in left for split in splits]


# ---- Hoffmann et al. 2022 (arXiv 2203.15556), equation 10; theta = log E, log A', log B', alpha, beta


def _hoffmann(theta, features, centre):
    e, a, b, alpha, beta = theta
    return _log_sum(e, a - alpha * features[..., 0], b - beta * features[..., 1])


def _hoffmann_natural(theta, centre):
    e, a, b, alpha, beta = theta
    return jnp.stack([e, a + alpha * centre[0], b + beta * centre[1], alpha, beta])


def _hoffmann_optimum(theta, centre, log_c):
    _, a, b, alpha, beta = _hoffmann_natural(theta, centre)
    log_nd = log_c - np.log(FLOPS_PER_TOKEN_AND_PARAMETER)
    log_n = (jnp.log(alpha / beta) + a - b + beta * log_nd) / (alpha + beta)
    return jnp.stack([log_n, log_nd - log_n])


def _hoffmann_starts(features, log_loss, centre):
    sizes = _shares(log_loss, (0.3, 0.7, 0.95), (0.25, 0.75))
    exponents = _rows((0.2, 0.5, 1.0), (0.2, 0.5, 1.0))
    return np.array([(*size, *exponent) for size in sizes for exponent in exponents])


# ---- Kaplan et al. 2020 (arXiv 2001.08361), equation 1.5; theta = both terms' logs in the middle, alpha_N, alpha_D


def _kaplan(theta, features, centre):
    n_term, d_term, alpha_n, alpha_d = theta
    return alpha_d * _log_sum(n_term - alpha_n / alpha_d * features[..., 0], d_term - features[..., 1])


def _kaplan_natural(theta, centre):
    n_term, d_term, alpha_n, alpha_d = theta
    return jnp.stack([centre[0] + n_term * alpha_d / alpha_n, centre[1] + d_term, alpha_n, alpha_d])


def _kaplan_optimum(theta, centre, log_c):
    log_nc, log_dc, alpha_n, alpha_d = _kaplan_natural(theta, centre)
    ratio, log_nd = alpha_n / alpha_d, log_c - np.log(FLOPS_PER_TOKEN_AND_PARAMETER)
    log_n = (jnp.log(ratio) + ratio * log_nc + log_nd - log_dc) / (ratio + 1)
    return jnp.stack([log_n, log_nd - log_n])


def _kaplan_starts(features, log_loss, centre):
    whole = log_loss.mean()
    logs = lambda split, alpha_d: np.log([split, 1 - split]) + whole / alpha_d
    choices = _rows((0.2, 0.5, 0.8), (0.05, 0.1, 0.3, 0.6), (0.05, 0.1, 0.3, 0.6))
    return np.array([(*logs(split, alpha_d), alpha_n, alpha_d) for split, alpha_n, alpha_d in choices])


# ---- Muennighoff et al. 2023 (arXiv 2305.16264), equations 5 and 6; theta = Hoffmann's, log R_N*, log R_D*


def _worth(log_size, log_useful, log_r):
    """Log of the effective amount: what is useful, and repetitions of it that are worth less and less."""
    repetitions = jnp.expm1(jnp.maximum(log_size - log_useful, 0))
    return log_useful + jnp.log1p(-jnp.exp(log_r) * jnp.expm1(-repetitions * jnp.exp(-log_r)))


def _muennighoff(theta, features, centre):
    e, a, b, alpha, beta, log_rn, log_rd = theta
    n, d = features[..., 0], features[..., 1]
    u = jnp.minimum(features[..., 2] + centre[2] - centre[1], d)  # centred as D is
    useful_n = (jnp.log(alpha / beta) + a - b + beta * u) / alpha  # optimal for the unique tokens
    effective_n = _worth(n, jnp.minimum(n, useful_n), log_rn)
    return _log_sum(e, a - alpha * effective_n, b - beta * _worth(d, u, log_rd))


def _muennighoff_natural(theta, centre):
    return jnp.concatenate([_hoffmann_natural(theta[:5], centre), theta[5:]])


def _muennighoff_starts(features, log_loss, centre):
    rows = _hoffmann_starts(features, log_loss, centre)
    return np.array([(*row, *log_r) for row in rows for log_r in ((1.0, 1.0), (3.0, 3.0), (9.0, 2.0), (2.0, 9.0))])


# ---- Gadre et al. 2024 (arXiv 2403.08540), equation 4: M = D / N; theta = log E, log a', log b', eta


def _gadre(theta, features, centre):
    e, a, b, eta = theta
    c, m = features[..., 0] + features[..., 1], features[..., 1] - features[..., 0]
    return _log_sum(e, a + eta * (m - c), b - eta * (m + c))


def _gadre_natural(theta, centre):
    e, a, b, eta = theta
    c, m = np.log(FLOPS_PER_TOKEN_AND_PARAMETER) + centre[0] + centre[1], centre[1] - centre[0]
    return jnp.stack([e, a + eta * (c - m), b + eta * (c + m), eta])


def _gadre_optimum(theta, centre, log_c):
    _, a, b, eta = _gadre_natural(theta, centre)
    log_nd, log_m = log_c - np.log(FLOPS_PER_TOKEN_AND_PARAMETER), (b - a) / (2 * eta)
    return jnp.stack([log_nd - log_m, log_nd + log_m]) / 2


def _gadre_starts(features, log_loss, centre):
    sizes = _shares(log_loss, (0.3, 0.7, 0.95), (0.25, 0.5, 0.75))
    return np.array([(*size, eta) for size in sizes for eta in (0.05, 0.1, 0.2, 0.4, 0.8)])


# ---- Tissue et al. 2024 (arXiv 2408.11029), equation 1; theta = log L0, log A', alpha, C times the mean S2


def annealing_areas(rates: np.ndarray, decay: float = 0.999) -> tuple[np.ndarray, np.ndarray]:
    """The two areas of a schedule after each step, from its learning rate at every step.

    S1 is the sum of rates so far. S2 sums, over all steps so far, the falls of the rate, each remembered by the factor
    `decay` a step (the paper's lambda). A rising rate counts as a negative fall.
    Raises ValueError for rates that are no list, or a decay that does not lie between 0 and 1.
    """
    rates = np.asarray(rates, float)
    if rates.ndim != 1 or len(rates) == 0 or not 0 < decay < 1:
        raise ValueError(f"a schedule is one list of rates with 0 < decay < 1; got shape {rates.shape}, decay={decay}")
    falls, momentum = -np.diff(rates, prepend=rates[0]), np.empty_like(rates)
    memory = 0.0
    for step, fall in enumerate(falls):
        memory = momentum[step] = decay * memory + fall
    return np.cumsum(rates), np.cumsum(momentum)


def _annealing(theta, features, centre):
    l0, a, alpha, gain = theta
    s2 = (features[..., 1] + centre[1]) / jnp.where(centre[1] == 0, 1, centre[1])  # over its mean
    loss = jnp.exp(l0) + jnp.exp(a - alpha * features[..., 0]) - gain * s2
    return jnp.log(jnp.where(loss > 0, loss, jnp.nan))


def _annealing_natural(theta, centre):
    l0, a, alpha, gain = theta
    return jnp.stack([l0, a + alpha * centre[0], alpha, gain / jnp.where(centre[1] == 0, 1, centre[1])])


def _annealing_features(sizes: Sizes) -> np.ndarray:
    return np.stack([np.log(sizes["S1"]), sizes["S2"]], axis=-1)


def _annealing_starts(features, log_loss, centre):
    sizes = _shares(log_loss, (0.3, 0.7, 0.95), (1 - 1e-9,))
    return np.array(
        [(*size[:2], alpha, gain) for size in sizes for alpha, gain in _rows((0.2, 0.5, 1.0), (0.0, 0.05, 0.3))]
    )


# ---- Seconds of a step in a layout: what does not shrink, arithmetic split over devices, exchange


def _step_time(theta, features, centre):
    fixed, compute, exchange = theta
    return _log_sum(fixed, compute + features[..., 0], exchange + features[..., 1])


def _step_time_features(sizes: Sizes) -> np.ndarray:
    return np.log(np.stack([sizes["F"] / sizes["P"], sizes["V"]], axis=-1))


def _step_time_starts(features, log_loss, centre):
    return np.array(_shares(log_loss, (0.05, 0.5, 0.95), (0.05, 0.5, 0.95)))


HOFFMANN = Law(
    name="hoffmann",
    formula="L = E + A / N^alpha + B / D^beta",
    source="Hoffmann et al. 2022, arXiv 2203.15556, equation 10",
    inputs=("N", "D"),
    parameters=("E", "A", "B", "alpha", "beta"),
    logged=(True, True, True, False, False),
    features=_logs("N", "D"),
    log_loss=_hoffmann,
    natural=_hoffmann_natural,
    starts=_hoffmann_starts,
    optimum=_hoffmann_optimum,
)
KAPLAN = Law(
    name="kaplan",
    formula="L = ((N_c / N)^(alpha_N / alpha_D) + D_c / D)^alpha_D",
    source="Kaplan et al. 2020, arXiv 2001.08361, equation 1.5",
    inputs=("N", "D"),
    parameters=("N_c", "D_c", "alpha_N", "alpha_D"),
    logged=(True, True, False, False),
    features=_logs("N", "D"),
    log_loss=_kaplan,
    natural=_kaplan_natural,
    starts=_kaplan_starts,
    optimum=_kaplan_optimum,
)
MUENNIGHOFF = Law(
    name="muennighoff",
    formula="L = E + A / N'^alpha + B / D'^beta; D' = U + U R_D* (1 - exp((1 - D / U) / R_D*)); N' likewise",
    source="Muennighoff et al. 2023, arXiv 2305.16264, equations 5 and 6",
    inputs=("N", "D", "U"),
    parameters=("E", "A", "B", "alpha", "beta", "R_N*", "R_D*"),
    logged=(True, True, True, False, False, True, True),
    features=_logs("N", "D", "U"),
    log_loss=_muennighoff,
    natural=_muennighoff_natural,
    starts=_muennighoff_starts,
    vary=(("N",), ("D", "U")),  # repeating one set of unique tokens tells its term as well as more tokens do
)
GADRE = Law(
    name="gadre",
    formula="L = E + (a M^eta + b / M^eta) / C^eta, M = D / N",
    source="Gadre et al. 2024, arXiv 2403.08540, equation 4",
    inputs=("N", "D"),
    parameters=("E", "a", "b", "eta"),
    logged=(True, True, True, False),
    features=_logs("N", "D"),
    log_loss=_gadre,
    natural=_gadre_natural,
    starts=_gadre_starts,
    optimum=_gadre_optimum,
)
ANNEALING = Law(
    name="annealing",
    formula="L = L0 + A / S1^alpha - C S2",
    source="Tissue et al. 2024, arXiv 2408.11029, equation 1",
    inputs=("S1", "S2"),
    parameters=("L0", "A", "alpha", "C"),
    logged=(True, True, False, False),
    features=_annealing_features,
    log_loss=_annealing,
    natural=_annealing_natural,
    starts=_annealing_starts,
)
STEP_TIME = Law(
    name="step_time",
    formula="seconds = fixed + F / (P rate) + V / bandwidth",
    source="a step's costs added up, none hidden behind another",
    inputs=("F", "P", "V"),
    parameters=("fixed", "rate", "bandwidth"),
    logged=(True, True, True),
    features=_step_time_features,
    log_loss=_step_time,
    natural=lambda theta, centre: jnp.stack([theta[0], centre[0] - theta[1], centre[1] - theta[2]]),
    starts=_step_time_starts,
)
LAWS = {law.name: law for law in (HOFFMANN, KAPLAN, MUENNIGHOFF, GADRE, ANNEALING, STEP_TIME)}


def predict(law: Law, parameters: Mapping[str, float], sizes: Sizes) -> np.ndarray:
    """Losses of runs, float64 of (runs,), under a law with published coefficients, by name as in `law.parameters`.

    sizes: arrays of (runs,) by the letters of `law.inputs`.
    """
    values = np.array([parameters[name] for name in law.parameters], float)
    features = law.features({letter: np.asarray(sizes[letter], float) for letter in law.inputs})
    zero = np.zeros(features.shape[-1])
    with jax.enable_x64(True):
        natural = np.where(law.logged, np.log(np.where(law.logged, values, 1)), values)
        return np.exp(np.asarray(law.log_loss(jnp.asarray(_theta(law, natural)), jnp.asarray(features), zero)))


def _theta(law: Law, natural: np.ndarray) -> np.ndarray:
    """The theta whose `natural` at centre 0 is this: the maps differ from the identity for three laws only."""
    if law is KAPLAN:
        log_nc, log_dc, alpha_n, alpha_d = natural
        return np.array([log_nc * alpha_n / alpha_d, log_dc, alpha_n, alpha_d])
    if law is GADRE:
        return natural - natural[3] * np.log(FLOPS_PER_TOKEN_AND_PARAMETER) * np.array([0, 1, 1, 0])
    if law is STEP_TIME:
        return natural * np.array([1, -1, -1])
    return natural
