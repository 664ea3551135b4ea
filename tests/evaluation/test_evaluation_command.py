"""The command, and the same tasks inside a training run."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import runs
import yaml

from data.__main__ import main as prepare
from data.corpus import DataConfig
from data.shards import prepare as opened
from data.tokenizer import TokenizerConfig
from evaluation.__main__ import main
from evaluation.options import parse
from evaluation.results import read_result
from tracking.metrics_file import last_value, read_metrics

ROOT = Path(__file__).resolve().parents[2]
TASKS = ["evaluation.tasks=[capitals,patterns]", "evaluation.every=8", "train.steps=16", "train.seq_len=128"]


def command(capsys, *arguments) -> tuple[int, str, str]:
    """`python -m evaluation ARGUMENTS` in this process, on its eight devices."""
    capsys.readouterr()
    with contextlib.chdir(ROOT):
        code = main(parse([*map(str, arguments), "wandb.mode=disabled", f"runtime.cpu_devices={runs.DEVICES}"]))
    return code, *capsys.readouterr()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on a mesh with stages, that answered tasks twice."""
    path = tmp_path_factory.mktemp("run")
    text = runs.corpus(path / "texts")
    mesh = ["mesh.pipe=2", "mesh.tensor=2", "pipeline.microbatches=2", "model.vocab_multiple=256"]
    assert runs.run(runs.overrides(text, path / "run", *TASKS, *mesh), devices=4) == 0
    return path / "run"


def test_training_answers_tasks_and_afterwards_the_answers_are_the_same(run, capsys):
    logged = {line["step"]: line for line in read_metrics(run / "metrics.jsonl") if "eval/capitals/acc" in line}
    assert sorted(logged) == [8, 16]
    assert logged[16]["eval/patterns/exact_match_stderr"] >= 0
    asked = ["capitals", "patterns", "perplexity:heldout", "mesh.tensor=2"]
    code, out, err = command(capsys, run, *asked, "--json", run / "all.json")
    assert code == 0, err
    whole = read_result(run / "all.json")
    assert list(whole.tasks) == asked[:3]
    for name, metric in (("capitals", "acc"), ("capitals", "acc_norm"), ("patterns", "exact_match")):
        assert whole.tasks[name].metrics[metric].value == pytest.approx(logged[16][f"eval/{name}/{metric}"], abs=0.034)
        assert f"{whole.tasks[name].metrics[metric].value:.4f}" in out
    names = {path.name for path in (run / "evaluation").iterdir()}
    assert names == {"capitals-16.json", "patterns-16.json", "perplexity-heldout-16.json"}
    loss = whole.tasks["perplexity:heldout"].metrics["loss"].value
    last = last_value(run / "metrics.jsonl", "eval/loss")
    assert loss == pytest.approx(last, rel=0.1)  # windows of other lengths, and no ends of documents
    later = read_metrics(run / "metrics.jsonl")[-1]
    assert later["eval/perplexity_heldout/loss"] == loss

    # once more: nothing new, and nothing is lost
    before = (run / "metrics.jsonl").read_text()
    code, _, _ = command(capsys, run, "capitals", "--limit", "7")
    assert code == 0
    assert len(list((run / "evaluation").iterdir())) == 4
    assert read_result(run / "evaluation" / "capitals-16.json").tasks["capitals"].count == 60
    assert (run / "metrics.jsonl").read_text() == before


def test_texts_and_prepared_corpora_are_alike(run, tmp_path, capsys):
    """The held-out documents of a corpus, and the same as lines of text; those of other tokens are refused."""
    corpus, words = tmp_path / "corpus", tmp_path / "words"
    shared = [f"data.path={run.parent / 'texts'}/*.txt", "data.heldout=0.2", f"data.cache={tmp_path / 'cache'}"]
    assert prepare(["prepare", str(corpus), *shared, "--workers", "1"]) == 0
    assert (
        prepare(["prepare", str(words), *shared, "tokenizer.kind=bpe", "tokenizer.vocab_size=300", "--workers", "1"])
        == 0
    )
    tokens = opened(DataConfig("prepared", str(corpus), cache=str(tmp_path / "cache")), TokenizerConfig()).heldout
    texts = [bytes(text.tolist()).decode() for text in np.split(tokens.slice(0, len(tokens)), tokens.ends_N[:-1])]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps({"text": text.rstrip("\0")}) + "\n" for text in texts))
    asked = [f"perplexity:{tmp_path / 'mine.jsonl'}", f"perplexity:{corpus}"]
    code, out, err = command(capsys, run, *asked, "--window", "32", "--stride", "8", "--json", tmp_path / "out.json")
    assert code == 0, err
    one, other = read_result(tmp_path / "out.json").tasks.values()
    np.testing.assert_allclose(one.items["nats"], other.items["nats"], rtol=1e-6)
    assert one.items["bytes"].tolist() == [len(text) - 1 for text in texts]
    code, _, err = command(capsys, run, f"perplexity:{words}")
    assert (code, err.count("\n")) == (2, 1)
    assert "has tokens of another tokenizer" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no_such_task"], "unknown task no_such_task; choose offline, arithmetic"),
        (["perplexity:nowhere.txt"], "nowhere.txt matches no file"),
        (["capitals", "--step", "5"], "holds no checkpoint of step 5"),
        (["capitals", "mesh.fsdp=3"], "mesh 3 = 3 needs 3 devices, 8 found"),
    ],
)
def test_mistakes(run, arguments, message, capsys):
    code, out, err = command(capsys, run, *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_a_run_that_is_not_one(tmp_path):
    asked = [sys.executable, "-m", "evaluation", str(tmp_path), "capitals"]
    done = subprocess.run(asked, cwd=ROOT, env=runs.environment(), capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert f"{tmp_path}" in done.stderr
    assert "no run directory" in done.stderr


def test_tasks_do_not_decide_which_run_it_is(tmp_path):
    from config import compose

    assert compose.load(["evaluation.tasks=[capitals]", "evaluation.every=5"]).run.dir == compose.load([]).run.dir
    with pytest.raises(ValueError, match="evaluation.every=5 needs evaluation.tasks"):
        compose.load(["evaluation.every=5"])


def test_yaml_of_a_run_holds_its_tasks(run):
    assert yaml.safe_load((run / "config.yaml").read_text())["evaluation"]["tasks"] == ["capitals", "patterns"]
    assert os.path.exists(run / "checkpoints")
