"""Training of a byte-level unigram tokenizer, with SentencePiece.

The trainer of the `tokenizers` library gives another vocabulary each time it is run (its counts lie in a hash table
with a random order), so that two hosts which prepare the same corpus would not agree. SentencePiece's does not, with a
fixed number of threads.
"""

import contextlib
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tokenizers import pre_tokenizers

from data.words import ASCII_WORDS, SEPARATORS
from runtime import leave

LONGEST = 256  # characters of a word: what is longer is no word, and costs its square
HIDDEN = [*range(0x21), 0x7F]  # characters of ASCII that GPT-2 spells otherwise, in the order of its others
SPELLED = {code: chr(256 + number) for number, code in enumerate(HIDDEN)}


def unigram_pieces(texts: Iterable[str], size: int) -> list[tuple[str, float]]:
    """At most `size` tokens, spelled by GPT-2's characters for bytes, with their log-probabilities; every byte is one.

    The same texts give the same tokens, in any order. (Kudo 2018, "Subword Regularization".)
    Raises ValueError without the package sentencepiece.
    """
    try:
        import sentencepiece
    except ImportError:
        raise ValueError(
            "tokenizer.kind=unigram needs the package sentencepiece: make setup EXTRAS=tokenizers"
        ) from None
    words = count_words(texts)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words.update(alphabet)  # so that each is a token
    folder = tempfile.mkdtemp()
    remove = lambda: shutil.rmtree(folder, ignore_errors=True)
    with contextlib.ExitStack() as stack:
        stack.callback(remove)
        stack.enter_context(leave.on_leaving(remove))
        counts = Path(folder, "words.tsv")
        lines = (f"{word}\t{count}\n" for word, count in sorted(words.items()))
        counts.write_text("".join(lines), encoding="utf-8")
        sentencepiece.SentencePieceTrainer.train(
            input=str(counts),
            input_format="tsv",
            model_prefix=str(Path(folder, "unigram")),
            model_type="unigram",
            vocab_size=size + 1,  # with its own unknown token
            hard_vocab_limit=False,  # a small corpus has fewer
            character_coverage=1.0,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            split_by_unicode_script=False,
            split_by_number=False,
            max_sentence_length=8 * LONGEST,
            num_threads=1,  # another number would add up the counts in another order
            bos_id=-1,
            eos_id=-1,
            minloglevel=2,
        )
        model = sentencepiece.SentencePieceProcessor(model_file=str(Path(folder, "unigram.model")))
        ids = [i for i in range(model.vocab_size()) if not model.is_unknown(i)]
        pieces = [(model.id_to_piece(i), model.get_score(i)) for i in ids]
    known = {piece for piece, _ in pieces}
    least = min(score for _, score in pieces) - 1
    missing = [(byte, least) for byte in alphabet if byte not in known]
    return _without_the_rarest(pieces, len(pieces) + len(missing) - size) + missing


def _without_the_rarest(pieces: list[tuple[str, float]], count: int) -> list[tuple[str, float]]:
    """All but the `count` least likely of those that are longer than a byte."""
    longer = [i for i, (piece, _) in enumerate(pieces) if len(piece) > 1]
    left_out = set(longer[len(longer) - count :]) if count > 0 else set()
    return [piece for i, piece in enumerate(pieces) if i not in left_out]


def count_words(texts: Iterable[str]) -> Counter:
    """How often each word of the texts occurs, spelled by GPT-2's characters for bytes."""
    plain, counts, find = Counter(), Counter(), re.compile(ASCII_WORDS).findall
    split = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str
    for text in texts:
        if text.isascii() and not any(separator in text for separator in SEPARATORS):
            plain.update(find(text))  # five times as fast
        else:
            counts.update(word for word, _ in split(text))
    for word, count in plain.items():
        counts[word.translate(SPELLED)] += count
    return Counter({word: count for word, count in counts.items() if len(word) <= LONGEST})
