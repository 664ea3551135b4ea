"""Tokenizers: nothing is lost, every byte is counted once, and no text can end a document."""

import json
from collections import Counter

import numpy as np
import pytest
from hostile import EXAMPLES, SPECIALS, texts
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers_of_all_kinds import byte_fallback, byte_level, metaspace, word_ends, word_piece

from data.tokenizer import (
    EOS_NAMES,
    ByteTokenizer,
    JsonTokenizer,
    TokenizerConfig,
    load_tokenizer,
    train,
    train_bpe,
    train_unigram,
    vocab_size_of,
)
from data.tokenizers.unigram import LONGEST, count_words

CORPUS = [
    "the cat sat on the mat, the hat and the cat",
    "def f(x):\n    return x + 1\n" * 5,
    "naïve café 😀 猫が好き",
] * 3
HARD = "a\0b <|endoftext|> </s> 😀👩‍👩‍👧 猫が好き \r\n\t  naïve \u202e e\u0301 ﬁ"


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(CORPUS, 300)


@pytest.fixture(scope="module")
def unigram():
    return train_unigram(CORPUS, 262)


@pytest.fixture(scope="module")
def from_file(tmp_path_factory):
    """As published: an end of document of another name, a non-special added word, a hole in the ids, a prefix token."""
    spec = json.loads(train_bpe(CORPUS, 290)._spec.replace("<|endoftext|>", "</s>"))
    spec["added_tokens"].append({**spec["added_tokens"][0], "id": 400, "content": "猫が", "special": False})
    spec["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "</s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"</s>": {"id": "</s>", "ids": [0], "tokens": ["</s>"]}},
    }
    spec["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(json.dumps(spec), encoding="utf-8")
    return load_tokenizer(TokenizerConfig("file", path=str(path)))


@pytest.fixture(params=["bytes", "bpe", "unigram", "file"])
def tokenizer(request, bpe, unigram, from_file):
    return {"bytes": ByteTokenizer(), "bpe": bpe, "unigram": unigram, "file": from_file}[request.param]


def kept(tokenizer, text):
    return text.replace("\0", "") if isinstance(tokenizer, ByteTokenizer) else text


def check_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == kept(tokenizer, text)
    assert tokenizer.token_bytes[ids].sum() == len(kept(tokenizer, text).encode())
    assert tokenizer.token_bytes[tokenizer.eos_id] == 0


def test_hard_text(tokenizer):
    for text in (HARD, "", *EXAMPLES):
        check_text(tokenizer, text)


@settings(max_examples=100, deadline=None)
@given(text=texts)
def test_any_text(bpe, unigram, from_file, text):
    for tokenizer in (ByteTokenizer(), bpe, unigram, from_file):
        check_text(tokenizer, text)


# ---------------------------------------------------------------------------------- special tokens and what spells them


KINDS_OF_FILES = (metaspace, word_piece, word_ends, byte_fallback, byte_level)


def with_specials(tokenizer):
    """The same with more special tokens, among them some that its vocabulary holds as words."""
    spec = json.loads(tokenizer._spec)
    known = {token["content"] for token in spec["added_tokens"]}
    flags = {key: value for key, value in spec["added_tokens"][0].items() if key not in ("id", "content")}
    vocab, more = spec["model"]["vocab"], [name for name in SPECIALS if name not in known]
    for token in spec["added_tokens"] if isinstance(vocab, dict) else ():
        vocab.setdefault(token["content"], token["id"])
    for name in more:
        if isinstance(vocab, list):
            vocab.append([name, 0.0])  # likelier than what it is made of
        elif name not in vocab:
            vocab[name] = max(vocab.values(), default=-1) + 1
    at = {name: i for i, (name, _) in enumerate(vocab)} if isinstance(vocab, list) else vocab
    spec["added_tokens"] = sorted(
        [*({**token, "id": at.get(token["content"], token["id"])} for token in spec["added_tokens"]),
         *({"id": at[name], "content": name, **flags, "special": True} for name in more)],
        key=lambda token: token["id"],
    )  # fmt: skip
    return JsonTokenizer(json.dumps(spec), "with specials")


@pytest.fixture(scope="module", params=KINDS_OF_FILES, ids=lambda kind: kind.__name__)
def special_kind(request):
    return with_specials(request.param())


@settings(max_examples=100, deadline=None)
@given(text=texts)
def test_other_names_of_special_tokens_change_no_other_token(special_kind, text):
    """The ids are those of the library on the file as it is, looking for no special tokens."""
    plain = Tokenizer.from_str(special_kind._spec)
    plain.encode_special_tokens = True
    while spelled := [name for name in special_kind.specials if name in text]:
        text = text.replace(spelled[0], "")
    ids = plain.encode(text, add_special_tokens=False).ids
    assert special_kind.encode(text).tolist() == [i for i in ids if i != special_kind.eos_id]
    assert special_kind.decode(ids) == plain.decode(ids)


def forged(tokenizer, text):
    """The special tokens among a text's, but for that of what is unknown."""
    unknown = {tokenizer.specials.get(name) for name in ("<unk>", "[UNK]")}
    return set(tokenizer.encode(text).tolist()) & set(tokenizer.specials.values()) - unknown


def test_no_text_forges_a_special_token(special_kind):
    assert len(special_kind.specials) >= len(SPECIALS) - 1
    for text in (*EXAMPLES, *(f"a{name}b {name} c" for name in special_kind.specials)):
        assert not forged(special_kind, text)


@settings(max_examples=100, deadline=None)
@given(text=texts)
def test_no_text_forges_a_special_token_whatever_it_says(special_kind, text):
    assert not forged(special_kind, text)


def test_parts_give_special_tokens_where_they_are_told_to(special_kind):
    for name, i in special_kind.specials.items():
        if name not in ("<unk>", "[UNK]"):
            ids = special_kind.encode_parts(["the cat ", i, f"the {name} cat", i]).tolist()
            assert [at for at in ids if at in special_kind.specials.values() and at == i] == [i, i]
            assert "cat" in special_kind.decode(ids)


def test_a_word_that_is_the_end_of_a_document_is_not_lost():
    """T5 has `</s>` as a word of its vocabulary, which the likeliest cut of the text `</s>` would take."""
    tokenizer = metaspace()
    assert tokenizer.decode(tokenizer.encode("the </s> cat")).count("s") >= 1


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(-(2**40), 2**40) | st.integers(0, 500), max_size=30))
def test_decode_takes_any_ids(bpe, from_file, ids):
    for tokenizer in (ByteTokenizer(), bpe, from_file):
        known = [i for i in ids if 0 <= i < tokenizer.vocab_size]
        assert tokenizer.decode(ids) == tokenizer.decode(known)
        assert tokenizer.decode(np.array(ids, np.int64)) == tokenizer.decode(known)
        tokenizer.decode(known).encode()


