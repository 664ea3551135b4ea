"""Cases that are alike: `make test` runs a few of them, `make test-long` some more, `make test-every` the others."""

from collections.abc import Collection, Iterable

import pytest


def few_of(cases: Iterable, few: Collection, long: Collection = ()) -> list:
    """The cases of a parametrised test; the `long` ones wait for `make test-long`, those that are neither among these
    nor the few for `make test-every`.
    """
    cases, found = list(cases), []
    assert all(one in cases for one in (*few, *long)), "a case that is not there"
    for case in cases:
        values = case if isinstance(case, tuple) else (case,)
        found.append(pytest.param(*values, marks=_marks(case, few, long)))
    return found


def _marks(case, few: Collection, long: Collection):
    if case in few:
        return ()
    return pytest.mark.long if case in long else pytest.mark.every
