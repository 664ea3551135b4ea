"""How published byte-level tokenizers cut a text into words before BPE, and the tokenizer.json they make."""

import json
from dataclasses import dataclass

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
QWEN35 = QWEN2.replace(r"\p{L}+|", r"[\p{L}\p{M}]+|").replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]")
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{ENDING}|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{ENDING}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Words:
    """patterns: applied one after the other, each cuts what the one before left. whole: a word that is in the
    vocabulary is one token even where merges would not make it."""

    patterns: tuple[str, ...]
    whole: bool = False


NAMES = {  # how words are cut -> tokenizer.ggml.pre of the GGUF files where it is so
    Words((GPT2,)): "gpt-2 phi-2 mpt olmo jais roberta-bpe jina-v2-code gigachat",
    Words((r"\p{N}", GPT2)): "smollm starcoder refact command-r codeshell exaone minerva-7b",
    Words((LLAMA3,), whole=True): "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral lfm2 midm-2.0 jina-v5-nano",
    Words((LLAMA3,)): "dbrx smaug-bpe chatglm-bpe",
    Words((QWEN2,)): "qwen2 deepseek-r1-qwen stablelm2 megrez kormo f2llmv2",
    Words((QWEN35,)): "qwen35",
    Words((TEKKEN,), whole=True): "tekken",
    Words((GPT4O,)): "gpt-4o llama4 kanana2 talkie minimax-m2",
}
WORDS = {name: words for words, names in NAMES.items() for name in names.split()}


def byte_level_spec(
    vocab: dict[str, int], merges: list[tuple[str, str]], added: list[dict], words: Words, begin: str | None = None
) -> str:
    """The tokenizer.json of a byte-level BPE.

    vocab: token, spelled by GPT-2's characters for bytes -> id. merges: the earlier first. added: see `added_token`.
    begin: the special token that begins a sequence.
    """
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    *before, last = words.patterns
    if last != GPT2:  # which `ByteLevel` has by itself
        before, byte_level = words.patterns, byte_level | {"use_regex": False}
    split = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False} for pattern in before
    ]
    cut = {"type": "Sequence", "pretokenizers": [*split, byte_level]} if split else byte_level
    model = {"type": "BPE", "ignore_merges": words.whole, "vocab": vocab, "merges": [list(merge) for merge in merges]}
    return spec(model, added, byte_level, cut, None, begin)


def spec(
    model: dict,
    added: list[dict],
    decoder: dict,
    pre_tokenizer: dict | None,
    normalizer: dict | None,
    begin: str | None,
) -> str:
    """The text of a tokenizer.json; `begin` is the special token that begins a sequence."""
    processor = None
    if begin is not None:
        first = {"SpecialToken": {"id": begin, "type_id": 0}}
        one, two = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
        ids = {"id": begin, "ids": [model["vocab"][begin]], "tokens": [begin]}
        processor = {"type": "TemplateProcessing", "single": [first, one], "pair": [first, one, two]}
        processor["special_tokens"] = {begin: ids}
    whole = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": processor,
        "decoder": decoder,
        "model": model,
    }
    return json.dumps(whole, ensure_ascii=False)


def added_token(i: int, content: str, special: bool) -> dict:
    """A token that is found as it stands in a text or, a special one, is never found there."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": content, **flags, "special": special}
