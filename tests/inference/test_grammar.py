"""Text that must match: random models under random schemas, every kind of tokenizer, and grammars made to do harm."""

import json
import re
import time

import jsonschema
import numpy as np
import pytest
from llguidance import LLMatcher
from tokenizers_of_all_kinds import CORPUS, byte_fallback, byte_level, metaspace, word_ends, word_piece

from data.tokenizer import ByteTokenizer, train_unigram
from inference.detokenizer import continuation
from inference.grammar import Grammars, token_bytes, written
from inference.grammar_trial import Trials

JSON_TEXTS = [*CORPUS, '{"a": [1, 2.5e3, true, null], "bc": "x"}' * 5, "0123456789-+.eE{}[]:,\"'"]


def unigram():
    return train_unigram(JSON_TEXTS, 300)


TOKENIZERS = {make.__name__: make() for make in (ByteTokenizer, byte_level, byte_fallback, metaspace, unigram)}
EVERY = pytest.mark.parametrize("name", TOKENIZERS)


@pytest.fixture(scope="module")
def grammars():
    """Of every tokenizer, with logits wider than the vocabulary."""
    made = {name: Grammars(tokenizer, tokenizer.vocab_size + 40) for name, tokenizer in TOKENIZERS.items()}
    yield made
    for one in made.values():
        one.close()


def allowed(matcher) -> np.ndarray:
    return np.flatnonzero(np.unpackbits(matcher.mask().view(np.uint8), bitorder="little"))


def text_of(tokenizer, matcher, rng, most: int = 300) -> str | None:
    """What a model of random logits says; None if it has not come to an end."""
    new, eager = [], rng.random(tokenizer.vocab_size + 64)
    for step in range(most):
        ids = allowed(matcher)
        if step > most // 4 and len(ends := np.intersect1d(ids, [*b'"]},', tokenizer.eos_id])):
            ids = ends  # a random model does not come to an end by itself
        token = int(rng.choice(ids, p=eager[ids] / eager[ids].sum()))
        assert matcher.advance(token)
        if token == tokenizer.eos_id:
            break
        new.append(token)
        if matcher.finished:
            break
    else:
        return None
    return continuation(tokenizer, tokenizer.encode("the cat").tolist(), new)


def schema(rng, depth: int = 2) -> dict:
    """A random JSON schema."""
    kinds = ["integer", "boolean", "null", "enum", "string", "number"] + (["object", "array", "anyOf"] if depth else [])
    kind = rng.choice(kinds)
    if kind == "enum":
        return {"enum": [rng.choice(["a", "b c", "é"]).item(), int(rng.integers(-50, 50)), None]}
    if kind == "anyOf":
        return {"anyOf": [schema(rng, depth - 1), schema(rng, depth - 1)]}
    if kind == "string":
        return {
            "type": "string",
            **[{"maxLength": 5}, {"pattern": "^[a-c]{1,4}$"}, {"minLength": 2, "maxLength": 9}][rng.integers(3)],
        }
    if kind == "integer":
        return {"type": "integer", "minimum": int(rng.integers(-9, 3)), "maximum": int(rng.integers(3, 2000))}
    if kind == "array":
        return {"type": "array", "items": schema(rng, depth - 1), "maxItems": 3}
    if kind == "object":
        properties = {key: schema(rng, depth - 1) for key in ("a", "bc", "x")[: rng.integers(1, 4)]}
        return {"type": "object", "properties": properties, "required": ["a"], "additionalProperties": False}
    return {"type": str(kind)}


def test_a_random_model_under_random_schemas_writes_what_validates(grammars):
    rng, ended = np.random.default_rng(0), 0
    for i in range(60):
        name = ("ByteTokenizer", "byte_level", "unigram")[i % 3]
        asked = schema(rng)
        said = text_of(TOKENIZERS[name], grammars[name].matcher(written("json_schema", json.dumps(asked))), rng)
        if said is not None:
            ended += 1
            jsonschema.validate(json.loads(said), asked)
    assert ended > 50


@EVERY
def test_text_matches_its_pattern_with_every_tokenizer(grammars, name):
    rng = np.random.default_rng(1)
    for pattern in ("(at|hat|mat)*c", "a[ab]{0,3}t"):
        for _ in range(4):
            said = text_of(TOKENIZERS[name], grammars[name].matcher(written("regex", pattern)), rng)
            assert said is None or re.fullmatch(pattern, said), said


def test_choices_and_lark(grammars):
    tokenizer, rng, seen = TOKENIZERS["byte_level"], np.random.default_rng(2), set()
    choices = ['yes "so"', "no\n", "猫が好き", "start: x|y"]
    for _ in range(20):
        seen.add(text_of(tokenizer, grammars["byte_level"].matcher(written("choice", json.dumps(choices))), rng))
    assert seen == set(choices)
    lark = 'start: "(" start ")" | "x"'
    for _ in range(5):
        said = text_of(tokenizer, grammars["byte_level"].matcher(written("lark", lark)), rng)
        assert said is None or re.fullmatch(r"\(*x\)*", said)
    assert (
        json.loads(text_of(tokenizer, grammars["byte_level"].matcher(written("json_object")), rng) or "{}") is not None
    )


