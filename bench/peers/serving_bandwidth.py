"""What reading from memory gives at most: prints {"bytes_per_s"}, the best of several readings of an array.

On a CPU with all cores, from 1 GiB; on a GPU (JAX_PLATFORMS=cuda) by one sum over 4 GiB.
"""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # each thread reads its own part
import numpy as np

READINGS = 12


def of_cpu() -> float:
    """Bytes a second."""
    cores = len(os.sched_getaffinity(0))
    values = np.ones(2**30 // 4, np.float32)
    parts, best = np.array_split(values, cores), 0.0
    with ThreadPoolExecutor(cores) as pool:
        for number in range(READINGS):
            reading = (lambda part: np.dot(part, part)) if number % 2 else (lambda part: part.view(np.int64).max())
            began = time.perf_counter()
            list(pool.map(reading, parts))
            best = max(best, values.nbytes / (time.perf_counter() - began))
    return best


def of_gpu() -> float:
    """Bytes a second."""
    import jax
    import jax.numpy as jnp

    values, best = jnp.ones(2**30, jnp.float32), 0.0
    total = jax.jit(jnp.sum)
    for _ in range(READINGS):
        began = time.perf_counter()
        total(values).block_until_ready()
        best = max(best, values.nbytes / (time.perf_counter() - began))
    return best


if __name__ == "__main__":
    found = of_gpu() if os.environ.get("JAX_PLATFORMS") == "cuda" else of_cpu()
    print(json.dumps({"name": "bandwidth", "bytes_per_s": found}))
