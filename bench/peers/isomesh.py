"""isomesh as its user runs it: train.py with its defaults in a run directory of its own, read from its metrics."""

import json
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from work import WARM_UP, WORKS, Work, arguments, report

from config import compose
from model.counts import parameter_count

ROOT = Path(__file__).parent.parent.parent
# What is no training step is off. Tokens are bytes, whose ids are a part of the model's vocabulary: its tables and
# logits have all their rows.
ALONE = (
    *("data=stdlib", "tokenizer=bytes", "optimizer=adamw", "wandb.mode=disabled", "sample.tokens=0"),
    *("train.eval_every=0", "checkpoint.every=0", "train.log_every=1"),
)


def overrides(work: Work, dtype: str) -> list[str]:
    """What makes train.py train this model; nothing of how to run it fast."""
    if work.family == "gpt2":
        model = ["model=gpt2_124m"]
    else:
        model = ["model=llama_1b", "model.rope_scaling.kind=none", "model.rope_theta=10000", "model.norm_eps=1e-6"]
        model += ["model.tied_embeddings=false"]
    sizes = {name: getattr(work, name) for name in ("layers", "width", "heads", "kv_heads", "ffn", "vocab_size")}
    sizes["head_dim"] = work.width // work.heads
    train = {"batch_size": work.batch_size, "seq_len": work.seq_len, "compute_dtype": dtype}
    return [
        *model,
        *(f"model.{name}={value}" for name, value in sizes.items()),
        *(f"train.{name}={value}" for name, value in train.items()),
        *ALONE,
    ]


def run(given: list[str], folder: Path) -> dict:
    """Trains to the end; what metrics.jsonl has of it. Exits where the run fails."""
    command = [sys.executable, "train.py", *given, f"run.dir={folder}/run"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"train.py ended with {done.returncode}: {done.stdout[-1000:]}{done.stderr[-1000:]}")
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "perf/step_ms" in line]
    step_s = [line["perf/step_ms"] / 1e3 for line in lines]
    compiled = re.search(r"compiled the step in .*\| ([\d.]+) s since the start", (folder / "run/run.log").read_text())
    return {
        "losses": [line["train/loss"] for line in lines][:3],
        "first_step_s": step_s[0] + (float(compiled[1]) if compiled else 0.0),  # with data, state and compilation
        "step_s": step_s[WARM_UP:],
    }


def main() -> None:
    given = arguments()
    keys = [*overrides(WORKS[given.work], given.dtype), f"train.steps={WARM_UP + given.steps}"]
    with tempfile.TemporaryDirectory() as folder:
        measured = run([*keys, f"runtime.compile_cache={folder}/xla"], Path(folder))  # of its own: compiles anew
    parameters = parameter_count(compose.load(keys).model).total
    report(WORKS[given.work], measured, parameters, resource.RUSAGE_CHILDREN)


if __name__ == "__main__":
    main()
