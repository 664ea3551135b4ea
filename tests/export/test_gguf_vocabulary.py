"""Tokenizers in GGUF files: the same tokens when they are read back; what llama.cpp does not know is refused."""

import json

import gguf
import pytest

from data.tokenizer import ByteTokenizer, JsonTokenizer, TokenizerConfig, load_tokenizer, train_bpe, train_unigram
from data.tokenizers.patterns import WORDS
from export.gguf_file import write_tokenizer
from export.gguf_vocabulary import vocabulary_of

TEXT = "def f(x):\n\treturn x ** 2  # naïve, 数, 12345 <|endoftext|> Isn't it?"


def read_back(path, vocabulary):
    writer = gguf.GGUFWriter(path, "llama")
    write_tokenizer(writer, vocabulary)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return load_tokenizer(TokenizerConfig("file", path=str(path)))


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_a_text_has_the_same_tokens(tmp_path, kind):
    own = ByteTokenizer() if kind == "bytes" else train_bpe([TEXT * 3], 300)
    read = read_back(tmp_path / "v.gguf", vocabulary_of(own, own.vocab_size + 3))
    assert read.encode(TEXT).tolist() == own.encode(TEXT).tolist()
    assert (read.eos_id, read.vocab_size, read.decode(read.encode(TEXT))) == (own.eos_id, own.vocab_size + 3, TEXT)


@pytest.mark.parametrize("pre", ["smollm", "llama-bpe", "qwen2", "gpt-4o"])
def test_published_ways_to_cut_words_keep_their_names(tmp_path, pre):
    spec = json.loads(read_back(tmp_path / "v.gguf", vocabulary_of(train_bpe([TEXT], 280), 280)).as_json())
    cuts = [
        {"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False} for p in WORDS[pre].patterns
    ]
    plain = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*cuts, plain]}
    spec["model"]["ignore_merges"] = WORDS[pre].whole
    found = vocabulary_of(JsonTokenizer(json.dumps(spec), pre), 280).pre
    assert WORDS[found] == WORDS[pre]


def test_other_kinds_are_refused():
    with pytest.raises(ValueError, match="gguf cannot hold a tokenizer of kind Unigram"):
        vocabulary_of(train_unigram([TEXT * 3], 300), 300)
    spec = json.loads(train_bpe([TEXT], 280).as_json())
    spec["normalizer"] = {"type": "NFC"}
    with pytest.raises(ValueError, match="it rewrites texts"):
        vocabulary_of(JsonTokenizer(json.dumps(spec), "nfc"), 280)
