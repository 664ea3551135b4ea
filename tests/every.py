"""Cases that are alike: `make test` runs a few of them and `make test-every` the others."""

from collections.abc import Collection, Iterable

import pytest


def few_of(cases: Iterable, few: Collection) -> list:
    """The cases of a parametrised test; those that are not among the few wait for `make test-every`."""
    cases, found = list(cases), []
    assert all(one in cases for one in few), "a case that is not there"
    for case in cases:
        values = case if isinstance(case, tuple) else (case,)
        found.append(pytest.param(*values, marks=() if case in few else pytest.mark.every))
    return found
