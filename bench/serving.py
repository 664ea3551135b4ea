"""isomesh's engine beside other servers on the same weights: python bench/serving.py --dtype float32 --out FILE.

Every measurement is a process alone (bench/peers/serving_*), and they take turns: isomesh, each peer, isomesh ...
All answer the same requests in token ids, greedily, as many new tokens as asked for. One JSON line for each process and
work and one for each ratio of medians, printed and, with --out, appended to a file. `--install` fetches llama.cpp,
prebuilt, with npm. Peers: transformers (generate), llama.cpp, llama.cpp-q4 (the 4-bit file as it was published).
On a GPU: --device gpu --model llama_1b --dtype bfloat16 --works one,sixty-four --peers transformers.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from peers import machine
from serving_weights import (
    DTYPES,
    FOLDER,
    PUBLISHED,
    ROOT,
    SMOLLM2,
    bytes_a_token,
    folder_of,
    hugging_face,
    published,
    wide_gguf,
)

OURS, PEERS = "isomesh", ("transformers", "llama.cpp", "llama.cpp-q4")
NPM = "node-llama-cpp@3.22.1"
LONGEST = 1024  # tokens of the longest sequence
SLOTS = 8
ALL = ("prefill", "one", "eight in turns", "eight", "stream")
# (prompt tokens, new tokens) of the eight: both from short to long, in no common order
MIXED = [(96, 32), (384, 96), (24, 160), (192, 16), (48, 64), (256, 24), (128, 128), (64, 48)]


def requests_of(sizes: list[tuple[int, int]], ids: list[int], seed: int) -> list[dict]:
    """Prompts cut out of a text."""
    draw = random.Random(seed)
    starts = [draw.randrange(len(ids) - prompt) for prompt, _ in sizes]
    return [{"prompt": ids[at : at + prompt], "new": new} for at, (prompt, new) in zip(starts, sizes, strict=True)]


def works(ids: list[int], only: list[str]) -> list[dict]:
    """What is timed: name, requests, how many run at once, how often."""
    several = MIXED * 4
    random.Random(0).shuffle(several)
    every = [
        {"name": "prefill", "requests": requests_of([(512, 1)], ids, 1), "slots": 1, "repeats": 5},
        {"name": "one", "requests": requests_of([(64, 96)], ids, 2), "slots": 1, "repeats": 3},
        {"name": "eight in turns", "requests": requests_of(MIXED, ids, 3), "slots": 1, "repeats": 1},
        {"name": "eight", "requests": requests_of(MIXED, ids, 3), "slots": SLOTS, "repeats": 2},
        {"name": "stream", "requests": requests_of(several, ids, 4), "slots": SLOTS, "repeats": 1},
        {"name": "sixty-four", "requests": requests_of([(128, 128)] * 64, ids, 5), "slots": 64, "repeats": 2},
    ]
    if unknown := set(only) - {work["name"] for work in every}:
        raise ValueError(f"--works {unknown.pop()} is unknown; choose of {', '.join(work['name'] for work in every)}")
    return [work for work in every if work["name"] in (only or ALL)]


def text_ids() -> list[int]:
    """Tokens of a text that every machine has."""
    from tokenizers import Tokenizer

    text = (Path(sysconfig.get_paths()["stdlib"]) / "argparse.py").read_text()
    return Tokenizer.from_file(str(hugging_face() / "tokenizer.json")).encode(text).ids


def command(peer: str, given: argparse.Namespace) -> list[str]:
    """The process of a peer."""
    scripts = ROOT / "bench/peers"
    if peer.startswith("llama.cpp"):
        file = published() if peer == "llama.cpp-q4" else wide_gguf(given.dtype)
        return ["node", str(scripts / "serving_llama.mjs"), str(FOLDER / "node_modules"), str(file)]
    device = {"transformers": ["cuda" if given.device == "gpu" else "cpu"], OURS: []}
    words = [] if peer == "bandwidth" else [str(folder_of(given.model)), given.dtype, *device[peer]]
    return [sys.executable, str(scripts / f"serving_{peer}.py"), *words]


def run(peer: str, given: argparse.Namespace, job: dict) -> list[dict]:
    """Runs one process to its end and returns its lines. Raises ValueError with the end of what it said if it fails."""
    platform = {"JAX_PLATFORMS": "cpu" if given.device == "cpu" else "cuda"}
    done = subprocess.run(
        command(peer, given), cwd=ROOT, input=json.dumps(job), capture_output=True, text=True,
        env=os.environ | platform,
    )  # fmt: skip
    if done.returncode:
        raise ValueError(f"{peer} failed with {done.returncode}: {(done.stderr or done.stdout).strip()[-2000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def speed(work: dict, timed: dict) -> dict:
    """Tokens/s of one repetition: of the prompt for `prefill`, else new ones; and of decoding alone for one request."""
    firsts = [answer["times"][0] for answer in timed["answers"]]
    if work["name"] == "prefill":
        return {"tokens_per_s": len(work["requests"][0]["prompt"]) / firsts[0]}
    found = {"tokens_per_s": sum(one["new"] for one in work["requests"]) / timed["seconds"]}
    if work["name"] == "one":
        times = timed["answers"][0]["times"]
        found |= {"ttft_s": firsts[0], "decode_tokens_per_s": (len(times) - 1) / (times[-1] - times[0])}
    return found


def medians(rows: list[dict]) -> dict:
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def agreement(mine: list[dict], other: list[dict]) -> float:
    """The share of new tokens up to which the answers are the same."""
    same = 0
    for a, b in zip(mine, other, strict=True):
        pairs = list(zip(a["tokens"], b["tokens"], strict=True))
        same += next((i for i, (x, y) in enumerate(pairs) if x != y), len(pairs))
    return same / sum(len(one["tokens"]) for one in mine)


def main(given: argparse.Namespace) -> None:
    peers = [peer for peer in given.peers.split(",") if peer]
    if unknown := set(peers) - set(PEERS):
        raise ValueError(f"--peers {unknown.pop()} is unknown; choose of {', '.join(PEERS)}")
    if any(peer.startswith("llama.cpp") for peer in peers) and not (FOLDER / "node_modules").exists():
        raise ValueError(f"{FOLDER / 'node_modules'} is missing; make it with: python bench/serving.py --install")
    todo = works(text_ids(), given.works.split(",") if given.works else [])
    if given.model != SMOLLM2 and any(peer.startswith("llama.cpp") for peer in peers):
        raise ValueError(f"llama.cpp has only {SMOLLM2}: leave it out of --peers")
    cores, slots = len(os.sched_getaffinity(0)), max(work["slots"] for work in todo)
    engine = {"cache_tokens": slots * LONGEST} | json.loads(given.engine)
    job = {"works": todo, "slots": slots, "longest": LONGEST, "threads": cores, "engine": engine}
    about = {"model": given.model, "dtype": given.dtype, "device": given.device}
    lines, bandwidth, first = [], 0.0, {}

    def tell(line: dict) -> None:
        text = json.dumps({"kind": line["kind"]} | about | line | {"machine": machine()})
        print(text, flush=True)
        if given.out:
            with open(given.out, "a", encoding="utf-8") as file:
                file.write(text + "\n")

    for number in range(given.rounds):
        bandwidth = max(bandwidth, run("bandwidth", given, {})[0]["bytes_per_s"])
        for peer in (*([] if given.without else [OURS]), *peers):
            answered = {line["name"]: line for line in run(peer, given, job)}
            for work in todo:
                timed = answered[work["name"]]["runs"]
                head = {"kind": "serving", "work": work["name"], "peer": peer, "round": number}
                at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
                lines.append({**head, **medians([speed(work, one) for one in timed]), "at": at})
                tell(lines[-1])
                first.setdefault((work["name"], peer), timed[0]["answers"])
            if peer == OURS:
                tell({"kind": "engine", "start_s": answered["start"]["seconds"]} | answered["end"])
    tell({"kind": "bandwidth", "bytes_per_s": bandwidth})
    for line in summary(lines, bandwidth, first, given):
        tell(line)


def summary(lines: list[dict], bandwidth: float, first: dict, given: argparse.Namespace) -> list[dict]:
    """One line a work and server: its median, ours over it, how far texts are the same, its share of the bandwidth."""
    found, grouped = [], {}
    for line in lines:
        grouped.setdefault((line["work"], line["peer"]), []).append(line)
    for (work, peer), rows in grouped.items():
        value = lambda rows: statistics.median(row["tokens_per_s"] for row in rows)
        told = {"kind": "serving ratio", "work": work, "peer": peer, "tokens_per_s": value(rows)}
        if work == "one":
            decoded = statistics.median(row["decode_tokens_per_s"] for row in rows)
            read = bytes_a_token(given.model, PUBLISHED if peer == "llama.cpp-q4" else given.dtype)
            told |= {"decode_tokens_per_s": decoded, "share_of_bandwidth": decoded * read / bandwidth}
        if peer != OURS and (ours := grouped.get((work, OURS))):
            pairs = [a["tokens_per_s"] / b["tokens_per_s"] for a, b in zip(ours, rows, strict=True)]
            told |= {"ratio": value(ours) / value(rows), "low": min(pairs), "high": max(pairs)}
            told |= {"same_tokens": agreement(first[work, OURS], first[work, peer])}
            if work == "one":
                mine = statistics.median(row["decode_tokens_per_s"] for row in ours)
                told |= {"decode_ratio": mine / told["decode_tokens_per_s"]}
        found.append(told)
    return found


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--model", default=SMOLLM2, help="smollm2, or a preset of conf/model with random weights")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--peers", default=",".join(PEERS), help="by commas")
    parser.add_argument("--works", default="", help=f"by commas; else {', '.join(ALL)}; also sixty-four")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--engine", default="{}", help="options of isomesh's engine, as JSON")
    parser.add_argument("--without", action="store_true", help="peers alone, without isomesh")
    parser.add_argument("--out", help="file that the lines are appended to")
    parser.add_argument("--install", action="store_true", help="fetch llama.cpp, and end")
    return parser.parse_args(arguments)


def install() -> None:
    """llama.cpp as its package has it; nothing is built, no script of a package runs."""
    FOLDER.mkdir(exist_ok=True)
    subprocess.run(["npm", "install", "--ignore-scripts", "--no-save", "--prefix", str(FOLDER), NPM], check=True)


if __name__ == "__main__":
    given = parse(sys.argv[1:])
    try:
        install() if given.install else main(given)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
