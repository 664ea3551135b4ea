"""What a result was made with."""

import importlib.metadata
import platform

from evaluation.results import digest_of
from runtime.agreement import code_versions

PACKAGES = ("jax", "flax", "numpy", "tokenizers", "lm_eval")


def versions() -> dict[str, str]:
    """Versions of the packages that numbers depend on, where they are installed, and a digest of this code."""
    found = {"python": platform.python_version(), "code": digest_of(code_versions())[:12]}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
