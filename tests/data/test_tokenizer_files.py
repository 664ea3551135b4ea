"""Tokenizers from published files: the ids are those of the program that each kind of file was written for."""

import itertools
import json
import random
import struct

import gguf
import numpy as np
import pytest
import regex
import sentencepiece
from hostile import EXAMPLES, texts
from hypothesis import given, settings
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import GPT2Tokenizer
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from data.tokenizer import BYTE_OF, JsonTokenizer, TokenizerConfig, load_tokenizer, train_bpe, vocab_size_of
from data.tokenizers.patterns import WORDS, byte_level_spec
from runtime.gguf import read_header

CORPUS = [
    "the cat sat on the mat, it's the hat 12345",
    "def f(x):\n    return x + 1\n" * 5,
    "naïve café 😀 猫が好き",
] * 3
CONTROL, USER_DEFINED, BYTE = 3, 4, 6
SENTENCE_TOKENS = 600
ORDER = [*range(3), *random.Random(0).sample(range(3, SENTENCE_TOKENS), SENTENCE_TOKENS - 3)]


def babble(rng: random.Random) -> str:
    """Words of few letters, in which many tokens compete."""
    return " ".join(
        "".join(rng.choices("ab" if rng.random() < 0.5 else "abcd", k=rng.randrange(1, 12))) for _ in range(9)
    )


def opened(path) -> JsonTokenizer:
    config = TokenizerConfig("file", path=str(path))
    tokenizer = load_tokenizer(config)
    assert vocab_size_of(config) == tokenizer.vocab_size
    return tokenizer


def write_gguf(path, tokens, types, **more):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for name, value in more.items():
        getattr(writer, f"add_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def bpe():
    """A vocabulary, by id, and its merges."""
    model = json.loads(train_bpe(CORPUS, 320)._spec)["model"]
    return sorted(model["vocab"], key=model["vocab"].get), [tuple(merge) for merge in model["merges"]]


@pytest.fixture(scope="module")
def gpt2_folder(bpe, tmp_path_factory):
    tokens, merges = bpe
    folder = tmp_path_factory.mktemp("gpt2")
    (folder / "encoder.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "vocab.bpe").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def sentence_model(tmp_path_factory):
    """SentencePiece's BPE that falls back to bytes, as Llama's."""
    path = tmp_path_factory.mktemp("sp") / "model"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*CORPUS, *(babble(random.Random(seed)) for seed in range(300))]),
        model_prefix=str(path),
        model_type="bpe",
        vocab_size=SENTENCE_TOKENS,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_file=f"{path}.model")


@pytest.fixture(scope="module")
def sentence_gguf(sentence_model, tmp_path_factory):
    """With its tokens in another order, so that an id says nothing of a score; `order[new]` is the model's id."""
    sp, ids = sentence_model, ORDER
    kind = lambda i: 2 if sp.is_unknown(i) else CONTROL if sp.is_control(i) else BYTE if sp.is_byte(i) else 1
    more = {"tokenizer_model": "llama", "token_scores": [sp.get_score(i) for i in ids], "bos_token_id": 1}
    path = tmp_path_factory.mktemp("gguf") / "llama.gguf"
    return write_gguf(path, [sp.id_to_piece(i) for i in ids], [kind(i) for i in ids], **more)


def by_model(ids) -> list[int]:
    """The model's ids of those of the file."""
    return [ORDER[i] for i in ids]


# ------------------------------------------------------------------------------------------- GPT-2's two files


@pytest.fixture(scope="module")
def gpt2(gpt2_folder):
    reference = GPT2Tokenizer(vocab=str(gpt2_folder / "encoder.json"), merges=str(gpt2_folder / "vocab.bpe"))
    return opened(gpt2_folder), reference


def check_gpt2(gpt2, text):
    ours, reference = gpt2
    assert ours.encode(text).tolist() == reference.encode(text, split_special_tokens=True)
    assert ours.decode(ours.encode(text)) == text


def test_gpt2_files_hard(gpt2):
    for text in EXAMPLES:
        check_gpt2(gpt2, text)


@settings(max_examples=100, deadline=None)
@given(text=texts)
def test_gpt2_files_any(gpt2, text):
    check_gpt2(gpt2, text)


def test_gpt2_files_have_other_names(gpt2_folder, tmp_path):
    for old, new in (("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt")):
        (tmp_path / new).write_bytes((gpt2_folder / old).read_bytes())
    assert opened(tmp_path).digest == opened(gpt2_folder).digest
    opened(gpt2_folder).save(tmp_path / "tokenizer.json")  # is preferred
    (tmp_path / "vocab.json").write_text("broken")
    assert opened(tmp_path).digest == opened(gpt2_folder).digest


