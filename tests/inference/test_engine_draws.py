"""Draws through the engine: a seed keeps its text whatever runs beside it; text fits its grammar, ends at a stop."""

import json
import re

import jsonschema
import numpy as np
import pytest
from engines import Heard, ask

from inference.grammar import written
from inference.requests import Request, Sampling

SEEDED = {
    "plain": {"temperature": 1.0, "seed": 1},
    "narrow": {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "seed": -3},
    "penalised": {"temperature": 1.2, "min_p": 0.01, "presence_penalty": 0.5, "repetition_penalty": 1.1, "seed": 2**60},
}


@pytest.mark.parametrize("name", SEEDED)
def test_a_seed_gives_its_text_whatever_runs_beside_it(engine, name):
    """The cache is so small that sequences are also interrupted and computed again."""
    prompt, rng = (5, 6, 7, 8, 9), np.random.default_rng(0)
    alone = ask(engine, f"{name} alone", prompt, n=2, max_tokens=20, **SEEDED[name])
    assert alone.tokens(0) != alone.tokens(1)
    others = []
    for index in range(8):
        others.append(Heard())
        beside = Sampling(max_tokens=20, temperature=1.0, seed=SEEDED[name]["seed"], ignore_eos=True, top_p=0.5)
        engine.submit(Request(f"{name} {index}", tuple(rng.integers(0, 256, 30).tolist()), beside), others[-1])
    again = ask(engine, f"{name} beside", prompt, n=2, max_tokens=20, **SEEDED[name])
    assert [again.tokens(i) for i in range(2)] == [alone.tokens(i) for i in range(2)]
    assert all(other.done.wait(60) for other in others)


def test_without_a_seed_texts_differ(engine):
    texts = [tuple(ask(engine, f"any {i}", (1, 2), max_tokens=12, temperature=1.5).tokens()) for i in range(3)]
    assert len(set(texts)) == 3


def test_text_matches_its_grammar_beside_others(engine):
    schema = {
        "type": "object", "required": ["a"], "additionalProperties": False,
        "properties": {"a": {"enum": [1, "x"]}, "b": {"type": "boolean"}},
    }  # fmt: skip
    grammar = written("json_schema", json.dumps(schema))
    heard = {}
    for index in range(6):
        sampling = Sampling(max_tokens=50, temperature=1.5, seed=index, grammar=grammar if index % 2 else None)
        heard[index] = Heard()
        engine.submit(Request(f"grammar {index}", (1, 2, 3), sampling), heard[index])
    for index, one in heard.items():
        assert one.done.wait(60)
        if index % 2 and one.finish() == "stop":
            jsonschema.validate(json.loads(one.text()), schema)
    ended = ask(engine, "choice", (1,), max_tokens=50, grammar=written("choice", '["yes", "no"]'))
    assert (ended.text() in ("yes", "no"), ended.finish()) == (True, "stop")
    cut = ask(engine, "cut", (1,), max_tokens=3, grammar=written("regex", "[a-c]{9}"))
    assert (bool(re.fullmatch("[a-c]{3}", cut.text())), cut.finish()) == (True, "length")


def test_a_grammar_that_is_wrong_is_refused_at_once(engine):
    with pytest.raises(ValueError, match="grammar cannot be followed"):
        ask(engine, "wrong", (1,), grammar=written("regex", "(("))


def test_a_stop_string_is_found_over_tokens(engine):
    bias = {ord("a"): 50.0}
    whole = ask(engine, "whole", (1,), max_tokens=10, logit_bias=bias)
    assert whole.text() == "a" * 10
    stopped = ask(engine, "stopped", (1,), max_tokens=10, logit_bias=bias, stop=("aaaa", "b"))
    assert (stopped.text(), stopped.finish()) == ("", "stop")
    assert stopped.pieces[0][-1].stopped_by == "aaaa"
