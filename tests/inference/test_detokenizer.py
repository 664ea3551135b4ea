"""Streamed text: pieces joined are the whole decoded text without its prompt; no piece holds half a character."""

import codecs

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers_of_all_kinds import CORPUS, HARD, byte_fallback, byte_level, metaspace, word_ends, word_piece

from data.tokenizer import ByteTokenizer
from inference.detokenizer import Detokenizer, after_prompt, continuation

TEXTS = st.text(max_size=12) | st.text(alphabet=HARD, max_size=12) | st.sampled_from([*CORPUS, HARD])


MAKERS = (metaspace, word_piece, word_ends, byte_fallback, byte_level, ByteTokenizer)
TOKENIZERS = {make.__name__: make() for make in MAKERS}
EVERY = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
BY_BYTES = pytest.mark.parametrize("name", ["byte_level", "ByteTokenizer"])


def streamed(tokenizer, prompt: list[int], new: list[int], cuts) -> list[str]:
    """The pieces of a stream that comes in groups of tokens."""
    detokenizer, pieces, rest = Detokenizer(tokenizer, prompt), [], list(new)
    for size in cuts:
        pieces.append(detokenizer.push(rest[:size]))
        rest = rest[size:]
    return [*pieces, *(detokenizer.push([token]) for token in rest), detokenizer.finish()]


@EVERY
@settings(max_examples=100, deadline=None)
@given(prompt=TEXTS, text=TEXTS, cuts=st.lists(st.integers(0, 4), max_size=5))
def test_pieces_of_a_text_are_the_whole_without_the_prompt(tokenizer, prompt, text, cuts):
    prompt, new = tokenizer.encode(prompt).tolist(), tokenizer.encode(text).tolist()
    whole, before = tokenizer.decode(prompt + new), tokenizer.decode(prompt)
    assert whole.startswith(before)
    assert "".join(streamed(tokenizer, prompt, new, cuts)) == whole[len(before) :]
    assert continuation(tokenizer, prompt, new) == whole[len(before) :]


@EVERY
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_pieces_of_any_tokens_are_the_whole_without_the_prompt(tokenizer, data):
    """What a model draws need not be text: halves of characters, ends of documents, ids beyond the tokenizer's."""
    prompt = tokenizer.encode(data.draw(TEXTS)).tolist()
    new = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=12))
    pieces = streamed(tokenizer, prompt, new, data.draw(st.lists(st.integers(0, 4), max_size=5)))
    assert "".join(pieces) == continuation(tokenizer, prompt, new)
    whole, before = tokenizer.decode(prompt + new), tokenizer.decode(prompt)
    if whole.startswith(before) and not whole.endswith("\ufffd"):
        assert "".join(pieces) == whole[len(before) :]


@BY_BYTES
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_bytes_are_shown_as_an_incremental_decoder_shows_them(name, data):
    tokenizer = TOKENIZERS[name]
    new = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=12))
    expected = codecs.getincrementaldecoder("utf-8")("replace").decode(b"".join(map(tokenizer.bytes_of, new)))
    assert "".join(streamed(tokenizer, [], new, [])) == expected
    half = tokenizer.decode(new).removeprefix(expected)  # of a character, at the end
    assert tokenizer.decode(new).startswith(expected)
    assert set(half) <= {"\ufffd"}


@EVERY
def test_half_characters_are_never_shown(tokenizer):
    """Wherever a text is cut, what is shown is a beginning of it."""
    text = "a猫😀é👩‍👩‍👧b"
    whole = tokenizer.decode(ids := tokenizer.encode(text).tolist())
    assert "\ufffd" not in whole
    for length in range(len(ids)):
        pieces = streamed(tokenizer, [], ids[:length], [])
        assert whole.startswith("".join(pieces))
    assert "".join(streamed(tokenizer, [], ids, [])) == whole


def test_characters_come_as_soon_as_they_are_whole():
    detokenizer, ids = Detokenizer(ByteTokenizer()), list("a猫b".encode())
    assert [detokenizer.push([token]) for token in ids] == ["a", "", "", "猫", "b"]


def test_what_is_shown_of_a_broken_run_of_bytes():
    """The library shows every byte of such a run as broken; a half character at the very end is none of them."""
    tokenizer = TOKENIZERS["byte_fallback"]
    spell = lambda data: [tokenizer._tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in data]
    cut = spell("é😀".encode()[:-1])
    assert "".join(streamed(tokenizer, [], cut, [])) == "é"
    word = tokenizer.encode("the").tolist()
    assert "".join(streamed(tokenizer, [], [*cut, *word], [])) == tokenizer.decode([*cut, *word])
    prompt = tokenizer.encode("é").tolist()
    assert continuation(tokenizer, prompt, [*spell(b"\xe4"), *word]) == "\ufffd the"  # the prompt stays as it is


@pytest.mark.parametrize("make", [metaspace, word_piece, byte_fallback, word_ends])
def test_a_new_word_keeps_the_space_before_it(make):
    tokenizer = TOKENIZERS[make.__name__]
    new = tokenizer.encode("the cat").tolist()
    for prompt in ("cat", "cat "):
        ids = tokenizer.encode(prompt).tolist()
        assert prompt + after_prompt(tokenizer, prompt, ids, new) in ("cat the cat", "cat  the cat")
    assert after_prompt(tokenizer, "cat", tokenizer.encode("cat").tolist(), new) == " the cat"
    assert after_prompt(tokenizer, "", [tokenizer.eos_id], new) == "the cat"
    if make in (word_piece, word_ends):  # they drop the prompt's last space and would print the word's beside it
        assert after_prompt(tokenizer, "cat ", tokenizer.encode("cat ").tolist(), new) == "the cat"
