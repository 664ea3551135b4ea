"""What a run would need: python -m performance.memory [key=value ...] prints bytes a device as one JSON line.

Compiles the training step as train.py would and reads the compiler's account of it; no array is allocated, so a
layout that cannot fit is told before it is run. Exit code 2 for a mistake.
"""

import json
import sys

from config.command_line import command_line
from config.layout import mesh_sizes
from config.schema import Config
from runtime import leave

if __name__ == "__main__":
    leave.answer_signals()
    JOBS = command_line(sys.argv[1:])

import jax

from finetune.adapters.adaptation import adapted
from parallel.mesh import make_mesh
from runtime.memory import temporary_bytes
from runtime.start import start
from training.job import abstract_batch, make_job


def needed(config: Config) -> dict[str, int]:
    """Bytes a device: `arguments` (state and batch), `temporary`, and their sum `total`, as train.py's header says."""
    mesh = make_mesh(mesh_sizes(config, jax.device_count()))
    with jax.set_mesh(mesh):
        job = make_job(config, mesh, **adapted(config))
        batch = abstract_batch(config.train, mesh, segments=config.data.segments)
        memory = job.compile(job.step, batch).memory_analysis()
    arguments, temporary = memory.argument_size_in_bytes, temporary_bytes(memory, jax.default_backend())
    return {"arguments": arguments, "temporary": temporary, "total": arguments + temporary}


def main(config: Config) -> int:
    """Prints what one run needs; returns the exit code."""
    try:
        start(config.runtime)
        found = needed(config)
    except ValueError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(max(map(main, JOBS)))
