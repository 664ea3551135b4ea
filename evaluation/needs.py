"""The lm-evaluation-harness where it is needed, and quiet: bars and warnings are this program's own."""

import logging
import os
from types import ModuleType


def harness() -> ModuleType:
    """The module evaluation.suite. Raises ValueError where the harness is not installed."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        from evaluation import suite
    except ImportError as error:
        raise ValueError(f"tasks need the package {error.name}: install the extra `evaluation`") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return suite
