"""/v1/classify over the double: probabilities as SciPy has them, pairs with their types, and what is refused."""

import contextlib
import http.client
import json
from urllib.parse import urlsplit

import numpy as np
import pytest
from doubles import WIDTH, EngineDouble, OpenGate, listening, served
from scipy.special import expit, softmax

from serving.service import Labels

NAMES = tuple("abcdefgh")
FRAME = ((1,), (2,))


@contextlib.contextmanager
def asking(kind="one", gate=None):
    """A server of a model with eight classes, whose logits are the first tokens / 256; a function that asks it."""
    assert len(NAMES) == WIDTH
    engine = EngineDouble(encoder=True, embeds=False)
    app = served(engine, gate or OpenGate(), labels=Labels(NAMES, kind), frame=FRAME)
    with listening(app) as address:

        def ask(path="/v1/classify", **body):
            where = urlsplit(address)
            with contextlib.closing(http.client.HTTPConnection(where.hostname, where.port, timeout=20)) as connection:
                connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
                response = connection.getresponse()
                return response.status, json.loads(response.read())

        yield ask, engine


def logits(text):
    ids = [1, *text.encode(), 2]
    return np.array((ids * WIDTH)[:WIDTH]) / 256


def test_probabilities_of_one_label_of_several_and_numbers():
    gate = OpenGate()
    with asking(gate=gate) as (ask, _):
        status, told = ask(input=["hello", "abc"])
        assert (status, told["object"], told["model"]) == (200, "list", "double")
        for number, text in enumerate(["hello", "abc"]):
            one = told["data"][number]
            expected = softmax(logits(text))
            np.testing.assert_allclose(one["probs"], expected)
            assert (one["index"], one["num_classes"], one["label"]) == (number, WIDTH, NAMES[expected.argmax()])
            assert list(one["probabilities"]) == list(NAMES)
            assert list(one["probabilities"].values()) == one["probs"]
        assert told["usage"] == {"prompt_tokens": 12, "total_tokens": 12}
        assert gate.admissions[-1].settled == [(200, 12, 0)]
    with asking("several") as (ask, _):
        (one,) = ask(input="hello")[1]["data"]
        np.testing.assert_allclose(one["probs"], expit(logits("hello")))
        assert one["labels"] == [name for name, p in zip(NAMES, one["probs"], strict=True) if p >= 0.5]
    with asking("regression") as (ask, _):
        (one,) = ask(input=[104, 105])[1]["data"]
        assert (one["label"], one["probs"]) == (None, [])
        assert one["values"]["a"] == 104 / 256


def test_a_pair_is_one_sequence_with_types():
    with asking() as (ask, engine):
        assert ask(input={"text": "ab", "pair": "c"})[0] == 200
        assert ask(input=[{"text": "a", "pair": "bc"}])[0] == 200
        first, second = engine.submitted
    assert (first.tokens, first.types) == ((1, 97, 98, 2, 99, 2), (0, 0, 0, 0, 1, 1))
    assert (second.tokens, second.types) == ((1, 97, 2, 98, 99, 2), (0, 0, 0, 1, 1, 1))


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": ["a"] * 257}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", 1]}, "input"),
        ({"input": "x" * 100_000}, "input"),
        ({"input": [99999]}, "input"),
        ({"input": {"text": "a"}}, "input"),
        ({"input": "a", "model": "other"}, "model"),
        ({"input": "a", "labels": 1}, "labels"),
        ({}, "input"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_before_it_is_read(body, param):
    gate = OpenGate()
    with asking(gate=gate) as (ask, engine):
        status, told = ask(**body)
        assert status in (400, 404)
        assert told["error"]["param"].startswith(param)
        assert not engine.submitted
        assert not gate.admissions


def test_a_model_of_labels_says_what_it_answers():
    with asking() as (ask, _):
        for path, body in (("/v1/completions", {"prompt": "a"}), ("/v1/embeddings", {"input": "a"})):
            status, told = ask(path, **body)
            assert (status, told["error"]["message"].endswith("it answers /v1/classify")) == (400, True)
