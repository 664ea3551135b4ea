"""Which parameters are trained: the others have no gradient, no moments, and are never written."""

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Protocol

import jax
import optax

from model.specs import Specs, leaves

Trainable = Callable[[str], bool]  # of a parameter's '/'-joined names


class Rule(Protocol):
    """What stands beside an optimizer and decides more about parameters than their gradients do."""

    def around(self, core: optax.GradientTransformation, specs: Specs) -> optax.GradientTransformation:
        """The optimizer with what the rule keeps of gradients in its state; `specs` are of what is trained."""

    def adjust(self, before: dict, after: dict, opt_state: optax.OptState, step: jax.Array) -> dict:
        """The trained parameters after step `step` (0 first) as the rule wants them, from before and after it."""


def matching(patterns: Sequence[str], specs: Specs) -> Trainable:
    """What is trained: parameters whose names match one of the patterns (`layers/attention/*`, `*norm*`).

    Raises ValueError for a pattern that no parameter matches, and names those there are.
    """
    names = ["/".join(path) for path, _ in leaves(specs)]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"no parameter matches {pattern}; there are {', '.join(names)}")
    return lambda name: any(fnmatchcase(name, pattern) for pattern in patterns)


def chosen(tree: dict, trainable: Trainable | None, path: tuple[str, ...] = ()) -> dict:
    """What is trained of a nested dict of parameters or their specifications; None: all."""
    if trainable is None:
        return tree
    kept = {}
    for name, value in tree.items():
        here = (*path, name)
        if isinstance(value, dict):
            if branch := chosen(value, trainable, here):
                kept[name] = branch
        elif trainable("/".join(here)):
            kept[name] = value
    return kept


def fixed(tree: dict, trainable: Trainable | None) -> dict:
    """What is not trained of a nested dict."""
    return {} if trainable is None else chosen(tree, lambda name: not trainable(name))


def joined(one: dict, other: dict) -> dict:
    """The nested dict with the leaves of both; where both have one, that of `other`."""
    both = lambda a, b: joined(a, b) if isinstance(a, dict) else b
    return {**one, **other, **{name: both(one[name], other[name]) for name in one.keys() & other.keys()}}


def of_same(tree: dict, names: dict) -> dict:
    """The leaves of a nested dict that another one has, too."""
    return {name: of_same(tree[name], one) if isinstance(one, dict) else tree[name] for name, one in names.items()}
