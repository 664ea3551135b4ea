"""One small tokenizer of each kind that publishes models: how words, spaces and bytes are spelled differs."""

import json

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from data.tokenizer import JsonTokenizer, train_bpe

CORPUS = ["the cat sat on the mat, it's the hat", "def f(x):\n    return x + 1\n", "naïve café 😀 猫が好き"] * 3
# Joined emoji, combining marks, a letter that is two, marks that turn the direction, U+FFFD itself, a lone NUL.
HARD = "a b  c \u200d👩‍👩‍👧 e\u0301 ﬁ \u202e\u202d ا\u0644 \ufffd\ufffd x\0y 😀猫 \r\n\t ▁ ##ing <0xE4> n't ."


def trained(model, trainer, pre_tokenizer, decoder, normalizer=None) -> JsonTokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoder
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.train_from_iterator([*CORPUS, HARD], trainer=trainer)
    return JsonTokenizer(tokenizer.to_str(), "trained")


def metaspace() -> JsonTokenizer:
    """SentencePiece's Unigram, as in T5."""
    trainer = trainers.UnigramTrainer(
        vocab_size=80, show_progress=False, special_tokens=["</s>", "<unk>"], unk_token="<unk>"
    )
    return trained(models.Unigram(), trainer, pre_tokenizers.Metaspace(), decoders.Metaspace())


def word_piece() -> JsonTokenizer:
    """As in BERT."""
    trainer = trainers.WordPieceTrainer(vocab_size=90, special_tokens=["[SEP]", "[UNK]"], show_progress=False)
    model, normalizer = models.WordPiece(unk_token="[UNK]"), normalizers.BertNormalizer(lowercase=False)
    return trained(model, trainer, pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(), normalizer)


def word_ends() -> JsonTokenizer:
    """Words end with a mark of their own, as in the first GPT."""
    trainer = trainers.BpeTrainer(
        vocab_size=90, show_progress=False, special_tokens=["</s>"], end_of_word_suffix="</w>"
    )
    model = models.BPE(end_of_word_suffix="</w>")
    return trained(model, trainer, pre_tokenizers.WhitespaceSplit(), decoders.BPEDecoder("</w>"))


def byte_fallback() -> JsonTokenizer:
    """As in Llama 2: words with a mark for the space before them, and a token for each byte."""
    words = [*"abcdefghijt▁.,", "▁c", "at", "猫"]
    vocabulary = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    merges = [("▁", "c"), ("a", "t")]
    model = models.BPE({word: i for i, word in enumerate(vocabulary)}, merges, byte_fallback=True, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["</s>"])
    return JsonTokenizer(tokenizer.to_str(), "byte fallback")


def byte_level() -> JsonTokenizer:
    """Byte-level BPE with an added word beyond its bytes."""
    spec = json.loads(train_bpe([*CORPUS, HARD], 300)._spec)
    spec["added_tokens"].append({**spec["added_tokens"][0], "id": 300, "content": "猫が", "special": False})
    return JsonTokenizer(json.dumps(spec), "byte level")
