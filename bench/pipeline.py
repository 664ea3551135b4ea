"""What a pipeline costs: python bench/pipeline.py [key=value ...].

One process, four simulated devices. For each schedule: CPU time of a step on four stages over that of one device which
accumulates the same microbatches, temporary bytes a device as microbatches grow, and compile time. CPU time is the
process's, the best of several steps in turns of both programs, so that other load on the machine cancels.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax

from config import compose, layout
from parallel.mesh import AXES, make_mesh
from parallel.pipeline.schedules import DEFAULT_CHUNKS, make
from parallel.sharding import put_batch
from runtime.config import RuntimeConfig
from runtime.start import start
from training.job import make_job
from training.parity import random_batch

STAGES, TURNS = 4, 5
MODEL = ["train.seq_len=128", "model.layers=8", "mesh.fsdp=1", "optimizer=adamw"]


def compiled(overrides: list[str], stages: int):
    """The step, its state and batch, and the seconds that compiling took."""
    cfg = compose.load([*MODEL, *overrides, f"mesh.pipe={stages}"])
    sizes = layout.mesh_sizes(cfg, stages)
    mesh = make_mesh(dict.fromkeys(AXES, 1) | sizes, jax.devices()[:stages])
    with jax.set_mesh(mesh):
        job = make_job(cfg, mesh)
        rows = slice(0, cfg.train.batch_size)
        batch = put_batch(mesh, random_batch(cfg, 0, rows), cfg.train.batch_size)
        began = time.perf_counter()
        step = job.step.lower(job.abstract, batch).compile()
        return step, job.init(0), batch, time.perf_counter() - began


class Timed:
    """A step that is run in turns with others."""

    def __init__(self, step, state, batch):
        self.step, self.state, self.batch, self.best = step, state, batch, float("inf")

    def turn(self) -> None:
        began = time.process_time()
        self.state, _ = self.step(self.state, self.batch)
        jax.block_until_ready(self.state)
        self.best = min(self.best, time.process_time() - began)


def main(overrides: list[str]) -> None:
    start(RuntimeConfig(platform="cpu", cpu_devices=STAGES))
    print(f"{'schedule':15s} {'CPU time':>9s}  temporary MB at 8, 16, 32 microbatches  compile s  bubble")
    for schedule in DEFAULT_CHUNKS:
        how, megabytes = [f"pipeline.schedule={schedule}", *overrides], []
        for microbatches in (8, 16, 32):
            cut = [f"train.batch_size={microbatches}", f"pipeline.microbatches={microbatches}"]
            step, state, batch, seconds = compiled([*how, *cut], STAGES)
            megabytes.append(step.memory_analysis().temp_size_in_bytes / 1e6)
            if microbatches == 8:
                one = Timed(*compiled([*overrides, *cut, "train.grad_accumulation=8"], 1)[:3])
                four, compile_s = Timed(step, state, batch), seconds
        for _ in range(TURNS):
            one.turn(), four.turn()
        made = make(schedule, STAGES, 8)
        told = "  ".join(f"{m:8.2f}" for m in megabytes)
        print(
            f"{schedule:15s} {four.best / one.best:9.2f}  {told}  {compile_s:20.1f}  {made.bubble():6.1%}", flush=True
        )


if __name__ == "__main__":
    main(sys.argv[1:])
