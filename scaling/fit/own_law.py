"""A law that a user writes: L = an expression of sizes (N, D, U, C, ...) and of parameters, which are all other names.

Every parameter is above 0: a minus stands in the expression. Coefficients, in which the loss is linear, start from
nonnegative least squares for many values of the others, and are handled as the size of their terms in the middle of
the data, as those of the laws in scaling.fit.laws.
"""

import ast

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import nnls

from scaling.fit.expressions import ARRAYS, Expression, parse
from scaling.fit.laws import Law, Sizes

LETTERS = ("N", "D", "C", "U", "S1", "S2", "F", "P", "V")
SHAPES = (0.05, 2.0)  # exponents and the like start between these
STARTS = 64
MOST = 12  # parameters
SMALLEST = 1e-4  # of the mean loss: a term that least squares leaves out starts so small


def own_law(text: str) -> Law:
    """The law of an expression; "L = " before it may be left out. Raises ValueError for what is no law."""
    body = text.partition("=")[2] if text.replace(" ", "").startswith("L=") else text
    expression = parse(body.strip())
    if any(isinstance(node, ast.Compare | ast.BoolOp | ast.Tuple | ast.List) for node in ast.walk(expression.tree)):
        raise ValueError(f"the law {text!r:.200} compares or lists; a law is arithmetic")
    inputs = tuple(letter for letter in LETTERS if letter in expression.names)
    names = [name for name in expression.names if name not in LETTERS]
    if not inputs or not 0 < len(names) <= MOST:
        raise ValueError(
            f"the law {text!r:.200} reads sizes {', '.join(inputs) or 'none'} and has {len(names)} parameters; it needs"
            f" one or more of {', '.join(LETTERS)}, and 1 to {MOST} other names"
        )
    scales = [name for name in names if _linear(expression, name, names, inputs)]
    scales = scales if _linear_together(expression, scales, names, inputs) else []
    parameters = (*scales, *(name for name in names if name not in scales))
    return _law(text, expression, inputs, parameters, len(scales))


def _law(text: str, expression: Expression, inputs: tuple[str, ...], parameters: tuple[str, ...], scales: int) -> Law:
    """The law whose first `scales` parameters are coefficients."""

    def loss(values, features):
        sizes = {letter: jnp.exp(features[..., row]) for row, letter in enumerate(inputs)}
        return expression({**dict(zip(parameters, values, strict=True)), **sizes}, ARRAYS)

    def units(shapes, at):
        """[scales, ...]: each coefficient's term at these features, when it is 1 and the others are 0."""
        one = jnp.eye(scales)
        nothing = loss([*jnp.zeros(scales), *shapes], at)
        return jnp.stack([loss([*row, *shapes], at) - nothing for row in one])

    def natural(theta, centre):
        if not scales:
            return theta
        middle = units(jnp.exp(theta[scales:]), centre)
        return jnp.concatenate([theta[:scales] - jnp.log(jnp.abs(middle)), theta[scales:]])

    def log_loss(theta, features, centre):
        value = loss(list(jnp.exp(natural(theta, centre))), features + centre)
        return jnp.log(jnp.where(value > 0, value, jnp.nan))

    def starts(features, log_loss, centre):
        rng, measured, rows = np.random.default_rng(0), np.exp(log_loss), []
        with jax.enable_x64(True):
            for shapes in np.exp(rng.uniform(*np.log(SHAPES), (STARTS, len(parameters) - scales))):
                if not scales:
                    rows.append(np.log(shapes))
                    continue
                terms = np.asarray(units(shapes, jnp.asarray(features + centre)))
                terms = np.broadcast_to(terms.reshape(scales, -1), (scales, len(measured))).T
                nothing = np.asarray(loss([*np.zeros(scales), *shapes], features + centre))
                if not np.all(np.isfinite(terms)):
                    continue
                length = np.linalg.norm(terms, axis=0) + 1e-300
                found, _ = nnls(terms / length, measured - nothing, maxiter=100 * scales)
                middle = np.abs(np.asarray(units(shapes, jnp.asarray(centre)))).reshape(scales)
                size = np.maximum(found / length * middle, SMALLEST * measured.mean())
                rows.append(np.concatenate([np.log(size), np.log(shapes)]))
        if not rows:
            raise ValueError(f"the law {text!r:.200} has no finite value at the table's sizes")
        return np.array(rows)

    return Law(
        name="own",
        formula=text if text.replace(" ", "").startswith("L=") else f"L = {text}",
        source="as given; every parameter is above 0",
        inputs=inputs,
        parameters=parameters,
        logged=(True,) * len(parameters),
        features=lambda sizes: _features(sizes, inputs),
        log_loss=log_loss,
        natural=natural,
        starts=starts,
    )


def _features(sizes: Sizes, inputs: tuple[str, ...]) -> np.ndarray:
    return np.log(np.stack([np.asarray(sizes[letter], float) for letter in inputs], axis=-1))


def _linear(expression: Expression, name: str, names: list[str], inputs: tuple[str, ...]) -> bool:
    """Whether the loss is linear in one parameter, by its values at three places."""
    rng = np.random.default_rng(0)
    values = {other: rng.uniform(0.3, 0.9) for other in (*names, *inputs)}
    first, second, third = (np.asarray(expression({**values, name: x}, ARRAYS), float) for x in (1.0, 2.0, 4.0))
    return bool(abs((third - second) - 2 * (second - first)) <= 1e-4 * (abs(third) + abs(first)) and third != first)


def _linear_together(expression: Expression, scales: list[str], names: list[str], inputs: tuple[str, ...]) -> bool:
    """Whether it is linear in all of them at once: A * B is in each, but not in both."""
    rng = np.random.default_rng(1)
    values = {other: rng.uniform(0.3, 0.9) for other in (*names, *inputs)}
    at = lambda factor: np.asarray(expression({**values, **{s: factor * values[s] for s in scales}}, ARRAYS), float)
    return bool(scales) and bool(abs((at(4.0) - at(2.0)) - 2 * (at(2.0) - at(1.0))) <= 1e-4 * abs(at(4.0)))
