"""The tokenizer that a GGUF file carries in its metadata, as a tokenizer.json.

Two kinds of tokenizer.ggml.model: `gpt2`, byte-level BPE with its merges, whose way to cut words is named by
tokenizer.ggml.pre; and `llama`, SentencePiece's BPE, where of all neighbours those are joined first whose token has the
highest score. (github.com/ggml-org/ggml, docs/gguf.md.)
"""

from collections.abc import Iterator
from pathlib import Path

from data.tokenizers.patterns import WORDS, added_token, byte_level_spec, spec
from runtime.gguf import read_header

UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6  # of tokenizer.ggml.token_type; 1 is a word, 5 unused
SPACE = "▁"
# The one merge of a vocabulary without merges, which llama.cpp does not read; of characters that stand for no byte.
NEVER = "\u4e00 \u4e01"


# ---- from metadata to a tokenizer.json ---------------------------------------------------------------------------


def gguf_spec(path: Path) -> str:
    """The tokenizer.json of a GGUF file. Raises ValueError where it holds no tokenizer, or one of another kind."""
    metadata = read_header(path).metadata
    found = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    kind = found.get("model")
    kinds = {"gpt2": _byte_level, "llama": _sentencepiece}
    if kind not in kinds:
        raise ValueError(f"{path}: tokenizer.ggml.model={kind}; read are {' and '.join(kinds)}")
    tokens, types = found.get("tokens"), found.get("token_type")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise ValueError(f"{path}: no tokens in tokenizer.ggml.tokens")
    found["token_type"] = types = [1] * len(tokens) if types is None else types
    for name in ("token_type", "scores") if kind == "llama" else ("token_type",):
        if not isinstance(found.get(name), list) or len(found[name]) != len(tokens):
            raise ValueError(f"{path}: tokenizer.ggml.{name} is not a list of {len(tokens):,} numbers, one a token")
    begin = found.get("bos_token_id") if found.get("add_bos_token", kind == "llama") else None
    if begin is not None and not 0 <= begin < len(tokens):
        raise ValueError(f"{path}: tokenizer.ggml.bos_token_id={begin} is not one of {len(tokens):,} tokens")
    return kinds[kind](found, path, None if begin is None else tokens[begin])


def _added(found: dict) -> list[dict]:
    special = {UNKNOWN: True, CONTROL: True, USER_DEFINED: False}
    pairs = enumerate(zip(found["tokens"], found["token_type"], strict=True))
    return [added_token(i, token, special[kind]) for i, (token, kind) in pairs if kind in special and token]


def _byte_level(found: dict, path: Path, begin: str | None) -> str:
    pre, merges = found.get("pre", "gpt-2"), found.get("merges")
    if pre not in WORDS:
        raise ValueError(f"{path}: tokenizer.ggml.pre={pre} is not known; known are {' '.join(WORDS)}")
    vocab = {token: i for i, token in enumerate(found["tokens"])}
    merges = [] if merges == [NEVER] else merges
    pairs = [tuple(merge.split(" ")) for merge in merges] if isinstance(merges, list) else None
    if pairs is None or not all(len(pair) == 2 and vocab.keys() >= {*pair, "".join(pair)} for pair in pairs):
        raise ValueError(f"{path}: tokenizer.ggml.merges is not a list of pairs of its tokens")
    return byte_level_spec(vocab, pairs, _added(found), WORDS[pre], begin)


def _sentencepiece(found: dict, path: Path, begin: str | None) -> str:
    vocab = {token: i for i, token in enumerate(found["tokens"])}
    has_bytes = sum(kind == BYTE for kind in found["token_type"]) == 256
    unknown = next((token for token, kind in zip(*_pairs(found), strict=True) if kind == UNKNOWN), None)
    prefix = found.get("add_space_prefix", True)
    model = {
        "type": "BPE",
        "unk_token": unknown,
        "fuse_unk": True,
        "byte_fallback": has_bytes,
        "vocab": vocab,
        "merges": [list(merge) for merge in _merges(found)],
    }
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    before = [{"type": "Prepend", "prepend": SPACE}] if prefix else []
    after = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    decoder = {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *after]}
    normalizer = {"type": "Sequence", "normalizers": [*before, spaces]}
    return spec(model, _added(found), decoder, None, normalizer, begin)


def _pairs(found: dict) -> tuple[list[str], list[int]]:
    return found["tokens"], found["token_type"]


def _merges(found: dict) -> Iterator[tuple[str, str]]:
    """What SentencePiece does by scores, as an order of pairs: the highest score of the joined token first."""
    words = {
        token: (score, i)
        for i, (token, kind, score) in enumerate(zip(*_pairs(found), found["scores"], strict=True))
        if kind in (1, USER_DEFINED)
    }
    joined = []
    for token, (score, i) in words.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in words and right in words:
                joined.append((-score, i, -cut, left, right))
    return ((left, right) for *_, left, right in sorted(joined))