@EVERY
def test_the_end_is_allowed_exactly_where_the_text_may_end(grammars, name):
    tokenizer = TOKENIZERS[name]
    end, matcher = tokenizer.eos_id, grammars[name].matcher(written("regex", "(at)?(at){1,2}"))
    at = [token for token, piece in enumerate(token_bytes(tokenizer)) if piece in (b"a", b"t", b"at")]
    said, pieces = "", token_bytes(tokenizer)
    while not matcher.finished:
        assert (end in allowed(matcher)) == bool(re.fullmatch("(at)?(at){1,2}", said))
        token = next(t for t in allowed(matcher) if t in at)
        assert matcher.advance(int(token))
        said += pieces[token].decode()
    assert re.fullmatch("(at)?(at){1,2}", said)


@EVERY
def test_special_tokens_are_not_reached(grammars, name):
    """Not as text of their names, and not by Lark's own spellings of tokens."""
    tokenizer = TOKENIZERS[name]
    specials = {*getattr(tokenizer, "specials", {}).values(), tokenizer.eos_id}
    anything = grammars[name].matcher(written("regex", "(.|\n)+"))
    assert not specials & set(allowed(anything).tolist())
    for lark in ('start: "<" <[0]>', f"start: <[{tokenizer.eos_id}]>", "start: /</ <|endoftext|>", "start: <[0-200]>"):
        with pytest.raises(ValueError, match="special tokens"):
            written("lark", lark)
    assert written("lark", 'start: "<|" /<[x]>/  // <')
    smuggled = grammars[name].matcher(LLMatcher.grammar_from_lark(f'start: "a" <[{tokenizer.eos_id}]> "a"'))
    ids = allowed(smuggled).tolist()
    assert not specials & set(ids)
    smuggled.advance(ids[0])
    with pytest.raises(ValueError, match="no token"):
        smuggled.mask()


def test_ends_of_a_chat_end_a_grammar(grammars):
    tokenizer = TOKENIZERS["byte_level"]
    matcher = grammars["byte_level"].matcher(written("choice", '["a"]'), ends=(300,))
    assert 300 not in allowed(matcher)
    assert matcher.advance(int(tokenizer.encode("a")[0]))
    assert matcher.finished
    assert set(allowed(matcher).tolist()) == {300, tokenizer.eos_id}
    assert matcher.advance(300)


@pytest.mark.parametrize("make", [word_piece, word_ends])
def test_tokens_that_change_each_others_text_are_refused(make):
    with pytest.raises(ValueError, match="cannot follow a grammar"):
        Grammars(make(), 100)


def test_copies_go_their_own_ways(grammars):
    tokenizer = TOKENIZERS["ByteTokenizer"]
    one = grammars["ByteTokenizer"].matcher(written("choice", '["ab", "ba"]'))
    other = one.copy()
    assert one.advance(ord("a"))
    assert other.advance(ord("b"))
    assert (allowed(one).tolist(), allowed(other).tolist()) == ([ord("b")], [ord("a")])
    assert not one.advance(ord("c"))
    assert tokenizer.eos_id not in allowed(other)


def chained(n: int) -> str:
    """A schema of arrays within arrays."""
    link = lambda i: {"type": "array", "items": {"$ref": f"#/$defs/{i + 1}"}} if i < n - 1 else {}
    return json.dumps({"$ref": "#/$defs/0", "$defs": {i: link(i) for i in range(n)}}, separators=(",", ":"))


BOMBS = {
    "long": ("regex", "a" * 100_000),
    "deep": ("json_schema", '{"items":' * 1500 + "{}" + "}" * 1500),
    "parens": ("regex", "(" * 8000 + ")" * 8000),
    "rules": ("lark", "start: a0\n" + "\n".join(f"a{i}: a{i + 1}" for i in range(1200)) + '\na1200: "x"'),
    "doubling": ("lark", "start: A0\n" + "\n".join(f"A{i}: A{i + 1} A{i + 1}" for i in range(40)) + '\nA40: "x"'),
    "optional": ("regex", "a?" * 4000 + "a" * 4000),
    "all": ("lark", "start: A\nA: " + " & ".join(f"/.*a.{{{i}}}b.*/" for i in range(200))),
    "wide": ("lark", "start: " + " | ".join(f'"x{i}"' for i in range(1800))),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_are_refused_in_bounded_time(grammars, bomb):
    began = time.perf_counter()
    with pytest.raises(ValueError):
        grammars["ByteTokenizer"].matcher(written(*BOMBS[bomb])).mask()
    assert time.perf_counter() - began < 10
    matcher = grammars["ByteTokenizer"].matcher(written("choice", '["a"]'))  # and the next one is served
    assert allowed(matcher).tolist() == [ord("a")]


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        *(("xml", ""), ("regex", "(("), ("lark", "begin: x"), ("json_schema", "{"), ("json_schema", "3")),
        *(("json_schema", '{"$ref": "http://localhost/"}'), ("json_schema", '{"type": "strange"}')),
        *(("json_schema", '{"enum": []}'), ("choice", "[]"), ("choice", '["a", ""]'), ("choice", '"a"')),
        ("regex", "(?=a)b"),
    ],
)
def test_what_is_wrong_is_told(grammars, kind, source):
    with pytest.raises(ValueError) as told:
        grammars["ByteTokenizer"].matcher(written(kind, source))
    assert "\n" not in str(told.value)
    assert len(str(told.value)) < 400


def test_trials_outlive_the_end_of_their_process():
    trials, good = Trials(), written("choice", '["a"]')
    trials.check(good)
    trials._process.kill()
    trials._process.wait()
    trials.check(good)
    trials.close()
