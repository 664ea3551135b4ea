"""A run on a mixture, packed, with weights that change: stopped, gone on with on another mesh, and told by source."""

import json
import shutil
import signal
from unittest import mock

import numpy as np
import pytest
import runs

from config import compose
from data.opening import open_corpora
from data.streams import training_stream
from training import feed

DONE, MISTAKE, PREEMPTED = 0, 2, 75
SOURCES = ("prose", "code")


def overrides(folder, directory, *more):
    sources = ", ".join(f"{name}: {{path: {folder}/{name}.jsonl, weight: 1}}" for name in SOURCES)
    settings = [one for one in runs.TINY if one != "data=text"]
    return [
        *(*settings, "data.source=mixture", f"data.mixture={{{sources}}}", f"data.cache={folder}/cache"),
        *("data.mixture.code.weight={0: 3, 10: 1}", "data.mixture.code.epochs=0.75"),
        *("data.segments=true", "data.packing=best_fit", f"run.dir={directory}", *more),
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    for name in SOURCES:
        texts = [f"{name} {i} says {name[i % 4] * (7 * i % 60)}" for i in range(120)]
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return folder


@pytest.fixture(autouse=True)
def at_home(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def watched(found, stop_at=None):
    """Within it the batches of runs are kept by step; SIGTERM comes when the loop asks for that of step `stop_at`."""
    batch = feed.Feed.batch

    def watch(self, step):
        arrays = batch(self, step)
        found[step] = {name: np.asarray(array) for name, array in arrays.items()}
        if step == stop_at:
            signal.raise_signal(signal.SIGTERM)
        return arrays

    return mock.patch.object(feed.Feed, "batch", watch)


@pytest.mark.long
def test_a_mixed_and_packed_run_goes_on_with_the_same_tokens_on_another_mesh(folder, tmp_path, capsys):
    whole, moved, undisturbed, read = tmp_path / "whole", tmp_path / "moved", {}, {}
    with watched(undisturbed):
        assert runs.run(overrides(folder, whole, "mesh.data=2", "mesh.context=2", "mesh.tensor=2")) == DONE
    said = capsys.readouterr().out
    assert "code 75.00%, prose 25.00%" in said
    assert "mixture after step 10" in said
    assert "code read to the cap" in said
    with watched(read, stop_at=13):
        assert runs.run(overrides(folder, moved), devices=1) == PREEMPTED
    with watched(read):
        assert runs.run(overrides(folder, moved, "mesh.fsdp=8")) == DONE
    runs.assert_near(runs.losses(moved), runs.losses(whole))
    runs.assert_near(runs.evaluations(moved), runs.evaluations(whole))

    config = compose.load(overrides(folder, whole))
    corpora = open_corpora(config.data, config.tokenizer)
    stream = training_stream(config.data, corpora, seq_len=32, batch_size=8, seed=0)
    assert [*undisturbed] == [*read] == [*range(runs.STEPS)]
    for step in range(runs.STEPS):
        for name, array in stream.batch(step).items():
            np.testing.assert_array_equal(undisturbed[step][name], array)
            np.testing.assert_array_equal(read[step][name], array)

    names = [name for step in range(runs.STEPS) for name in stream.names(step)]
    last = [line for line in runs.lines(moved) if "data/share/code" in line][-1]
    assert last["data/share/code"] == names.count("code") / len(names)
    assert last["data/epoch/code"] == stream.epochs(runs.STEPS)["code"] == pytest.approx(0.75, abs=0.01)  # its cap
    evaluated = [line for line in runs.lines(whole) if "eval/loss" in line][-1]
    by_source = [evaluated[f"eval/loss/{name}"] for name in SOURCES]
    assert min(by_source) < evaluated["eval/loss"] < max(by_source)


def test_a_run_that_outlasts_its_sources_is_refused_at_the_start(folder, tmp_path, capsys):
    arguments = overrides(folder, tmp_path / "run", "data.mixture.prose.epochs=1", "train.steps=900")
    assert runs.run(arguments) == MISTAKE
    error = capsys.readouterr().err
    assert error.startswith("error: 900 steps x 8 = 7,200 sequences, but the caps")
    assert error.count("\n") == 1
    steps = int(error.partition("set train.steps=")[2].split()[0])
    stream = training_stream(*_opened(arguments), seq_len=32, batch_size=8, seed=0)
    stream.told(steps)
    with pytest.raises(ValueError, match="sequences, but"):
        stream.told(steps + 1)
    shutil.rmtree(tmp_path / "run", ignore_errors=True)


def _opened(arguments):
    config = compose.load(arguments)
    return config.data, open_corpora(config.data, config.tokenizer)
