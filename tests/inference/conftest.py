"""One engine for the tests that only ask it: to make one takes seconds."""

import pytest
from engines import started


@pytest.fixture(scope="session")
def engine():
    """Of the model `grouped` on one device; it has no speculation, and room for two of the longest sequences."""
    made = started("grouped")
    yield made
    assert made.stop(20)