def test_decode_leaves_out_the_end_of_document(tokenizer):
    assert tokenizer.decode([*tokenizer.encode("ab"), tokenizer.eos_id, *tokenizer.encode("cd")]) == "abcd"


def test_batch_equals_one_by_one(tokenizer):
    for one, text in zip(tokenizer.encode_batch([*CORPUS, HARD]), [*CORPUS, HARD], strict=True):
        np.testing.assert_array_equal(one, tokenizer.encode(text))


def test_bpe_is_deterministic_and_has_the_size_asked_for(bpe, tmp_path):
    again = train_bpe(iter(CORPUS), 300)
    assert again.digest == bpe.digest
    assert bpe.vocab_size == len(bpe.token_bytes) == 300
    assert bpe.encode("".join(CORPUS)).max() == 299  # every id was learnt
    assert len(bpe.encode("the cat")) < len("the cat")
    bpe.save(tmp_path / "tokenizer.json")
    config = TokenizerConfig("bpe", vocab_size=300)
    loaded = load_tokenizer(config, tmp_path / "tokenizer.json")
    assert loaded.digest == bpe.digest
    assert loaded.vocab_size == vocab_size_of(config)
    np.testing.assert_array_equal(loaded.encode(HARD), bpe.encode(HARD))


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_training_sees_texts_not_their_order(kind):
    """So that two hosts which prepare the same corpus agree."""
    config = TokenizerConfig(kind, vocab_size=262)
    tokenizer = train(config, CORPUS)
    assert train(config, reversed(CORPUS)).digest == tokenizer.digest
    assert tokenizer.vocab_size == vocab_size_of(config) == 262


@settings(max_examples=100, deadline=None)
@given(several=st.lists(texts | st.text(st.characters(max_codepoint=127), max_size=20), max_size=4))
def test_words_of_ascii_are_counted_as_the_library_counts_them(several):
    split = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str
    expected = Counter(word for text in several for word, _ in split(text))
    assert count_words(several) == Counter({word: n for word, n in expected.items() if len(word) <= LONGEST})


