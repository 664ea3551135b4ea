"""Eight simulated CPU devices for every test, a private compile cache, and the mesh helpers that tests share."""

import os
import tempfile
from pathlib import Path

from runtime.compiler_flags import FLAGS
from runtime.xla_flags import known

# Compiling is most of the suite's time, and tiny programs gain nothing from optimisation. Inherited by subprocesses.
os.environ["XLA_FLAGS"] = " ".join(
    known(("--xla_backend_optimization_level=0", "--xla_cpu_use_fusion_emitters=false", *FLAGS["cpu"]))
)

# Programs that tests start would compile every module again where the bytecode may not be written.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import jax
import pytest

DEVICES = 8
CACHE = Path(tempfile.gettempdir()) / f"isomesh-test-cache-{os.getuid()}"

CACHE.mkdir(mode=0o700, exist_ok=True)
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", DEVICES)
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(scope="session", autouse=True)
def _environment():
    """What subprocesses of tests inherit: no W&B network, one shared compile cache."""
    os.environ["WANDB_MODE"] = "offline"
    os.environ["ISOMESH_TEST_CACHE"] = str(CACHE)


# Long files first, so that at the end no worker is left with one while the others have nothing to do.
LONGEST = (
    *("test_parity_products.py", "test_parity_pipeline.py", "test_parity.py", "test_parity_context.py"),
    *("test_parity_moe.py", "test_pipeline.py", "test_resume.py", "test_processes.py", "test_run.py"),
)


def pytest_collection_modifyitems(items):
    """Sorts files by `LONGEST`; within a file the order stays."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
