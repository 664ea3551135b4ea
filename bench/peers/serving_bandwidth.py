"""What reading from memory gives at most, with all cores: prints {"bytes_per_s"}; best of several readings of 1 GiB."""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # each thread reads its own part
import numpy as np

READINGS = 12


def main() -> None:
    cores = len(os.sched_getaffinity(0))
    values = np.ones(2**30 // 4, np.float32)
    parts, best = np.array_split(values, cores), 0.0
    with ThreadPoolExecutor(cores) as pool:
        for number in range(READINGS):
            reading = (lambda part: np.dot(part, part)) if number % 2 else (lambda part: part.view(np.int64).max())
            began = time.perf_counter()
            list(pool.map(reading, parts))
            best = max(best, values.nbytes / (time.perf_counter() - began))
    print(json.dumps({"name": "bandwidth", "bytes_per_s": best}))


if __name__ == "__main__":
    main()
