"""The adapter against the harness's own for transformers, on the same weights. Needs the extra `compare`."""

import json

import jax
import numpy as np
import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from bench.harness import twins
from evaluation.harness import MeshModel
from evaluation.scoring import Scorer
from evaluation.suite import load_tasks, run_tasks
from inference.opening import find_model

SIZES = {"layers": 3, "width": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "ffn": 96}
HERE = [f"runtime.cpu_devices={jax.config.jax_num_cpu_devices}"]
TEXTS = ["", "a", "One mesh is as good as another. " * 40, "def f(x):\n    return x\n"]


@pytest.fixture(scope="module", params=["no begin", "begin"])
def pair(request, tmp_path_factory):
    """Our adapter and theirs; with `begin`, the tokenizer puts a token before every text, and both read that folder."""
    run, folder = twins(tmp_path_factory.mktemp("twins"), SIZES)
    if request.param == "begin":
        file = folder / "tokenizer.json"
        spec = json.loads(file.read_text())
        name = "<|endoftext|>"
        first = [{"SpecialToken": {"id": name, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        ids = {name: {"id": name, "ids": [spec["model"]["vocab"][name]], "tokens": [name]}}
        spec["post_processor"] = {"type": "TemplateProcessing", "single": first, "pair": first, "special_tokens": ids}
        file.write_text(json.dumps(spec))
        run = folder
    found = find_model(run, HERE)
    model = found.open()
    with jax.set_mesh(model.mesh):
        scorer = Scorer(model.description, model.params, model.mesh, model.dtype)
        ours = MeshModel(scorer, found.tokenizer, found.reach, found.begin)
        yield ours, HFLM(str(folder), device="cpu", dtype="float32", batch_size=8)


def requests(kind, *arguments):
    return [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]


def test_tasks(pair):
    found = [run_tasks(adapter, load_tasks(["offline"])) for adapter in pair]
    for name in found[0]:
        ours, theirs = (one[name] for one in found)
        assert ours.ids == theirs.ids
        for metric, values in ours.items.items():
            if ours.metrics[metric].numerator:
                assert np.mean(values != theirs.items[metric]) <= 1 / 60, (name, metric)  # a tie may fall either way


def test_log_likelihoods(pair):
    draw = np.random.default_rng(0)
    words = ["the", "mesh", "of", "a", "run", "is", "not", "what", "its", "loss", "sees,", "12", "+", "30", "=", "42."]
    text = lambda count: " ".join(draw.choice(words, count))
    asked = [(text(draw.integers(1, 120)), " " + text(draw.integers(1, 20))) for _ in range(60)]
    asked += [("", text(3)), ("x " * 400, "y"), ("trailing ", "space")]
    ours, theirs = (adapter.loglikelihood(requests("loglikelihood", *asked)) for adapter in pair)
    np.testing.assert_allclose([one for one, _ in ours], [one for one, _ in theirs], atol=1e-3)
    assert [flag for _, flag in ours] == [flag for _, flag in theirs]
    assert max(-one for one, _ in ours) > 10


def test_rolling(pair):
    ours, theirs = (
        adapter.loglikelihood_rolling(requests("loglikelihood_rolling", *((text,) for text in TEXTS[1:])))
        for adapter in pair
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-3)


def test_texts(pair):
    settings = {"until": ["\n\n", "return"], "max_gen_toks": 40, "do_sample": False}
    ours, theirs = (
        adapter.generate_until(requests("generate_until", *((text, settings) for text in TEXTS[1:])))
        for adapter in pair
    )
    assert ours == theirs
