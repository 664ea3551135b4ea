"""Which parameters are trained: the others have no gradient, no moments, and are never written."""

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

from model.specs import Specs, leaves

Trainable = Callable[[str], bool]  # of a parameter's '/'-joined names


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


def merged(whole: dict, part: dict) -> dict:
    """`whole` with the leaves of `part` in place of its own."""
    return {
        name: part.get(name, value) if not isinstance(value, dict) else merged(value, part.get(name, {}))
        for name, value in whole.items()
    }
