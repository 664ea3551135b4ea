"""Each other task on small data, beside what needs no model: python bench/finetune_tasks.py [NAME ...].

A model of 0.4M parameters learns from nothing. The data are made here from a few rules, but for masked tokens (this
Python's library) and dialogues (package chitchat-dataset). Appends a JSON line for each task to --out.
"""

import argparse
import json
import math
import random
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
SMALL = [
    *("model.layers=2", "model.width=128", "model.heads=4", "model.kv_heads=4", "model.head_dim=32", "model.ffn=512"),
    *("optimizer.lr=2e-3", "optimizer.warmup_steps=20", "train.batch_size=16", "sample.tokens=0", "seed=0"),
    *("checkpoint.every=0", "wandb.mode=disabled", "train.log_every=50"),
]
ENCODER = ["model.causal=false", "model.token_types=2"]
CITIES = ("Oslo", "Rome", "Bern", "Graz", "Lima", "Kyiv", "Riga", "Cork")
PEOPLE = ("Ada", "Bo", "Cy", "Dot", "Eli", "Fay", "Gus", "Hal")
MONTHS = (
    *("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November"),
    "December",
)


@dataclass(frozen=True)
class Made:
    """A task with its rows: what is set, what is watched, and what is reached without a model, and how."""

    arguments: list[str]
    metric: str
    baseline: float
    how: str
    task: str = ""  # "": it has the maker's name


def lines(folder: Path, rows: list[dict]) -> Path:
    """A file of JSON lines."""
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def token_classification(folder: Path, draw: random.Random) -> Made:
    """Names of people and places, which are told apart by the word before them: "in Ada" is a place, too."""
    rows = []
    for _ in range(800):
        words, tags = [], []
        for _ in range(draw.randint(1, 3)):
            place = draw.random() < 0.5
            names = draw.choices(CITIES if draw.random() < 0.6 == place else PEOPLE, k=draw.randint(1, 2))
            words += [draw.choice(("in", "near")) if place else draw.choice(("met", "saw")), *names]
            tags += ["O", *(f"{mark}-{'LOC' if place else 'PER'}" for mark in ("B", "I")[: len(names)])]
        rows.append({"words": words, "tags": tags})
    from finetune.metrics import spans_report

    usual: dict[str, Counter] = {}
    for row in rows:
        for word, tag in zip(row["words"], row["tags"], strict=True):
            usual.setdefault(word, Counter())[tag] += 1
    said = [[usual[word].most_common(1)[0][0] for word in row["words"]] for row in rows]
    baseline = spans_report([row["tags"] for row in rows], said)[0]["f1"]
    arguments = [f"task.path={lines(folder, rows)}", *ENCODER, "train.seq_len=48", "train.steps=200"]
    return Made(arguments, "eval/f1", baseline, "each word's most frequent tag")


def span_qa(folder: Path, draw: random.Random) -> Made:
    """Who, or where, in a text with a person and a place among other words."""
    rows = []
    for _ in range(1200):
        names = {"who?": draw.choice(PEOPLE), "where?": draw.choice(CITIES)}
        words = [*names.values(), *draw.choices(("on", "a", "day", "was", "seen", "by", "us"), k=4)]
        draw.shuffle(words)
        asked = draw.choice(tuple(names))
        rows.append({"question": asked, "context": " ".join(words), "answers": names[asked]})
    arguments = [f"task.path={lines(folder, rows)}", *ENCODER, "train.seq_len=64", "train.steps=300"]
    arguments += ["task.options.stride=8", "task.options.question=8"]
    return Made(arguments, "eval/exact_match", 1 / 2, "one of the two names of the text")


def embedding(folder: Path, draw: random.Random) -> Made:
    """Two lists of the same words, in another order and case."""
    rows = []
    for _ in range(1200):
        words = draw.sample(PEOPLE + CITIES, 4)
        rows.append({"text": " ".join(words), "positive": " ".join(draw.sample(words, 4)).lower()})
    arguments = [
        f"task.path={lines(folder, rows)}",
        *ENCODER,
        "train.seq_len=64",
        "train.steps=200",
        "optimizer.lr=1e-3",
    ]
    return Made(arguments, "eval/recall_at_1", 1 / 120, "any of about 120 held-out texts")


def masked_lm(folder: Path, draw: random.Random) -> Made:
    """This Python's library, byte by byte."""
    from data.corpus import DataConfig, documents

    text = "".join(document.text for document, _ in zip(documents(DataConfig()), range(200), strict=False)).encode()
    counts = Counter(text)
    entropy = -sum(n / len(text) * math.log(n / len(text)) for n in counts.values())
    return Made(
        ["model.causal=false", "train.seq_len=64", "train.steps=300"], "eval/loss", entropy, "bytes by frequency"
    )


