"""A real engine behind the API: the harness through `local-completions` finds what it finds in process."""

import jax
import jax.numpy as jnp
import lm_eval.models.openai_completions as api
import numpy as np
import openai
import pytest
from doubles import OpenGate, listening
from engines import REACH, TOKENIZER, opened, started
from lm_eval.api.instance import Instance

from evaluation.harness import MeshModel
from evaluation.scoring import Scorer
from serving.app import create_app
from serving.service import Service

# the harness over HTTP keeps one token of its length for a new one
ASKED = [("ab", "cd"), ("a cat", " sat"), ("ab", "c"), ("the mesh", " of a run"), ("x" * (REACH + 9), "yz")]


@pytest.fixture(scope="module")
def address():
    app = create_app(Service(started("grouped"), "tiny", "d0" * 32), OpenGate())
    with listening(app) as url:
        yield url


@pytest.fixture(scope="module")
def here():
    model = opened("grouped")
    with jax.set_mesh(model.mesh):
        yield MeshModel(Scorer(model.description, model.params, model.mesh, jnp.float32), TOKENIZER, REACH - 2)


@pytest.fixture(scope="module")
def there(address):
    return api.LocalCompletionsAPI(
        base_url=f"{address}/v1/completions", model="tiny", tokenizer_backend="remote", batch_size=3,
        max_length=REACH, max_gen_toks=8,
    )  # fmt: skip


def instances(kind, asked):
    return [Instance(kind, {}, one, number) for number, one in enumerate(asked)]


def test_log_likelihoods_are_the_same(here, there):
    expected = here.loglikelihood(instances("loglikelihood", ASKED))
    found = there.loglikelihood(instances("loglikelihood", ASKED))
    np.testing.assert_allclose([one for one, _ in found], [one for one, _ in expected], atol=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_a_scored_prompt_has_one_token_behind_it_whatever_ends_the_text(address):
    """The harness cuts the last one off: were the end of a document not there, a token of the prompt would go."""
    with openai.OpenAI(base_url=f"{address}/v1", api_key="any") as client:
        for prompt in ([120] * 40, TOKENIZER.encode("x" * 30 + "yz").tolist()):
            asked = {"prompt": prompt, "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0}
            for ends in ({}, {"logit_bias": {str(TOKENIZER.eos_id): 100}}):
                (choice,) = client.completions.create(model="tiny", **asked, extra_body=ends).choices
                assert len(choice.logprobs.token_logprobs) == len(prompt) + 1
                assert choice.finish_reason == ("stop" if ends else choice.finish_reason)


def test_greedy_texts_are_the_same(here, there):
    asked = [(text, {"until": ["\n"], "max_gen_toks": 8}) for text in ("ab", "a cat", "the mesh of")]
    assert there.generate_until(instances("generate_until", asked)) == here.generate_until(
        instances("generate_until", asked)
    )


def test_a_stream_is_the_whole_text_and_compiles_nothing(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="any") as client:
        asked = {"model": "tiny", "prompt": "the cat", "temperature": 0, "max_tokens": 12}
        whole = client.completions.create(**asked, logprobs=2)
        pieces = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
        assert "".join(piece.choices[0].text for piece in pieces if piece.choices) == whole.choices[0].text
        assert len(whole.choices[0].logprobs.tokens) == whole.usage.completion_tokens
        assert pieces[-1].usage.completion_tokens == whole.usage.completion_tokens
        assert client.get("/../state", cast_to=object)["compiles"] == 0
