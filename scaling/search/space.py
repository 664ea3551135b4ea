"""What a search may choose: a space in Hydra's own sweep grammar, as distributions and as overrides.

optimizer.lr: tag(log, interval(1e-4, 1e-1))     a real number, on a logarithmic scale
model.layers: range(1, 9)                         1 to 8, as Hydra reads it; a third number is the step
model.ffn: tag(log, int(interval(64, 1024)))      a whole number, both ends included
optimizer: choice(adamw, muon)                    any value or preset
layout: [{mesh.data: 4}, {mesh.data: 2, mesh.tensor: 2}]      several keys at once, under a name of your own
"""

import math
from dataclasses import dataclass

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, RangeSweep
from hydra.errors import HydraException
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution


@dataclass(frozen=True)
class Space:
    """Distributions by name; `joint` holds, for names that stand for several keys, each choice's overrides."""

    distributions: dict[str, BaseDistribution]
    joint: dict[str, dict[str, tuple[str, ...]]]

    def keys(self) -> set[str]:
        """The keys of train.py that a point sets, those of joint choices among them."""
        single = self.distributions.keys() - self.joint.keys()
        rows = [row for choices in self.joint.values() for row in choices.values()]
        return single | {override.partition("=")[0] for row in rows for override in row}

    def overrides(self, values: dict) -> list[str]:
        """The command-line overrides of one point."""
        found = []
        for name, value in values.items():
            found += self.joint[name][value] if name in self.joint else [f"{name}={_text(value)}"]
        return found

    def point(self, given: dict) -> dict:
        """A point, or part of one, that a user wrote down. Raises ValueError if it is not of this space."""
        return {name: self._value(name, value) for name, value in given.items()}

    def _value(self, name: str, value):
        if name not in self.distributions:
            raise ValueError(f"start: {name} is not searched; searched are {', '.join(self.distributions)}")
        distribution = self.distributions[name]
        if isinstance(distribution, CategoricalDistribution):
            text = " ".join(_joined(name, value)) if isinstance(value, dict) else _text(value)
            if text not in distribution.choices:
                raise ValueError(f"start: {name}={text} is not among {', '.join(distribution.choices)}")
            return text
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise ValueError(f"start: {name}={value} should be a number") from None
        if not distribution.low <= number <= distribution.high:
            raise ValueError(f"start: {name}={value} is outside {distribution.low:g} to {distribution.high:g}")
        if isinstance(distribution, IntDistribution):
            if number != int(number) or (int(number) - distribution.low) % distribution.step:
                raise ValueError(f"start: {name}={value} is no step of {distribution.step} from {distribution.low}")
            return int(number)
        return number


def parse_space(space: dict) -> Space:
    """A space from name -> sweep expression or list of choices. Raises ValueError for what is no sweep."""
    if not isinstance(space, dict) or not space:
        raise ValueError(
            "space: nothing to search; write KEY: tag(log, interval(1e-4, 1e-1)), range(a, b) or choice(a, b)"
        )
    distributions, joint = {}, {}
    for name, given in space.items():
        if isinstance(given, list):
            if given and all(isinstance(choice, dict) for choice in given):
                joint[name] = {" ".join(row): tuple(row) for row in (_joined(name, choice) for choice in given)}
                texts = list(joint[name])
            else:
                texts = [_text(choice) for choice in given]
            distributions[name] = _categorical(name, texts)
        else:
            distributions[name] = _distribution(name, str(given))
    found = Space(distributions, joint)
    several = [override.partition("=")[0] for rows in joint.values() for row in rows.values() for override in row]
    if twice := (distributions.keys() - joint.keys()) & set(several):
        raise ValueError(f"space: {', '.join(sorted(twice))} is set twice, alone and with others")
    return found


def _distribution(name: str, text: str) -> BaseDistribution:
    try:
        override = OverridesParser.create().parse_override(f"{name}={text}")
    except HydraException as error:
        raise ValueError(f"space: cannot read {name}: {text}: {' '.join(str(error).split())}") from None
    if not override.is_sweep_override():
        raise ValueError(f"space: {name}: {text} is one value; write interval(a, b), range(a, b) or choice(a, b)")
    sweep = override.value()
    if isinstance(sweep, IntervalSweep):
        return _interval(name, text, sweep.start, sweep.end, "log" in sweep.tags)
    if isinstance(sweep, RangeSweep):
        return _range(name, text, sweep)
    return _categorical(name, list(override.sweep_string_iterator()))


def _interval(name: str, text: str, low: float, high: float, log: bool) -> BaseDistribution:
    if not low < high or (log and low <= 0):
        raise ValueError(f"space: {name}: {text} needs {'0 < ' if log else ''}a < b in interval(a, b)")
    make = IntDistribution if isinstance(low, int) and isinstance(high, int) else FloatDistribution
    return make(low, high, log=log)


def _range(name: str, text: str, sweep: RangeSweep) -> BaseDistribution:
    if sweep.step <= 0 or not sweep.start < sweep.stop:
        raise ValueError(f"space: {name}: {text} needs a < b and a step above 0 in range(a, b, step)")
    steps = math.ceil((sweep.stop - sweep.start) / sweep.step - 1e-9) - 1  # the stop is left out
    last = sweep.start + steps * sweep.step
    if all(isinstance(value, int) for value in (sweep.start, sweep.stop, sweep.step)):
        return IntDistribution(sweep.start, last, step=sweep.step)
    return FloatDistribution(float(sweep.start), float(last), step=float(sweep.step))


def _categorical(name: str, texts: list[str]) -> CategoricalDistribution:
    if len(set(texts)) < len(texts) or len(texts) < 2:
        raise ValueError(f"space: {name} needs two or more different choices, not {', '.join(texts) or 'none'}")
    return CategoricalDistribution(texts)


def _joined(name: str, choice: dict) -> list[str]:
    if not choice:
        raise ValueError(f"space: a choice of {name} sets no key")
    return [f"{key}={_text(value)}" for key, value in choice.items()]


def _text(value) -> str:
    """A value as an override spells it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
