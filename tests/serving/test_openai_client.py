"""The server as the `openai` package sees it: sync, async, streamed, refused, and tried again."""

import asyncio
import json

import numpy as np
import openai
import pytest
from doubles import EngineDouble, OpenGate, chat_template, listening, saying, served

from inference.engine_options import EngineOptions
from inference.grammar import written
from inference.requests import Piece

PROMPT = [{"role": "user", "content": "say it"}]


@pytest.fixture(scope="module")
def template():
    return chat_template()


@pytest.fixture(scope="module")
def engine(template):
    return EngineDouble(tokenizer=template.tokenizer)


@pytest.fixture(scope="module")
def gate():
    return OpenGate()


@pytest.fixture(scope="module")
def address(engine, gate, template):
    with listening(served(engine, gate, template)) as url:
        yield url


@pytest.fixture
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0) as client:
        yield client


def test_a_completion(client, gate):
    answer = client.completions.create(model="double", prompt="the mesh", max_tokens=3, logprobs=1, echo=True)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason) == ("the meshabc", "length")
    assert "".join(choice.logprobs.tokens) == choice.text
    assert choice.logprobs.token_logprobs[0] is None
    places = zip(choice.logprobs.text_offset, choice.logprobs.tokens, strict=True)
    assert all(choice.text[at:].startswith(token) for at, token in places)
    assert answer.usage.completion_tokens == 3
    assert answer.system_fingerprint == "fp_" + "d0" * 16
    assert gate.admissions[-1].settled == [(200, answer.usage.prompt_tokens, 3)]


def test_several_prompts_and_choices_are_numbered_by_prompt(client):
    answer = client.completions.create(model="double", prompt=["a", "b"], n=2, max_tokens=2)
    assert [(choice.index, choice.text) for choice in answer.choices] == [(0, "ab"), (1, "bc"), (2, "ab"), (3, "bc")]


def test_a_chat(client, engine, template):
    answer = client.chat.completions.create(
        model="double", messages=PROMPT, max_completion_tokens=2, logprobs=True, top_logprobs=2, seed=3
    )
    (choice,) = answer.choices
    assert (choice.message.content, choice.message.role, choice.finish_reason) == ("ab", "assistant", "length")
    assert [token.token for token in choice.logprobs.content] == ["a", "b"]
    assert [len(token.top_logprobs) for token in choice.logprobs.content] == [2, 2]
    asked = engine.submitted[-1]
    assert list(asked.prompt) == template.encode(PROMPT, generation_prompt=True).tolist()
    assert (asked.sampling.seed, asked.sampling.stop_ids) == (3, template.stop_ids)


def test_a_streamed_chat(client, engine):
    engine.script = saying("naïve 猫 😀")
    try:
        stream = client.chat.completions.create(
            model="double", messages=PROMPT, stream=True, n=2, stream_options={"include_usage": True}
        )
        texts, ends, usage = ["", ""], {}, None
        for chunk in stream:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
                ends[choice.index] = choice.finish_reason or ends.get(choice.index)
    finally:
        engine.script = engine.counting
    assert texts == ["naïve 猫 😀"] * 2
    assert ends == {0: "stop", 1: "stop"}
    assert usage.completion_tokens == 2 * len("naïve 猫 😀".encode())


def test_many_at_once(address):
    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="any") as client:

            async def one(number):
                if number % 2:
                    answer = await client.completions.create(model="double", prompt=f"{number}", max_tokens=5)
                    return answer.choices[0].text
                stream = await client.completions.create(model="double", prompt="x", max_tokens=5, stream=True)
                return "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(*map(one, range(24)))

    assert asyncio.run(all_of_them()) == ["abcde"] * 24


@pytest.mark.parametrize(
    ("arguments", "kind", "param", "code"),
    [
        ({"model": "other"}, openai.NotFoundError, "model", "model_not_found"),
        ({"max_tokens": 5000}, openai.BadRequestError, "prompt", "context_length_exceeded"),
        ({"temperature": 3}, openai.BadRequestError, "temperature", "invalid_value"),
        ({"extra_body": {"max_token": 1}}, openai.BadRequestError, "max_token", "unknown_parameter"),
        ({"extra_body": {"stop_token_ids": [1, 10**6]}}, openai.BadRequestError, "stop_token_ids", "invalid_value"),
        ({"suffix": "x"}, openai.BadRequestError, "suffix", "unsupported_parameter"),
        ({"best_of": 3}, openai.BadRequestError, "best_of", "unsupported_parameter"),
    ],
)
def test_mistakes_are_told_as_openai_tells_them(client, arguments, kind, param, code):
    with pytest.raises(kind) as caught:
        client.completions.create(**{"model": "double", "prompt": "a", **arguments})
    assert (caught.value.param, caught.value.code) == (param, code)
    assert caught.value.request_id.startswith("req-")


