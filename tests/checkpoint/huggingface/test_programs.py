"""Weights in and out by the programs that a user types: train from them, go on, import, export, generate."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from runs import ROOT, corpus, environment, losses, run

from checkpoint.huggingface.opened import open_pretrained
from config import compose
from data.tokenizer import ByteTokenizer
from inference.opening import find_model, read_weights
from model.transformer import describe
from parallel.mesh import AXES, make_mesh

GOLDEN = ROOT / "tests" / "golden" / "huggingface"
CHARACTERS = "abcdefghijklmnopqrstuvwxyz .,"


def program(*arguments) -> tuple[int, str]:
    """Exit code and stderr of python -m ..."""
    words = [sys.executable, "-m", *map(str, arguments)]
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    return done.returncode, done.stderr


def parameters(path: Path) -> dict:
    """Those of a model, on one device."""
    mesh = make_mesh(dict.fromkeys(AXES, 1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        description = describe(find_model(path).config.model)
        return read_weights(path, description, mesh, np.dtype("float32")).params


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A published model with a tokenizer of a few letters, which its vocabulary of 67 has room for."""
    folder = tmp_path_factory.mktemp("published") / "tiny-llama"
    shutil.copytree(GOLDEN / "llama", folder)
    spec = json.loads(ByteTokenizer().as_json())
    spec["model"]["vocab"] = {character: i for i, character in enumerate(CHARACTERS)} | {"</s>": 40}
    spec |= {"pre_tokenizer": None, "decoder": {"type": "Fuse"}, "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    return folder


@pytest.fixture(scope="module")
def asked(folder, tmp_path_factory):
    """The arguments of three steps from these weights, in a directory."""
    text = corpus(tmp_path_factory.mktemp("text") / "text")
    settings = [
        *("runtime.platform=cpu", "wandb.mode=disabled", "runtime.compile_cache=null", "sample.tokens=0", "data=text"),
        *(f"data.path={text}/*.txt", f"data.cache={text.parent / 'cache'}", "optimizer=adamw", "optimizer.lr=1e-3"),
        *("train.steps=3", "train.batch_size=4", "train.seq_len=16", "train.log_every=1", "train.eval_every=0"),
    ]
    return lambda directory, *more: [*settings, f"model.from={folder}", f"run.dir={directory}", *more]


@pytest.fixture(scope="module")
def begun(asked, tmp_path_factory) -> Path:
    """A run of three steps that began from the published weights, on one device."""
    directory = tmp_path_factory.mktemp("run") / "run"
    assert run(asked(directory), devices=1) == 0
    return directory


def test_a_run_begins_from_published_weights(folder, begun, asked, tmp_path):
    """With a learning rate of 0 its weights are those of the file; what came with them is kept beside the run."""
    assert compose.load_run(begun).model == open_pretrained(folder).config
    assert (begun / "pretrained" / "chat_template.jinja").exists()
    assert run(asked(tmp_path / "still", "optimizer.lr=0", "train.steps=1"), devices=1) == 0
    still, published = parameters(tmp_path / "still"), parameters(folder)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), still, published)
    assert losses(tmp_path / "still")[1] == losses(begun)[1]


def test_weights_do_not_see_the_mesh(asked, begun, tmp_path):
    assert run(asked(tmp_path / "mesh", "mesh.fsdp=4"), devices=4) == 0
    assert losses(tmp_path / "mesh") == pytest.approx(losses(begun), rel=1e-5)


def test_a_run_begins_from_another_run(asked, begun, tmp_path):
    more = ["optimizer.lr=0", "train.steps=1", f"model.from={begun}"]
    assert run(asked(tmp_path / "after", *more), devices=1) == 0
    after, before = parameters(tmp_path / "after"), parameters(begun)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), after, before)


def test_import_and_export_are_a_circle(folder, asked, tmp_path, capsys):
    imported, out = tmp_path / "run", tmp_path / "out"
    code, said = program("checkpoint.huggingface", "import", folder, imported, "mesh.fsdp=2", "runtime.cpu_devices=2")
    assert code == 0, said
    code, said = program("checkpoint.huggingface", "export", imported, out)
    assert code == 0, said
    there, here = open_pretrained(folder), open_pretrained(out)
    assert here.source.names() == there.source.names()
    for name in there.source.names():
        np.testing.assert_array_equal(here.source.tensor(name), there.source.tensor(name))
    assert here.json == there.json
    assert {"tokenizer.json", "chat_template.jinja", "generation_config.json"} <= {path.name for path in out.iterdir()}
    for arguments, message in ((("import", folder, imported), "is not empty"), (("export", imported, out), "is there")):
        code, said = program("checkpoint.huggingface", *arguments)
        assert (code, said.count("\n")) == (2, 1)
        assert message in said
    assert run(asked(imported), devices=1) == 2
    assert "holds imported weights: begin a run from them with model.from=" in capsys.readouterr().err


def test_what_was_trained_goes_out(begun, tmp_path):
    code, said = program("checkpoint.huggingface", "export", begun, tmp_path / "out", "--dtype", "bfloat16")
    assert code == 0, said
    exported, trained = parameters(tmp_path / "out"), parameters(begun)
    rounded = lambda x: np.asarray(x.astype("bfloat16").astype("float32"))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), rounded(b)), exported, trained)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.from=/nowhere/at/all"], "/nowhere/at/all: there is no such folder or file"),
        (["model.from=FOLDER", "model=nano"], "model=nano and model.from="),
        (
            ["model.from=FOLDER", "tokenizer=bytes"],
            "tokenizer.kind=bytes: the weights of .* know the tokens of",
        ),
        (["model.from=FOLDER", "model.width=5"], "model.width=5: the weights of .* have 36"),
    ],
)
def test_mistakes(folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        compose.load([argument.replace("FOLDER", str(folder)) for argument in arguments])


def test_bytes_go_out_as_a_tokenizer_that_others_open():
    from tokenizers import Tokenizer

    theirs, ours = Tokenizer.from_str(ByteTokenizer().as_json()), ByteTokenizer()
    for text in ("plain words", "Grüße, 世界 🌍", " \t\n", "\x7f\x01"):
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ids == ours.encode(text).tolist()
        assert theirs.decode(ids) == text


@pytest.mark.parametrize("name", [".dotted", "with space", "a,b=c", "[1]"])
def test_any_path_will_do(folder, tmp_path, monkeypatch, name):
    shutil.copytree(folder, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert find_model(name).config.model == open_pretrained(folder).config
    for spelled in (f"model.from={name}", f"model.from='{name}'"):
        assert compose.load([spelled]).weights.path == str(tmp_path / name)


def test_a_killed_import_is_begun_again(folder, tmp_path):
    unfinished = tmp_path / "run"
    (unfinished / "checkpoints" / "00000000.partial").mkdir(parents=True)
    (unfinished / ".importing").touch()
    code, said = program("checkpoint.huggingface", "import", folder, unfinished)
    assert code == 0, said
    assert not (unfinished / ".importing").exists()
    assert parameters(unfinished).keys() == parameters(folder).keys()
