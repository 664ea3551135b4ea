"""python -m compress: a folder that opens wherever a run does, whole or not at all; mistakes are one line."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

from checkpoint.huggingface.options import parse as parse_transfer
from compress.__main__ import bytes_of_weights, main
from compress.folder import about
from compress.forms import Int4
from compress.options import parse
from config.compose import load
from evaluation.scoring import Row, Scorer
from export.huggingface import export_weights
from inference.config import SampleConfig
from inference.engine import Engine
from inference.engine_options import EngineOptions
from inference.generate import generate
from inference.opening import find_model
from inference.requests import Request, Sampling
from tests.runs import environment

ROOT = Path(__file__).resolve().parents[2]
DEVICES = ["runtime.platform=cpu", "runtime.cpu_devices=8"]
FEW = ["--samples", "8", "--length", "32", "--heldout", "8", "--group", "16"]


def compress(*arguments) -> int:
    return main(parse([*(str(argument) for argument in arguments), *DEVICES]))


def found(path, *mesh: str):
    return find_model(path, [*mesh, *DEVICES])


@pytest.fixture(scope="module")
def small(run):
    """The run in int4 by GPTQ, made and opened on a mesh."""
    out = run.parent / "small"
    words = [run, out, "--recipe", "int4-gptq", *FEW, "--generate", "4", "mesh.fsdp=2", "mesh.tensor=2", "mesh.data=2"]
    assert compress(*words) == 0
    return out


@pytest.fixture(scope="module")
def opened(small):
    return found(small, "mesh.fsdp=2", "mesh.data=4").open()


def test_what_it_cost_is_told(run, small):
    cost = json.loads((small / "cost.json").read_text())
    assert cost["after"]["memory"] < 0.25 * cost["before"]["memory"]
    assert abs(cost["change"]) < 0.05
    assert cost["change"] == cost["after"]["loss"] / cost["before"]["loss"] - 1
    assert cost["tokens"] == 8 * 32
    assert all(cost[side][speed] > 0 for side in ("before", "after") for speed in ("reads", "writes"))
    size = lambda folder: sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    assert cost["after"]["disk"] == size(small / "checkpoints")
    assert cost["before"]["disk"] == size(run / "checkpoints/00000007")
    table = (small / "cost.md").read_text()
    assert f"| {cost['before']['loss']:.5f} | {cost['after']['loss']:.5f} |" in table


def test_the_disk_of_a_run_is_that_of_one_checkpoint(run, tmp_path):
    """And of one that trained a part of its model that of the base, too."""
    one = bytes_of_weights(run, 7)
    shutil.copytree(run, several := tmp_path / "several")
    shutil.copytree(several / "checkpoints/00000007", several / "checkpoints/00000003")
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["adapter"] = {"kind": "freeze", "train": ["final_norm/*"]}
    (several / "config.yaml").write_text(yaml.safe_dump(settings))
    assert bytes_of_weights(several, 7) == one
    settings["weights"]["path"] = str(run)
    (several / "config.yaml").write_text(yaml.safe_dump(settings))
    assert bytes_of_weights(several, 7) == 2 * one


def test_provenance(run, small):
    told = about(small)
    assert told["source"]["path"] == str(run)
    assert told["source"]["step"] == 7
    assert len(told["source"]["digest"]) == 64
    assert told["recipe"]["name"] == "int4-gptq"
    assert told["calibration"]["path"] == find_model(run).config.data.path
    assert Int4(16) in find_model(small).forms.values()


def test_it_generates_and_is_scored(opened):
    """On another mesh than it was made on, with the loss that the table has."""
    assert opened.step == 7
    assert {str(p.dtype) for p in jax.tree.leaves(opened.params)} == {"float32", "bfloat16", "uint8", "int8"}
    with jax.set_mesh(opened.mesh):
        sample = SampleConfig(tokens=8, temperature=0.0)
        texts = generate(opened.description, opened.params, [[1, 2, 3], [9]], sample, dtype=opened.dtype)
        scorer = Scorer(opened.description, opened.params, opened.mesh, opened.dtype)
        tokens = np.arange(8, dtype=np.int32)
        assert np.isfinite(scorer.scores_of([Row(tokens, tokens[:4], tokens[1:5])])[0].nll_C).all()
    assert [len(text) for text in texts] == [8, 8]


def test_the_engine_serves_it(small, opened):
    """The text is that of `generate`."""
    prompt = (5, 6, 7, 8)
    with jax.set_mesh(opened.mesh):
        sample = SampleConfig(tokens=6, temperature=0.0)
        theirs = generate(opened.description, opened.params, [list(prompt)], sample, dtype=opened.dtype)[0]
    model = found(small, "mesh.fsdp=2", "mesh.tensor=2", "mesh.data=2").open()
    engine = Engine(model, EngineOptions(max_running=2, cache_tokens=128, chunk=16))
    engine.start()
    try:
        ours, ended = [], []
        hear = lambda piece: (ours.extend(piece.tokens), piece.finish and ended.append(piece.finish))
        engine.submit(Request("r", prompt, Sampling(max_tokens=6, temperature=0.0, ignore_eos=True)), hear)
        until = time.monotonic() + 60
        while not ended and time.monotonic() < until:
            time.sleep(0.02)
    finally:
        engine.stop(1)
    assert (ours, ended) == (theirs, ["length"])


def test_it_is_exported_as_numbers(small, tmp_path):
    """As a Hugging Face folder of the same model, which gives the same logits."""
    export_weights(
        parse_transfer(["export", str(small), str(tmp_path / "hf"), "mesh.data=8", *DEVICES, "--family", "llama"])
    )
    texts = []
    for path in (small, tmp_path / "hf"):
        model = found(path, "mesh.data=8").open()
        with jax.set_mesh(model.mesh):
            sample = SampleConfig(tokens=8, temperature=0.0)
            texts += generate(model.description, model.params, [[1, 2, 3]], sample, dtype=model.dtype)
    assert texts[0] == texts[1]


def test_nothing_is_trained_from_it(small):
    with pytest.raises(ValueError, match="is compressed, and codes are not trained: give what it was made of"):
        load([f"model.from={small}"])


@pytest.mark.parametrize("file", ["config.yaml", "compressed/manifest.json", "checkpoints"])
def test_damage_is_named(small, tmp_path, file):
    """One altered byte, in the settings, the manifest or the parameters."""
    shutil.copytree(small, path := tmp_path / "copy")
    file = path / file
    if file.is_dir():
        file = max((one for one in file.rglob("*") if one.is_file()), key=lambda one: one.stat().st_size)
    altered = bytearray(file.read_bytes())
    altered[len(altered) // 2] ^= 1
    file.write_bytes(bytes(altered))
    with pytest.raises(ValueError, match=r"damaged|digest"):
        found(path, "mesh.data=8").open()


# ------------------------------------------------------------------------------------------------------------- mistakes


def test_rows_longer_than_the_positions_that_a_model_has_are_refused(run, tmp_path, capsys):
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["model"] |= {"positions": "learned", "max_positions": 32}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    assert compress(tmp_path, tmp_path / "out", "--recipe", "int4-awq", "--length", "64", "mesh.data=8") == 2
    assert "--length 64: the model has 32 positions; give --length 32" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["no-such-folder", "OUT", "--recipe", "int8"], "no-such-folder"),
        (["RUN", "OUT"], "--recipe"),
        (["RUN", "OUT", "--recipe", "int3"], "int4-gptq"),
        (["RUN", "RUN", "--recipe", "int8"], "is there already"),
        (["SMALL", "OUT", "--recipe", "int8"], "is compressed already"),
        (["RUN", "OUT", "--recipe", "int8", "train.steps=3"], "train.steps=3 is no setting of compression"),
        (["RUN", "OUT", "--recipe", "int4", "--group", "0"], "0 is less than 1"),
        (["RUN", "OUT", "--recipe", "int4", "--group", "7"], "has no groups of 7"),
        (["RUN", "OUT", "--recipe", "int8", "--data", "nothing/*.txt"], "nothing"),
        (["RUN", "OUT", "--recipe", "int8", "--length", "100000"], "give a lower --length"),
        (["RUN", "OUT", "--recipe", "int8", "--step", "3"], "no checkpoint of step 3"),
    ],
)
def test_mistakes_are_one_line(run, small, capsys, tmp_path, words, message):
    names = {"RUN": run, "SMALL": small, "OUT": tmp_path / "out"}
    try:
        code = compress(*[names.get(word, word) for word in words], *([] if "mesh" in message else ["mesh.data=8"]))
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    last = err.strip().splitlines()[-1]
    assert (code, out) == (2, "")
    assert last.startswith("error: ")
    assert message in last
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_a_kill_leaves_nothing_that_opens(run, tmp_path):
    """Killed while the folder is being filled."""
    out = tmp_path / "out"
    words = [str(run), str(out), "--recipe", "int8", *FEW, "--generate", "0", "mesh.data=8"]
    stop = (
        "import time, sys; from compress.options import parse; import compress.__main__ as m\n"
        "m.write_mark = lambda *a: (print('filled', flush=True), time.sleep(60))\n"
        "m.main(parse(sys.argv[1:]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", stop, *words, *DEVICES], cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "filled\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.exists()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out-")
    assert compress(*words) == 0  # the same command again
    assert found(out, "mesh.data=8").forms