def chat(folder: Path, draw: random.Random) -> Made:
    """Dialogues of the Chit Chat Challenge, byte by byte."""
    from data.tokenizer import ByteTokenizer

    found = find_spec("chitchat_dataset")
    path = Path(found.submodule_search_locations[0]) / "dataset.json"
    rows = []
    for dialogue in list(json.loads(path.read_text()).values())[:1500]:
        turns = [" ".join(one["text"] for one in turn) for turn in dialogue["messages"]][:8]
        rows.append({"messages": [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(turns)]})
    said = "".join(m["content"] for row in rows for m in row["messages"] if m["role"] == "assistant").encode()
    entropy = -sum(n / len(said) * math.log(n / len(said)) for n in Counter(said).values())
    spec = json.loads(ByteTokenizer().as_json())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    spec["added_tokens"] += [
        {"id": 256, "content": "<|im_start|>", **flags},
        {"id": 257, "content": "<|im_end|>", **flags},
    ]
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    template += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    settings = {"chat_template": template, "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    own = ["tokenizer=file", f"tokenizer.path={folder}", f"task.path={lines(folder, rows)}", "train.batch_size=4"]
    return Made([*own, "train.seq_len=512", "train.steps=200"], "eval/loss", entropy, "bytes by frequency")


def seq2seq(folder: Path, draw: random.Random) -> Made:
    """Dates in figures to dates in words."""
    rows = []
    for day in draw.sample(range(12 * 28 * 40), 2000):
        year, month, date = 1980 + day // 336, day // 28 % 12, day % 28 + 1
        rows.append({"source": f"{year}-{month + 1:02d}-{date:02d}", "target": f"{date} {MONTHS[month]} {year}"})
    from finetune.metrics import rouge

    baseline = rouge([row["source"] for row in rows], [row["target"] for row in rows])["rouge1"]
    arguments = [f"task.path={lines(folder, rows)}", "train.seq_len=96", "train.steps=400", "train.eval_every=400"]
    return Made([*arguments, "task.options.write=24"], "eval/rouge1", baseline, "the source as it is")


def summary(folder: Path, draw: random.Random) -> Made:
    """Who arrived where, of a text whose other sentences do not matter, in any order."""
    others = ("The weather was fine.", "Lunch was at noon.", "Nobody was late.", "It rained.", "The bus was full.")
    rows = []
    for _ in range(1500):
        person, place = draw.choice(PEOPLE), draw.choice(CITIES)
        sentences = [f"{person} came to {place}.", *draw.sample(others, 2)]
        draw.shuffle(sentences)
        rows.append({"source": " ".join(sentences), "target": f"{person} is in {place}"})
    from finetune.metrics import rouge

    first = [row["source"].partition(".")[0] for row in rows]
    baseline = rouge(first, [row["target"] for row in rows])["rougeL"]
    arguments = [f"task.path={lines(folder, rows)}", "train.seq_len=128", "train.steps=400", "train.eval_every=400"]
    return Made([*arguments, "task.options.write=24"], "eval/rougeL", baseline, "the first sentence", "seq2seq")


def preference(folder: Path, draw: random.Random) -> Made:
    """Answers that name the one who asked, against answers that name someone else, by ORPO."""
    rows = []
    for _ in range(1200):
        asks, other = draw.sample(PEOPLE, 2)
        rows.append({"prompt": f"{asks} asks. ", "chosen": f"Hello {asks}!", "rejected": f"Hello {other}!"})
    arguments = [f"task.path={lines(folder, rows)}", "train.seq_len=64", "train.steps=200", "task.options.loss=orpo"]
    return Made(arguments, "eval/accuracy", 0.5, "either answer")


def kto(folder: Path, draw: random.Random) -> Made:
    """Such answers, each by itself: good where it names the one who asked, else bad.

    Prompts differ, too: of a few rows that are there often, all of a kind would be held out together.
    """
    rows = []
    for _ in range(1200):
        asks, other = draw.sample(PEOPLE, 2)
        good = draw.random() < 0.5
        name = asks if good else other
        prompt = f"In {draw.choice(CITIES)} in {draw.choice(MONTHS)} {asks} asks. "
        rows.append({"prompt": prompt, "completion": f"Hello {name}!", "label": good})
    arguments = [f"task.path={lines(folder, rows)}", "train.seq_len=128", "train.steps=200"]
    return Made(arguments, "eval/accuracy", 0.5, "either label")


MAKERS: dict[str, Callable[[Path, random.Random], Made]] = {
    one.__name__: one
    for one in (token_classification, span_qa, embedding, masked_lm, chat, seq2seq, summary, preference, kto)
}


def measured(name: str) -> dict:
    """Trains one task, from nothing."""
    with tempfile.TemporaryDirectory() as folder:
        made, run = MAKERS[name](Path(folder), random.Random(0)), Path(folder) / "run"
        every = [] if any(a.startswith("train.eval_every") for a in made.arguments) else ["train.eval_every=100"]
        own = [f"task={made.task or name}", *SMALL, *every, *made.arguments, f"run.dir={run}"]
        subprocess.run([sys.executable, "train.py", *own], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        value = [row[made.metric] for row in rows if made.metric in row][-1]
    return {"task": name, "metric": made.metric, "value": value, "baseline": made.baseline, "baseline_is": made.how}


def main() -> None:
    """Each task in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", nargs="*", metavar="NAME", default=list(MAKERS))
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "finetune_tasks.jsonl")
    options = parser.parse_args()
    for name in options.tasks:
        line = json.dumps(measured(name))
        print(line, flush=True)
        with options.out.open("a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
