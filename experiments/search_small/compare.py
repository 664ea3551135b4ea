"""TPE against random search at an equal number of trials: python -m experiments.search_small.compare

The space of search.yaml, five seeds of each sampler. A trial here is a function call and not a process: programs are
compiled once for each optimizer, with its numbers as arguments. Stopped, it goes on from runs/search_small.
"""

import dataclasses
import json
import math
import statistics
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from config import compose, schema
from data.loader import HeldoutBatches, Loader
from data.shards import prepare
from parallel.mesh import AXES, make_mesh
from runtime.start import start
from scaling.search import loop as search_loop
from scaling.search import report as search_report
from scaling.search.study import Outcome, Search, outcome
from training.job import make_job
from training.optimizer import learning_rate, make_optimizer
from training.step import make_eval_step, make_train_step

HERE = Path(__file__).parent
SEEDS = range(30, 35)  # 0 to 24 were looked at while the sampler and the problem were chosen
SAMPLERS = {"tpe": "#1f4e8c", "random": "#b5483a"}
TRACED = ("lr", "weight_decay", "beta1", "beta2", "final_lr")


class Evaluate:
    """Trains the run of a trial in this process; losses as `train.py` would write them, up to rounding."""

    def __init__(self, cfg: schema.Config):
        start(cfg.runtime)
        self.mesh, t = make_mesh(dict.fromkeys(AXES, 1)), cfg.train
        dataset = prepare(cfg.data, cfg.tokenizer)
        shape = {"seq_len": t.seq_len, "batch_size": t.batch_size, "eos_id": None}
        loader = Loader(dataset.train, seed=cfg.seed, **shape)
        heldout = HeldoutBatches(dataset.heldout, limit=t.eval_batches * t.batch_size, rows=slice(0, None), **shape)
        stack = lambda batches: {k: np.stack([batch[k] for batch in batches]) for k in batches[0]}
        self.train, self.heldout = stack([loader.batch(step) for step in range(t.steps)]), stack([*heldout])
        self.programs = {}
        self.token_bytes_V = dataset.tokenizer.token_bytes.astype(np.float32)

    def __call__(self, trial, overrides, directory) -> Outcome:
        began, cfg = time.monotonic(), compose.load([*overrides, f"run.dir={directory}"])
        traced = dataclasses.replace(cfg.optimizer, **dict.fromkeys(TRACED, 0.5))
        key = dataclasses.replace(cfg, optimizer=traced, run=schema.RunConfig())
        numbers = {name: jnp.float32(getattr(cfg.optimizer, name)) for name in TRACED}
        with jax.set_mesh(self.mesh):
            if key not in self.programs:
                self.programs[key] = self._compiled(key)
            loss = float(self.programs[key](numbers))
        kind = "complete" if math.isfinite(loss) else "diverged"
        return Outcome(kind, (loss,) if kind == "complete" else (), seconds=time.monotonic() - began)

    def _compiled(self, cfg):
        optimizer, train = cfg.optimizer, cfg.train
        job = make_job(cfg, self.mesh)
        state, evaluate = job.init(0), make_eval_step(job.description, train)

        @jax.jit
        def run(numbers):
            chosen = types.SimpleNamespace(**dataclasses.asdict(optimizer) | numbers)
            direction = make_optimizer(chosen, job.description.specs)
            rate = learning_rate(chosen, train.steps)
            step = make_train_step(job.description, direction, rate, train, optimizer.clip_norm)
            last, metrics = jax.lax.scan(step, state, self.train)
            sums = jax.lax.map(lambda batch: evaluate(last.params, batch, self.token_bytes_V), self.heldout)
            healthy = jnp.isfinite(metrics["train/loss"]).all() & (last.step == train.steps)
            return jnp.where(healthy, sums["nats"].sum() / sums["tokens"].sum(), jnp.nan)

        return run


def curve(search: Search) -> list[float]:
    """The best loss after each trial."""
    best, found = math.inf, []
    for trial in search.trials():
        best = min(best, trial.value if outcome(trial) == "complete" else math.inf)
        found.append(best)
    return found


def main() -> None:
    settings = search_loop.read_search(HERE / "search.yaml")
    evaluate, curves = Evaluate(compose.load(list(settings.train))), {}
    with open(HERE / "comparison.jsonl", "w") as file:
        for sampler in SAMPLERS:
            for seed in SEEDS:
                chosen = dataclasses.replace(settings, sampler=sampler, seed=seed)
                search = Search(chosen, Path("runs") / "search_small" / f"{sampler}-{seed}")
                search_loop.run(search, evaluate)
                curves[sampler, seed] = curve(search)
                row = {"sampler": sampler, "seed": seed, "best_after_trial": curves[sampler, seed]}
                file.write(json.dumps(row) + "\n")
                print(f"{sampler} seed {seed}: {curves[sampler, seed][-1]:.4f}", flush=True)
                if (sampler, seed) == ("tpe", SEEDS[0]):
                    search_report.draw(search, HERE / "search.png")
                search.close()
    figure, axes = plt.subplots(figsize=(6, 3.4), dpi=130)
    for sampler, color in SAMPLERS.items():
        of_trial = list(zip(*(curves[sampler, seed] for seed in SEEDS), strict=True))
        numbers = range(1, len(of_trial) + 1)
        axes.plot(numbers, [statistics.median(losses) for losses in of_trial], color=color, label=f"{sampler}, median")
        axes.fill_between(numbers, list(map(min, of_trial)), list(map(max, of_trial)), color=color, alpha=0.15, lw=0)
        print(f"{sampler}: median {statistics.median(of_trial[-1]):.4f} of {sorted(of_trial[-1])}")
    axes.set(xlabel="trials", ylabel="best eval/loss so far, nats a byte", ylim=(None, 4.5))
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(HERE / "comparison.png")


if __name__ == "__main__":
    main()
