"""Parameters of a law that are fixed at a value, or tied to another: the law that is left, with fewer parameters.

In every law here each parameter, as `natural` gives it, is its own theta scaled and moved by parameters that come later
in the law's order. So theta follows from the value wanted, last parameter first.
"""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np

from scaling.fit.expressions import number
from scaling.fit.laws import Law


def constrained(law: Law, fixed: dict[str, float], tied: dict[str, str]) -> Law:
    """The law with `fixed` (name -> value) and `tied` (name -> the free parameter whose value it takes).

    Raises ValueError for names that the law does not have, values that it cannot take, and ties of ties.
    """
    if not fixed and not tied:
        return law
    _check(law, fixed, tied)
    free = [name for name in law.parameters if name not in fixed and name not in tied]
    place = {name: row for row, name in enumerate(law.parameters)}
    chosen = np.array([place[name] for name in free])
    wanted = {place[name]: np.log(value) if law.logged[place[name]] else value for name, value in fixed.items()}
    follows = {place[name]: place[other] for name, other in tied.items()}

    def whole(theta, centre):
        """The law's own theta, from the free ones."""
        full = jnp.zeros(len(law.parameters), jnp.result_type(theta)).at[chosen].set(theta)
        for row in sorted({*wanted, *follows}, reverse=True):
            zero, one = (law.natural(full.at[row].set(value), centre) for value in (0.0, 1.0))
            target = wanted[row] if row in wanted else zero[follows[row]]
            full = full.at[row].set((target - zero[row]) / (one[row] - zero[row]))
        return full

    def starts(features, log_loss, centre):
        return np.unique(law.starts(features, log_loss, centre)[:, chosen], axis=0)

    best = law.optimum
    said = [f"{name} = {value:g}" for name, value in fixed.items()] + [f"{one} = {two}" for one, two in tied.items()]
    return replace(
        law,
        formula=f"{law.formula}; {', '.join(said)}",
        parameters=tuple(free),
        logged=tuple(law.logged[row] for row in chosen),
        log_loss=lambda theta, features, centre: law.log_loss(whole(theta, centre), features, centre),
        natural=lambda theta, centre: law.natural(whole(theta, centre), centre)[chosen],
        starts=starts,
        optimum=best and (lambda theta, centre, log_c: best(whole(theta, centre), centre, log_c)),
    )


def _check(law: Law, fixed: dict[str, float], tied: dict[str, str]) -> None:
    names = {**dict.fromkeys(fixed, "--fix"), **dict.fromkeys([*tied, *tied.values()], "--tie")}
    for name, option in names.items():
        if name not in law.parameters:
            raise ValueError(f"{option} {name}: the law {law.name} has {', '.join(law.parameters)}")
    logged = dict(zip(law.parameters, law.logged, strict=True))
    for name, value in fixed.items():
        if not np.isfinite(value) or (logged[name] and value <= 0):
            raise ValueError(f"--fix {name}={value:g} must be " + ("above 0" if logged[name] else "a finite number"))
    for name, other in tied.items():
        if name in fixed or other in fixed or other in tied or name == other:
            raise ValueError(f"--tie {name}={other}: both must be free otherwise; fix {name} in its place")
        if logged[name] != logged[other]:
            raise ValueError(f"--tie {name}={other}: one is a coefficient, the other an exponent")
    if len(fixed) + len(tied) >= len(law.parameters):
        raise ValueError(f"all of {', '.join(law.parameters)} are fixed or tied: nothing is left to fit")


def pairs(texts: list[str], option: str) -> dict[str, str]:
    """Name -> text, of options such as --fix alpha=0.35,beta=0.4. Raises ValueError for what is no pair, or twice."""
    found: dict[str, str] = {}
    for part in (part for text in texts for part in text.split(",")):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not (name and equals and value):
            raise ValueError(f"{option} {part} must be NAME=VALUE")
        if name in found:
            raise ValueError(f"{option} has {name} twice: {found[name]} and {value}")
        found[name] = value
    return found


def numbers(texts: list[str], option: str) -> dict[str, float]:
    """Name -> number of such options, 2.8B too. Raises ValueError as `pairs` does, and for what is no number."""
    values = {}
    for name, text in pairs(texts, option).items():
        try:
            values[name] = number(text)
        except ValueError:
            raise ValueError(f"{option} {name}={text}: {text} is not a number") from None
    return values
