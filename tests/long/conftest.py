"""The eight devices of tests/conftest.py are there before a test can ask for others."""

import jax

jax.devices()