# ------------------------------------------------------------------------------------------------------- GGUF


@pytest.mark.parametrize("pre", sorted(set(WORDS)))
def test_gguf_byte_level(bpe, tmp_path, pre):
    """It gives the ids of a plain reading of the format: cut by each pattern in turn, merge the earliest pair."""
    tokens, merges = bpe
    types = [CONTROL if token == "<|endoftext|>" else 1 for token in tokens]
    more = {"tokenizer_model": "gpt2", "tokenizer_pre": pre, "token_merges": [f"{a} {b}" for a, b in merges]}
    tokenizer = opened(write_gguf(tmp_path / "x.gguf", tokens, types, **more))
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    spell = {byte: character for character, byte in BYTE_OF.items()}
    for text in EXAMPLES:
        pieces = [text]
        for pattern in WORDS[pre].patterns:
            pieces = [part for piece in pieces for part in cut(regex.compile(pattern), piece)]
        expected = []
        for piece in pieces:
            word = [spell[byte] for byte in piece.encode()]
            if WORDS[pre].whole and "".join(word) in tokens:
                word = ["".join(word)]
            while len(word) > 1:
                pair = min(itertools.pairwise(word), key=lambda p: ranks.get(p, 1 << 30))
                if pair not in ranks:
                    break
                at = next(i for i in range(len(word)) if tuple(word[i : i + 2]) == pair)
                word[at : at + 2] = ["".join(pair)]
            expected += [tokens.index(token) for token in word]
        assert tokenizer.encode(text).tolist() == expected
        assert tokenizer.decode(expected) == text


def published(pre: str):
    """How the tokenizer.json of such a family cuts words, as others write it."""
    as_gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), as_gpt2])
    others = {"stablelm2": "qwen2", "chatglm-bpe": "llama-bpe"}
    if pre in {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}:
        return digits
    if pattern := GGUF_PRE_TOKENIZER_SPLITS.get(others.get(pre, pre)):
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    assert pre in {"gpt-2", "phi-2", "mpt", "olmo", "jais", "roberta-bpe", "jina-v2-code", "gigachat"}
    return as_gpt2


@pytest.mark.parametrize("pre", sorted(WORDS))
def test_words_are_cut_as_published(pre):
    spec = json.loads(byte_level_spec({"a": 0}, [], [], WORDS[pre]))
    ours = Tokenizer(models.BPE())
    ours = Tokenizer.from_str(json.dumps(json.loads(ours.to_str()) | {"pre_tokenizer": spec["pre_tokenizer"]}))
    for text in [*EXAMPLES, "I'VE 1234567 ÀÉa aÀb\u0300c  \n\n x", "don't WE'LL/\n//y", "१२३ ⅷ²"]:
        assert ours.pre_tokenizer.pre_tokenize_str(text) == published(pre).pre_tokenize_str(text)


def test_every_family_that_transformers_knows_is_known():
    assert GGUF_PRE_TOKENIZER_SPLITS.keys() <= WORDS.keys()


def cut(pattern, text):
    """Its matches, and what lies between them."""
    at = 0
    for match in pattern.finditer(text):
        yield from filter(None, (text[at : match.start()], match[0]))
        at = match.end()
    yield from filter(None, (text[at:],))


def test_gguf_sentencepiece_hard(sentence_model, sentence_gguf):
    tokenizer = opened(sentence_gguf)
    for text in [*EXAMPLES, *(babble(random.Random(seed)) for seed in range(1000, 1500))]:
        if "\0" not in text:  # ends a text for SentencePiece
            assert by_model(tokenizer.encode(text)) == sentence_model.encode(text)
            assert tokenizer.decode(tokenizer.encode(text)) == text.replace("▁", " ")


@settings(max_examples=200, deadline=None)
@given(text=texts)
def test_gguf_sentencepiece_any(sentence_model, sentence_gguf, text):
    text = text.replace("\0", "")
    assert by_model(opened(sentence_gguf).encode(text)) == sentence_model.encode(text)


def test_gguf_user_defined_tokens_are_found_and_control_tokens_are_not(bpe, tmp_path):
    tokens, merges = [*bpe[0], "<think>", "<|im_end|>"], bpe[1]
    types = [*([1] * len(bpe[0])), USER_DEFINED, CONTROL]
    more = {"tokenizer_model": "gpt2", "tokenizer_pre": "qwen2", "token_merges": [f"{a} {b}" for a, b in merges]}
    tokenizer = opened(write_gguf(tmp_path / "x.gguf", tokens, types, **more))
    ids = tokenizer.encode("<think><|im_end|>").tolist()
    assert ids[0] == len(bpe[0])
    assert len(bpe[0]) + 1 not in ids
    assert tokenizer.decode(ids) == "<think><|im_end|>"


