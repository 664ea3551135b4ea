"""Text up to a stop string: as a search of the whole text finds it, however tokens cut it and come together."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers_of_all_kinds import CORPUS, HARD, byte_fallback, byte_level, metaspace, word_ends, word_piece

from data.tokenizer import ByteTokenizer
from inference.detokenizer import Detokenizer, continuation
from inference.requests import Sampling
from inference.text import Text

MAKERS = (metaspace, word_piece, word_ends, byte_fallback, byte_level, ByteTokenizer)
EVERY = pytest.mark.parametrize("tokenizer", [make() for make in MAKERS], ids=[make.__name__ for make in MAKERS])
TEXTS = st.text(max_size=12) | st.text(alphabet=HARD, max_size=12) | st.sampled_from([*CORPUS, HARD])


def streamed(tokenizer, prompt, new, stops, cuts) -> tuple[list[str], str | None]:
    """The pieces of a stream that comes in groups of tokens, and what stopped it."""
    text, pieces, rest = Text(tokenizer, prompt, Sampling(stop=tuple(stops))), [], list(new)
    while rest:
        size = cuts.pop() if cuts else 1
        piece, stopped_by = text.push(rest[:size])
        pieces.append(piece)
        if stopped_by:
            break
        rest = rest[size:]
    piece, stopped_by = text.finish()
    return [*pieces, piece], stopped_by


def cut(whole: str, stops) -> tuple[str, str | None]:
    """The text before the stop string that is complete first, of those that end there the longest."""
    for end in range(1, len(whole) + 1):
        if complete := [stop for stop in stops if whole[:end].endswith(stop)]:
            longest = max(complete, key=len)
            return whole[: end - len(longest)], longest
    return whole, None


@EVERY
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_the_first_stop_string_ends_the_text_wherever_tokens_end(tokenizer, data):
    prompt = tokenizer.encode(data.draw(TEXTS)).tolist()
    drawn = st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=12)
    new = data.draw(drawn | TEXTS.map(lambda text: tokenizer.encode(text).tolist()))
    whole = continuation(tokenizer, prompt, new)
    part = st.tuples(st.integers(0, max(0, len(whole) - 1)), st.integers(1, 6)).map(lambda at: whole[at[0] :][: at[1]])
    stops = [stop for stop in data.draw(st.lists(part | st.text(min_size=1, max_size=3), max_size=4)) if stop]
    pieces, stopped_by = streamed(tokenizer, prompt, new, stops, data.draw(st.lists(st.integers(1, 4), max_size=5)))
    assert ("".join(pieces), stopped_by) == cut(whole, stops)


@settings(max_examples=200, deadline=None)
@given(
    words=st.lists(st.text("ab", min_size=0, max_size=4), max_size=10),
    stops=st.lists(st.text("ab", min_size=2, max_size=6), min_size=1, max_size=3),
)
def test_text_waits_only_while_it_may_become_a_stop_string(words, stops):
    tokenizer, text, given_out, whole = ByteTokenizer(), Text(ByteTokenizer(), [], Sampling(stop=tuple(stops))), "", ""
    for word in words:
        piece, stopped_by = text.push(tokenizer.encode(word).tolist())
        given_out, whole = given_out + piece, whole + word
        if stopped_by:
            assert given_out == cut(whole, stops)[0]
            return
        begun = [n for n in range(len(whole) + 1) if any(s.startswith(whole[len(whole) - n :]) for s in stops)]
        assert given_out == whole[: len(whole) - max(begun)]


def test_nothing_comes_after_a_stop():
    text = Text(ByteTokenizer(), [], Sampling(stop=("b",)))
    assert text.push(list(b"aabcc")) == ("aa", "b")
    assert text.push(list(b"dd")) == ("", "b")
    assert text.finish() == ("", "b")


def test_half_a_character_is_no_text_and_may_complete_a_stop():
    text = Text(ByteTokenizer(), [], Sampling(stop=("é!",)))
    assert [text.push([byte])[0] for byte in "xé?é".encode()] == ["x", "", "", "é?", "", ""]
    assert text.push(list(b"!")) == ("", "é!")


def test_without_stops_it_is_the_detokenizer():
    tokenizer = byte_fallback()
    new = tokenizer.encode(HARD).tolist()
    text, plain = Text(tokenizer, [5], Sampling()), Detokenizer(tokenizer, [5])
    for token in new:
        assert text.push([token]) == (plain.push([token]), None)
    assert text.finish() == (plain.finish(), None)


def test_long_stop_strings_that_nearly_match_take_no_longer():
    """Sixteen strings of 20,000 characters on a text that begins each of them again and again."""
    stops = tuple("a" * 20_000 + str(i) for i in range(16))
    began = time.perf_counter()
    text = Text(ByteTokenizer(), [], Sampling(stop=stops))
    for _ in range(20):
        text.push(list(b"a" * 999 + b"b"))
    assert time.perf_counter() - began < 5
