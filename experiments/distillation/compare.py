"""A student of half the size, taught and alone, at equal tokens.

python experiments/distillation/compare.py RUN OUT.jsonl, where RUN, the teacher, is the directory of a run. For each
seed both students begin from the same parameters and see the same batches; a line has the held-out loss of each.
"""

import json
import sys
from pathlib import Path

import jax

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from config.compose import load
from finetune.opening import open_subject
from parallel.mesh import AXES, make_mesh
from training.job import make_job

SEEDS = (0, 1, 2)
STUDENT = ["model.layers=2", "train.batch_size=8", "train.seq_len=64", "train.steps=200", "optimizer.warmup_steps=20"]


def losses(teacher: str, taught: bool) -> list[float]:
    """The held-out loss after the last step, by seed."""
    options = [f"task.options.teacher={teacher}", "task.options.top_k=256"]
    words = ["task=distillation", *options, *STUDENT] if taught else STUDENT
    mesh, found, step = make_mesh(dict.fromkeys(AXES, 1)), [], None
    with jax.set_mesh(mesh):
        for seed in SEEDS:
            config = load([*words, f"seed={seed}"])
            subject = open_subject(config, mesh)
            job = make_job(subject.config, mesh, loss=subject.loss)
            state, batch = job.init(seed), subject.feed.batch(0)
            step = step or job.compile(job.step, batch)  # the same program for every seed
            for number in range(config.train.steps):
                state, _ = step(state, subject.feed.batch(number))
            found.append(subject.judge(job, batch).evaluate(state.params).loss)
            print(f"{'taught' if taught else 'alone'} seed {seed}: {found[-1]:.4f}", flush=True)
    return found


if __name__ == "__main__":
    both = {"alone": losses(sys.argv[1], False), "taught": losses(sys.argv[1], True)}
    rows = [{"seed": seed, **{how: one[i] for how, one in both.items()}} for i, seed in enumerate(SEEDS)]
    Path(sys.argv[2]).write_text("".join(json.dumps(row) + "\n" for row in rows))