@pytest.mark.parametrize(("flag", "begin"), [(True, (1,)), (False, ()), (None, (1,))])
def test_gguf_says_what_begins_a_sequence(tmp_path, flag, begin):
    """A SentencePiece vocabulary begins with its first special token unless it says otherwise."""
    more = {} if flag is None else {"add_bos_token": flag}
    more |= {"tokenizer_model": "llama", "token_scores": [0.0, 0.0, 0.0, -1.0], "bos_token_id": 1}
    tokenizer = opened(write_gguf(tmp_path / "x.gguf", ["<unk>", "<s>", "</s>", "▁a"], [2, 3, 3, 1], **more))
    assert tokenizer.begin_ids == begin


def test_metadata_is_that_of_the_gguf_package(sentence_gguf):
    reader = gguf.GGUFReader(sentence_gguf)
    expected = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert read_header(sentence_gguf).metadata == expected


def test_any_byte_changed_or_file_cut_short_ends_in_one_line(sentence_gguf, tmp_path):
    """Lengths that lie among them: no memory is taken for what a file cannot hold."""
    content, rng = bytearray(sentence_gguf.read_bytes()), np.random.default_rng(0)
    path = tmp_path / "damaged.gguf"
    for number in range(300):
        damaged = content[:]
        if number % 3 == 0:
            damaged = damaged[: rng.integers(len(content))]
        elif number % 3 == 1:
            damaged[rng.integers(len(content))] ^= 1 << rng.integers(8)
        else:
            at = rng.integers(len(content) - 8)
            damaged[at : at + 8] = struct.pack("<Q", 1 << int(rng.integers(20, 64)))
        path.write_bytes(damaged)
        error = str(path)  # a changed byte of a token does no harm
        try:
            opened(path)
        except ValueError as caught:
            error = str(caught)
        assert str(path) in error
        assert "\n" not in error


# -------------------------------------------------------------------------------------------------- mistakes


def folder_with(tmp_path, **files):
    for name, content in files.items():
        (tmp_path / name.replace("__", ".")).write_text(content)
    return tmp_path


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no tokenizer.json, and no GPT-2 vocabulary"),
        ({"x__gguf": ""}, "tokenizer.path=.*x.gguf"),
        ({"tokenizer__model": ""}, "tokenizer.model alone is not read"),
        ({"vocab__json": "{", "merges__txt": ""}, "not JSON"),
        ({"vocab__json": "[]", "merges__txt": ""}, "not an object"),
        ({"vocab__json": '{"a": 0}', "merges__txt": "a b"}, "line 1 of its merges"),
        ({"vocab__json": '{"a": 0}', "merges__txt": ""}, "no end-of-document"),
        (
            {
                "vocab__json": '{"a": 0}',
                "merges__txt": "",
                "tokenizer_config__json": '{"tokenizer_class": "Qwen2Tokenizer"}',
            },
            "Qwen2Tokenizer",
        ),
    ],
)
def test_faulty_folders(tmp_path, files, message):
    with pytest.raises(ValueError, match=message) as caught:
        opened(folder_with(tmp_path, **files))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({}, "tokenizer.ggml.model=None; read are gpt2 and llama"),
        ({"tokenizer_model": "bert"}, "tokenizer.ggml.model=bert"),
        ({"tokenizer_model": "gpt2", "tokenizer_pre": "nobody"}, "tokenizer.ggml.pre=nobody is not known"),
        ({"tokenizer_model": "gpt2"}, "tokenizer.ggml.merges"),
        ({"tokenizer_model": "gpt2", "token_merges": ["a zz"]}, "tokenizer.ggml.merges"),
        ({"tokenizer_model": "llama"}, "tokenizer.ggml.scores"),
        ({"tokenizer_model": "llama", "token_scores": [0.0], "bos_token_id": 7}, "tokenizer.ggml.scores"),
        ({"tokenizer_model": "llama", "token_scores": [0.0, 0.0], "bos_token_id": 7}, "bos_token_id=7"),
    ],
)
def test_faulty_gguf(tmp_path, more, message):
    path = write_gguf(tmp_path / "x.gguf", ["a", "</s>"], [1, 3], **more)
    with pytest.raises(ValueError, match=message) as caught:
        opened(path)
    assert "\n" not in str(caught.value)
