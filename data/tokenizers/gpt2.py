"""GPT-2's own format: a vocabulary of spelled bytes (encoder.json, vocab.json) and its merges (vocab.bpe, merges.txt).

(Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".)
"""

import json
from pathlib import Path

from data.tokenizers.patterns import WORDS, added_token, byte_level_spec

VOCABULARIES = ("encoder.json", "vocab.json")
MERGES = ("vocab.bpe", "merges.txt")
SPECIAL = ("<|endoftext|>", "<s>", "<pad>", "</s>", "<unk>", "<mask>")  # of GPT-2, and of RoBERTa
CLASSES = ("GPT2Tokenizer", "RobertaTokenizer", "PhiTokenizer", "CodeGenTokenizer", "BartTokenizer")


def gpt2_spec(vocabulary: str, merges: str, settings: dict, folder: Path) -> str:
    """The tokenizer.json of two files' texts. Raises ValueError where they are not of GPT-2's kind or do not agree.

    settings: of tokenizer_config.json, where there is one. folder: for messages.
    """
    kind = str(settings.get("tokenizer_class", CLASSES[0])).removesuffix("Fast")
    if kind not in CLASSES:
        raise ValueError(
            f"{folder}: tokenizer_config.json says {kind}, which cuts words in its own way: give its tokenizer.json "
            f"(a pair of vocabulary and merges is read for {', '.join(CLASSES)})"
        )
    try:
        vocab = json.loads(vocabulary)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{folder}: its vocabulary is not JSON: {error}") from error
    if not isinstance(vocab, dict) or not all(isinstance(i, int) and i >= 0 for i in vocab.values()):
        raise ValueError(f"{folder}: its vocabulary is not an object of tokens and ids")
    declared = settings.get("added_tokens_decoder") or {}
    added = [added_token(int(i), token["content"], bool(token.get("special"))) for i, token in declared.items()]
    known = {token["content"] for token in added}
    added += [added_token(vocab[name], name, True) for name in SPECIAL if name in vocab and name not in known]
    added.sort(key=lambda token: token["id"])
    return byte_level_spec(vocab, _merges(merges, vocab, folder), added, WORDS["gpt-2"])


def _merges(text: str, vocab: dict[str, int], folder: Path) -> list[tuple[str, str]]:
    merges = []
    for number, line in enumerate(text.split("\n"), 1):
        line = line.rstrip("\r")
        if not line or (number == 1 and line.startswith("#version")):
            continue
        pair = tuple(line.split(" "))
        if len(pair) != 2 or not all(part in vocab for part in (*pair, "".join(pair))):
            raise ValueError(f"{folder}: line {number} of its merges, {line[:40]!r}, is not a pair of its vocabulary")
        merges.append(pair)
    return merges
