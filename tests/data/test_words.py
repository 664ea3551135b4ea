"""Looking words up gives the tokens that the library gives, for every text."""

import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers_of_all_kinds import CORPUS, HARD, byte_fallback, byte_level, metaspace, word_piece

from data.corpus import DataConfig, documents
from data.tokenizer import JsonTokenizer, train_bpe
from data.words import WordEncoder

TOKENIZER = train_bpe([*CORPUS, HARD], 400)
ENCODER = TOKENIZER.by_words()
SPACES = " \t\n\r\f\v\x1c\x1f\x85\xa0\u1680\u180e\u2000\u200b\u2028\u2029\u202f\u205f\u3000\ufeff"
PIECES = st.one_of(
    st.text(alphabet=SPACES, max_size=3),
    st.text(alphabet="'sdtmrevl.,!?_-1²½٣aZéßǅ猫😀\u0301\u200d\x00\x07", max_size=6),
    st.text(max_size=4),
    st.sampled_from(["'ll", " 're", "don't", "<|endoftext|>", "x" * 700, "é" * 600, "  \n\n  "]),
)


def same(texts, encoder=ENCODER, tokenizer=TOKENIZER):
    for text, ours, theirs in zip(texts, encoder.encode_batch(texts), tokenizer.encode_batch(texts), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs, err_msg=repr(text))


@settings(max_examples=400, deadline=None)
@given(texts=st.lists(st.lists(PIECES, max_size=12).map("".join), max_size=4))
@example(texts=[HARD, "", "a", "\n", " é", "a\xa0 b", "a \u3000b", "x" * 3000])
def test_any_text(texts):
    same(texts)


def test_every_character_between_others():
    """Letters, digits, spaces and what is none: the classes are those of the library, whatever its Unicode."""
    characters = [chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000]
    chosen = [*characters[:0x3400], *characters[0x3400::97]]
    same(["".join(f"a{c}1 {c}{c} {c}\n" for c in chosen[i : i + 50]) for i in range(0, len(chosen), 50)])


def test_real_texts():
    found = [document.text for document in documents(DataConfig())][::12]
    same(found)
    assert len(ENCODER._table) > 1000


def test_a_full_table_begins_anew(monkeypatch):
    monkeypatch.setattr("data.words.MOST", 50)
    encoder = TOKENIZER.by_words()
    for i in range(20):
        same([f"some words {i} and {i * 7} more", "naïve café"], encoder)
        assert len(encoder._ids) < 150


@pytest.mark.parametrize("make", [metaspace, word_piece, byte_fallback, byte_level])
def test_other_tokenizers_are_left_to_the_library(make):
    assert make().by_words() is None  # the last one has an added word, which is looked for across borders


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}},
    ],
)
def test_settings_that_change_the_words(change):
    spec = json.loads(TOKENIZER._spec) | change
    assert not WordEncoder.fits(json.dumps(spec))
    assert JsonTokenizer(json.dumps(spec), "changed").by_words() is None
