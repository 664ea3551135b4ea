"""python -m export: what other programs run says what transformers does; mistakes are one line and leave nothing."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import onnxruntime
import pytest

from checkpoint.huggingface.opened import open_pretrained
from checkpoint.huggingface.safetensors import Safetensors
from compress.__main__ import main as compress
from compress.options import parse as parse_compress
from data.tokenizer import ByteTokenizer, JsonTokenizer, TokenizerConfig, load_tokenizer
from export.__main__ import main
from export.options import parse
from export.program import load
from inference.config import SampleConfig
from inference.generate import generate
from inference.opening import find_model
from tests.export.conftest import assert_agree, expected, tokenizer
from tests.export.llama_numbers import Numbers

ROOT = Path(__file__).resolve().parents[2]
DEVICES = ["runtime.platform=cpu", "runtime.cpu_devices=8", "runtime.compile_cache=null"]
GRAPHS = ("llama", "gpt2", "gpt_neox", "qwen3")
LINEAR = {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0}  # the golden ones have scalings by length
OTHERS = {
    "gemma2": {"rope_parameters": LINEAR},
    "gemma3_text": {
        "rope_parameters": {"full_attention": LINEAR, "sliding_attention": {"rope_type": "default", "rope_theta": 50.0}}
    },
    "olmo2": {"rope_parameters": LINEAR},
    "mistral": {"rope_parameters": LINEAR},
}


def export(*arguments) -> int:
    return main(parse([*(str(argument) for argument in arguments), "mesh.tensor=1", "mesh.data=8", *DEVICES]))


@pytest.fixture(scope="module")
def graph(golden, tmp_path_factory):
    """Of a family its folder for ONNX Runtime."""
    made = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp("onnx") / family
            assert export(golden(family), made[family], "--to", "onnx", "--length", "40") == 0
        return made[family]

    return folder


# ----------------------------------------------------------------------------------------------------------------- jax


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral", "bert"])
def test_a_program_of_jax_says_what_transformers_does(golden, tmp_path, family, capsys):
    assert export(golden(family), tmp_path / "out", "--to", "jax") == 0
    assert "outputs   differ by" in capsys.readouterr().out
    program, (tokens_BT, logits_BTV) = load(tmp_path / "out"), expected(family)
    assert_agree(np.asarray(program(tokens_BT)), logits_BTV)
    assert program.about["platforms"] == ["cpu", "cuda", "tpu"]
    assert program.about["versions"]["jax"] == jax.__version__
    if family == "llama":  # any batch and length
        assert_agree(np.asarray(program(tokens_BT[:1, :7])), logits_BTV[:1, :7])


def test_a_damaged_program_is_not_loaded(golden, tmp_path):
    out = tmp_path / "out"
    assert export(golden("llama"), out, "--to", "jax") == 0
    for name in ("program.bin", "weights.safetensors", "manifest.json"):
        whole = (out / name).read_bytes()
        (out / name).write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
        with pytest.raises(ValueError, match=f"{name}.*(digest|damaged)|damaged.*{name}"):
            load(out)
        (out / name).write_bytes(whole)
    load(out)


# ---------------------------------------------------------------------------------------------------------------- onnx


@pytest.mark.parametrize("family", GRAPHS)
@pytest.mark.parametrize("cuts", [(), (5, 6, 19)], ids=["whole", "in pieces"])
def test_a_graph_says_what_transformers_does(graph, family, cuts):
    """A sequence read at once, and behind a cache of what came before; a batch of several."""
    session = onnxruntime.InferenceSession(graph(family) / "model.onnx", providers=["CPUExecutionProvider"])
    tokens_BT, logits_BTV = expected(family)
    about = json.loads((graph(family) / "manifest.json").read_text())["body"]
    empty = np.zeros((len(tokens_BT), about["kv_heads"], 0, about["head_dim"]), np.float32)
    names, found = [given.name for given in session.get_inputs()[1:]], []
    assert len(names) == 2 * about["layers"]
    cache = [empty] * len(names)
    for begin, end in zip((0, *cuts), (*cuts, tokens_BT.shape[1]), strict=True):
        given = {"input_ids": tokens_BT[:, begin:end].astype(np.int64), **dict(zip(names, cache, strict=True))}
        logits, *cache = session.run(None, given)
        found.append(logits)
    assert_agree(np.concatenate(found, axis=1), logits_BTV)


@pytest.mark.parametrize("family", OTHERS)
def test_a_graph_says_what_the_program_of_jax_does(changed, tmp_path, family):
    """Of models with windows, soft-caps, norms in other places, other angles in local layers."""
    model, (tokens_BT, _) = changed(family, **OTHERS[family]), expected(family)
    assert export(model, tmp_path / "graph", "--to", "onnx", "--length", "40") == 0
    assert export(model, tmp_path / "program", "--to", "jax") == 0
    session = onnxruntime.InferenceSession(tmp_path / "graph/model.onnx", providers=["CPUExecutionProvider"])
    shapes = [(len(tokens_BT), given.shape[1], 0, given.shape[3]) for given in session.get_inputs()[1:]]
    names = [given.name for given in session.get_inputs()[1:]]
    cache = dict(zip(names, (np.zeros(shape, np.float32) for shape in shapes), strict=True))
    logits_BTV = session.run(["logits"], {"input_ids": tokens_BT.astype(np.int64), **cache})[0]
    assert_agree(logits_BTV, np.asarray(load(tmp_path / "program")(tokens_BT)))


def test_the_small_program_writes_the_same_text(graph, golden):
    """edge/run.py: the greedy text of the model itself, without JAX, and what it took."""
    words = [str(graph("llama")), "The c", "--tokens", "12", "--threads", "1"]
    alone = (
        f"import runpy, sys; sys.argv = ['run.py', *{words!r}]; runpy.run_path('edge/run.py', run_name='__main__');"
        "assert 'jax' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", alone], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    model = find_model(golden("llama"), ["mesh.data=8", *DEVICES]).open()
    own = JsonTokenizer(tokenizer(), "own")
    with jax.set_mesh(model.mesh):
        prompt, sample = own.encode("The c").tolist(), SampleConfig(tokens=12, temperature=0.0)
        (new,) = generate(model.description, model.params, [prompt], sample, eos_id=own.eos_id)
    assert done.stdout == "The c" + own.decode(new) + "\n"
    assert "tokens/s" in done.stderr
    assert "MB resident" in done.stderr


def test_a_folder_that_the_small_program_cannot_read_is_one_line(tmp_path):
    """Nothing there, and each of its files damaged while the others are whole or not reached."""
    tell = lambda folder: subprocess.run(
        [sys.executable, "edge/run.py", str(folder), "hi"], cwd=ROOT, capture_output=True, text=True
    )
    files = (("tokenizer.json", '{"a"', ByteTokenizer().as_json()), ("manifest.json", "{", '{"body": {}}'))
    missing = tell(tmp_path)
    assert missing.returncode == 2
    assert missing.stderr == f"error: {tmp_path / 'tokenizer.json'} is not there: FOLDER is no export to onnx\n"
    for name, damaged, whole in (*files, ("model.onnx", "onnx", "")):
        (tmp_path / name).write_text(damaged)
        done = tell(tmp_path)
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: {tmp_path / name} is damaged: ")
        assert done.stderr.count("\n") == 1
        (tmp_path / name).write_text(whole)


# ---------------------------------------------------------------------------------------------------------------- gguf


def test_a_gguf_file_is_read_back(changed, tmp_path):
    """The same logits from float32, nearly the same from 16 bits and blocks; the same tokenizer. What is read back says
    what NumPy computes of the file.
    """
    text, (tokens_BT, _), model = "The cat is in it", expected("llama"), changed("llama", hidden_act="silu")
    assert export(model, tmp_path / "program", "--to", "jax") == 0
    logits_BTV = np.asarray(load(tmp_path / "program")(tokens_BT))
    for kind, error in (("f32", 1e-4), ("f16", 1e-2), ("q8_0", 0.1)):
        file = tmp_path / f"{kind}.gguf"
        assert export(model, file, "--to", "gguf", "--type", kind, "--length", "40") == 0
        assert export(file, tmp_path / kind, "--to", "jax") == 0
        ours = np.asarray(load(tmp_path / kind)(tokens_BT))
        np.testing.assert_allclose(ours, logits_BTV, rtol=0, atol=error * np.abs(logits_BTV).max())
        assert_agree(np.stack([Numbers(file, exact=True).logits(tokens_T) for tokens_T in tokens_BT]), ours)
        read = load_tokenizer(TokenizerConfig("file", path=str(file)))
        own = JsonTokenizer(tokenizer(), "own")
        assert read.encode(text).tolist() == own.encode(text).tolist()
        assert read.eos_id == own.eos_id


# ------------------------------------------------------------------------------------------------------------ narrowed


@pytest.mark.long
def test_a_narrowed_published_model_is_exported(changed, tmp_path):
    """Without a layer, a head and a third of ffn, in four formats: each says what the narrow model does."""
    text, narrow = tmp_path / "text.txt", tmp_path / "narrow"
    text.write_text("the cat is in it, and on the mat. " * 60)
    few = ["--samples", "8", "--length", "16", "--generate", "0", "--heldout", "8", "--data", text, "mesh.data=8"]
    words = [changed("llama", hidden_act="silu"), narrow, "--recipe", "narrow", *few, *DEVICES]
    assert compress(parse_compress([*map(str, words), "--layers", "1", "--kv-heads", "2", "--ffn", "24"])) == 0
    assert find_model(narrow, DEVICES).config.model.ffn == 24
    for target, out in (("jax", "program"), ("onnx", "graph"), ("gguf", "file.gguf"), ("safetensors", "folder")):
        more = {"onnx": ["--length", "40"], "gguf": ["--length", "40", "--type", "f32"]}.get(target, [])
        assert export(narrow, tmp_path / out, "--to", target, *more) == 0
    for read_back, out in (("file.gguf", "from_gguf"), ("folder", "from_folder")):
        assert export(tmp_path / read_back, tmp_path / out, "--to", "jax") == 0
    tokens_BT, _ = expected("llama")
    own, *others = (np.asarray(load(tmp_path / out)(tokens_BT)) for out in ("program", "from_gguf", "from_folder"))
    for logits_BTV in others:
        assert_agree(logits_BTV, own)
    # the graph was compared with the model as it was written


# --------------------------------------------------------------------------------------------------------- safetensors


def test_a_folder_for_transformers_is_reached_from_here(golden, tmp_path):
    assert export(golden("qwen3"), tmp_path / "out", "--to", "safetensors") == 0
    theirs, ours = (Safetensors(path / "model.safetensors") for path in (golden("qwen3"), tmp_path / "out"))
    assert ours.names() <= theirs.names()
    for name in ours.names():
        np.testing.assert_array_equal(ours.tensor(name), theirs.tensor(name))
    assert open_pretrained(tmp_path / "out").config == open_pretrained(golden("qwen3")).config


# ------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("model", "words", "message"),
    [
        ("mixtral", ["--to", "onnx"], "onnx cannot hold model.experts="),
        ("mixtral", ["--to", "gguf"], "gguf cannot hold model.experts="),
        ("bert", ["--to", "onnx"], "onnx cannot hold model.causal=False"),
        ("bert", ["--to", "gguf"], "gguf cannot hold model.causal=False"),
        ("gemma2", ["--to", "gguf"], "gguf cannot hold"),
        ("olmo2", ["--to", "gguf"], "gguf cannot hold model.norm_position=output"),
        ("gpt_neox", ["--to", "gguf"], "gguf cannot hold"),
        ("gemma2", ["--to", "onnx"], "onnx cannot hold model.rope_scaling.kind=dynamic"),
        ("llama", ["--to", "gguf"], "as llama model.activation=geglu_exact (known there: swiglu)"),
        ("qwen3", ["--to", "gguf"], "as qwen3 model.bias=attention"),
        ("llama", [], "--to"),
        ("llama", ["--to", "tflite"], "tflite"),
        ("llama", ["--to", "onnx", "--type", "f16"], "--type is an option of --to gguf, not of onnx"),
        ("llama", ["--to", "jax", "train.steps=3"], "train.steps=3 is no setting of an export"),
        ("llama", ["--to", "onnx", "--length", "0"], "0 is less than 1"),
        ("llama", ["--to", "onnx", "--length", "1"], "--length 1 has no room for a token behind a prompt: set 2"),
        ("gpt2", ["--to", "onnx", "--length", "999"], "--length 999 is more than the model's 48 learned positions"),
        ("nothing", ["--to", "jax"], "nothing"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(golden, capsys, tmp_path, model, words, message):
    path = model if model == "nothing" else golden(model)
    out = tmp_path / ("out.gguf" if "gguf" in words else "out")
    try:
        code = export(path, out, *words)
    except SystemExit as end:
        code = end.code
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2
    assert last.startswith("error: ")
    assert message in last
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_kept_and_a_failure_leaves_nothing(golden, capsys, tmp_path, monkeypatch):
    with pytest.raises(SystemExit) as end:
        export(golden("llama"), tmp_path, "--to", "jax")
    assert end.value.code == 2
    assert "is there already" in capsys.readouterr().err
    monkeypatch.setattr("export.__main__.TOLERANCE", {"float32": 0.0})
    assert export(golden("llama"), tmp_path / "out", "--to", "onnx") == 2
    assert "not written: outputs differ by" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
