"""A tokenizer.json as the metadata of a GGUF file, the inverse of data/tokenizers/gguf.py; byte-level BPE alone."""

import json
from dataclasses import dataclass

from data.tokenizer import Tokenizer
from data.tokenizers.gguf import NEVER
from data.tokenizers.patterns import GPT2, NAMES, Words

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # of tokenizer.ggml.token_type


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer of the kind `gpt2`."""

    pre: str  # the name of how words are cut
    tokens: list[str]
    types: list[int]
    merges: list[str]
    eos: int
    begin: int | None  # the token before every text


def vocabulary_of(tokenizer: Tokenizer, size: int) -> Vocabulary:
    """The vocabulary of a model with so many tokens. Raises ValueError with what llama.cpp does not know."""
    spec = json.loads(tokenizer.as_json())
    model = spec["model"]
    if model.get("type", "BPE") != "BPE":
        raise ValueError(f"gguf cannot hold a tokenizer of kind {model['type']}: only byte-level BPE is written")
    if spec.get("normalizer") or model.get("byte_fallback"):
        raise ValueError("gguf cannot hold this tokenizer: it rewrites texts or falls back to bytes, as SentencePiece")
    pre = _pre(spec.get("pre_tokenizer"), bool(model.get("ignore_merges")))
    if len(tokenizer.begin_ids) > 1 or tokenizer.end_ids:
        raise ValueError("gguf cannot hold this tokenizer: more than one token stands around its texts")
    tokens = [f"[unused {i}]" for i in range(size)]
    types = [UNUSED] * size
    for token, i in model["vocab"].items():
        tokens[i], types[i] = token, NORMAL
    for added in spec.get("added_tokens") or []:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    begin = tokenizer.begin_ids[0] if tokenizer.begin_ids else None
    return Vocabulary(pre, tokens, types, merges or [NEVER], tokenizer.eos_id, begin)


def _pre(cut: dict | None, whole: bool) -> str:
    """The name that llama.cpp has for a way to cut words."""
    steps = [] if cut is None else cut.get("pretokenizers", [cut])
    patterns = [step["pattern"].get("Regex") for step in steps if step["type"] == "Split"]
    byte_level = next((step for step in steps if step["type"] == "ByteLevel"), None)
    known = byte_level is not None and not byte_level.get("add_prefix_space")
    known = known and len(patterns) + 1 == len(steps) and None not in patterns
    if known and byte_level.get("use_regex", True):
        patterns.append(GPT2)
    words = Words(tuple(patterns), whole)
    if known and not patterns:  # each byte for itself: with no merges it does not matter how words are cut
        words = Words((GPT2,))
    if not known or words not in NAMES:
        raise ValueError(f"gguf cannot hold this tokenizer: llama.cpp has no name for its words {patterns}")
    return NAMES[words].split()[0]