def test_unigram_cuts_words_into_the_likeliest_tokens():
    """The likeliest of all cuts, by brute force."""
    tokenizer = train_unigram(["abab abc cab ababab bcabc " * 20], 262)
    scores = dict(json.loads(tokenizer._spec)["model"]["vocab"])

    def best(word):
        return max(
            (
                scores[word[:at]] + (best(word[at:]) if word[at:] else 0.0)
                for at in range(1, len(word) + 1)
                if word[:at] in scores
            ),
        )

    for word in ("ababab", "abc", "cabab", "bbcac"):
        cut = [tokenizer.decode([i]) for i in tokenizer.encode(word).tolist()]
        assert sum(scores[piece] for piece in cut) == pytest.approx(best(word))


def test_a_small_corpus_leaves_ids_unused():
    small = train_bpe(["ab ab"], 1000)
    assert small.vocab_size == len(small.token_bytes) == 1000
    assert small.decode([999]) == ""


def test_file_counts_holes_and_is_kept(from_file, tmp_path):
    assert from_file.vocab_size == 401
    (added,) = from_file.encode("猫が")
    assert from_file.token_bytes[added] == len("猫が".encode())
    from_file.save(tmp_path / "saved.json")
    config = TokenizerConfig("file", path=str(tmp_path / "saved.json"))
    assert vocab_size_of(config) == 401
    gone = TokenizerConfig("file", path=str(tmp_path / "gone.json"))
    assert load_tokenizer(gone, tmp_path / "saved.json").digest == from_file.digest


def test_what_begins_a_sequence_is_known_and_not_encoded(bpe, from_file):
    assert ByteTokenizer().begin_ids == bpe.begin_ids == ()
    assert from_file.begin_ids == (0,)  # its template puts </s> in front
    assert 0 not in from_file.encode("the cat")


def test_sentencepiece_tokens_are_counted_by_their_text():
    from tokenizers import models

    vocab = [("<unk>", 0.0), ("</s>", 0.0), ("▁the", -1.0), ("猫", -2.0), ("<0xE7>", -3.0)]
    tokenizer = JsonTokenizer(Tokenizer(models.Unigram(vocab, 0, True)).to_str(), "sentencepiece")
    assert tokenizer.eos_id == 1
    assert tokenizer.token_bytes[1:].tolist() == [0, 4, 3, 1]


def test_bytes():
    tokenizer = ByteTokenizer()
    assert (tokenizer.vocab_size, tokenizer.eos_id, vocab_size_of(TokenizerConfig())) == (256, 0, 256)
    assert tokenizer.encode("é").tolist() == [0xC3, 0xA9]
    assert tokenizer.decode([0xC3]) == "\ufffd"
    assert load_tokenizer(TokenizerConfig()).digest == tokenizer.digest


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "word"}, "bytes, bpe, unigram, file"),
        ({"kind": "bpe", "vocab_size": 256}, "at least 257"),
        ({"kind": "unigram", "vocab_size": 256}, "kind=unigram needs at least 257"),
        ({"kind": "file"}, "tokenizer.path"),
    ],
)
def test_config_mistakes(options, message):
    with pytest.raises(ValueError, match=message):
        TokenizerConfig(**options)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"{", "not a tokenizer.json"),
        (b"[]", "not a tokenizer.json"),
        (b'{"model": {"vocab": {}}}', "not a tokenizer.json"),
        (b'{"model": {"vocab": {"a": 0}}}', "not a tokenizer.json"),
        (b'{"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 0}]}', "not a tokenizer.json"),
        (b"\xff", "not UTF-8 at byte 0"),
    ],
)
def test_faulty_files(tmp_path, content, message):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_tokenizer(TokenizerConfig("file", path=str(path)))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_added_tokens_that_the_library_would_number_otherwise(bpe):
    spec = json.loads(bpe._spec)
    spec["added_tokens"].append({**spec["added_tokens"][0], "id": 7, "content": "<more>"})
    with pytest.raises(ValueError, match="added tokens do not follow"):
        JsonTokenizer(json.dumps(spec), "mine.json")


def test_a_file_without_an_end_of_document(bpe):
    with pytest.raises(ValueError, match="no end-of-document token") as caught:
        JsonTokenizer(bpe._spec.replace("<|endoftext|>", "<start>"), "mine.json")
    assert all(name in str(caught.value) for name in EOS_NAMES)