def test_tools_are_refused_with_a_reason(client):
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    with pytest.raises(openai.BadRequestError, match="tools are not supported"):
        client.chat.completions.create(model="double", messages=PROMPT, tools=[tool])
    with pytest.raises(openai.BadRequestError, match="tools are not supported"):
        client.chat.completions.create(model="double", messages=[*PROMPT, {"role": "tool", "content": "x"}])


def test_a_fault_in_mid_stream_raises_and_no_done_comes(client, engine):
    engine.script = lambda request, index: [Piece(index, "a", (1,)), Piece(index, finish="error", error="secret words")]
    try:
        stream = client.completions.create(model="double", prompt="a", stream=True)
        with pytest.raises(openai.APIError, match="the engine failed") as caught:
            list(stream)
        assert "secret" not in str(caught.value.body)
        with pytest.raises(openai.InternalServerError, match="the engine failed"):
            client.completions.create(model="double", prompt="a")
    finally:
        engine.script = engine.counting


def test_the_client_tries_again_where_there_was_no_room(address, client, engine):
    engine.max_waiting = 0
    with pytest.raises(openai.InternalServerError) as caught:
        client.completions.create(model="double", prompt="a")
    assert (caught.value.status_code, caught.value.response.headers["retry-after"]) == (503, "2")
    tried = []

    def room(request):
        tried.append(request)
        if len(tried) == 2:
            engine.max_waiting = 256

    hooks = openai.DefaultHttpxClient(event_hooks={"request": [room]})
    with openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=1, http_client=hooks) as client:
        assert client.completions.create(model="double", prompt="a", max_tokens=1).choices[0].text == "a"
    assert len(tried) == 2


def test_more_than_may_ever_wait_is_refused_for_good(client, engine, monkeypatch):
    monkeypatch.setattr(engine, "options", EngineOptions(max_waiting=3))
    asked = {"model": "double", "prompt": ["a", "b"], "max_tokens": 1}
    assert len(client.completions.create(**asked).choices) == 2
    with pytest.raises(openai.BadRequestError, match=r"4 .* are more than the 3 that may wait"):
        client.completions.create(**asked, n=2)


def test_models(client):
    assert [model.id for model in client.models.list()] == ["double"]
    assert client.models.retrieve("double").id == "double"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_embeddings_of_an_encoder_come_as_floats_and_as_base64():
    with (
        listening(served(EngineDouble(encoder=True))) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="any") as client,
    ):
        plain = client.embeddings.create(model="double", input=["ab", "c"], encoding_format="float")
        packed = client.embeddings.create(model="double", input=[[97, 98], [99]])  # base64 is the package's own
        short = client.embeddings.create(model="double", input="ab", dimensions=3, encoding_format="float")
        with pytest.raises(openai.BadRequestError, match="dimensions=9 are more than the 8"):
            client.embeddings.create(model="double", input="a", dimensions=9)
        with pytest.raises(openai.BadRequestError, match="no head of classes: it answers /v1/embeddings"):
            client.post("/classify", body={"input": "a"}, cast_to=object)
        with pytest.raises(openai.BadRequestError, match="encoder"):
            client.completions.create(model="double", prompt="a")
    assert [one.embedding for one in plain.data] == [one.embedding for one in packed.data]
    assert plain.data[0].embedding[:2] == [97 / 256, 98 / 256]
    assert plain.usage.prompt_tokens == 3
    cut, full = np.array(short.data[0].embedding), np.array(plain.data[0].embedding)
    np.testing.assert_allclose(cut / cut[0], full[:3] / full[0])
    assert np.linalg.norm(cut) == pytest.approx(np.linalg.norm(full))


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


@pytest.mark.parametrize(
    ("asked", "kind", "source"),
    [
        ({"response_format": {"type": "json_object"}}, "json_object", ""),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
            "json_schema",
            None,
        ),
        ({"extra_body": {"guided_json": SCHEMA}}, "json_schema", None),
        ({"extra_body": {"guided_regex": "[ab]+"}}, "regex", "[ab]+"),
        ({"extra_body": {"response_format": {"type": "regex", "regex": "[ab]+"}}}, "regex", "[ab]+"),
        ({"extra_body": {"guided_choice": ["yes", "no"]}}, "choice", '["yes", "no"]'),
        ({"extra_body": {"structured_outputs": {"grammar": 'start: "a"'}}}, "lark", 'start: "a"'),
    ],
)
def test_constraints_reach_the_engine(client, engine, asked, kind, source):
    client.chat.completions.create(model="double", messages=PROMPT, max_tokens=2, **asked)
    expected = written(kind, json.dumps(SCHEMA) if source is None else source)
    assert engine.submitted[-1].sampling.grammar == expected


@pytest.mark.parametrize(
    ("asked", "code"),
    [
        ({"guided_json": "no JSON"}, "invalid_grammar"),
        ({"guided_regex": "a" * 20_000}, "invalid_grammar"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "invalid_value"),
        ({"response_format": {"type": "json_schema"}}, None),
    ],
)
def test_constraints_that_cannot_be_are_refused(client, asked, code):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="double", messages=PROMPT, extra_body=asked)
    assert caught.value.code == code
