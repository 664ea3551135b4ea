"""A faster way through a byte-level BPE: each word is looked up whole, and only new ones are merged from bytes.

Such a tokenizer cuts a text into words by GPT-2's pattern and merges within each alone, so a word has the same tokens
wherever it stands. A table of words seen before saves nearly all merging: text repeats its words. The tokens are
exactly those of the `tokenizers` library, which tokenises what is new, and every text that these patterns are not sure
about.
"""

import itertools
import json
import re

import numpy as np

SPACE = r" \t\n\r\f\v"
# GPT-2's pattern (Radford et al. 2019) for texts in ASCII.
ASCII_WORDS = rf"'(?:[stmd]|re|ve|ll)| ?[A-Za-z]+| ?[0-9]+| ?[^{SPACE}A-Za-z0-9]+|[{SPACE}]+(?![^{SPACE}])|[{SPACE}]+"
# For others the same, but that whatever stands between spaces and is not all ASCII is taken as one "word", which the
# library may cut further: a space in front of it and the one behind it are borders of words in any case.
OTHER_WORDS = rf" ?(?=[^{SPACE}]*[^\x00-\x7f])[^{SPACE}]+|{ASCII_WORDS}"
# Not safe: spaces outside ASCII, which may touch an ASCII one, and words of a length that a lookahead should not have.
SEPARATORS = "\x1c\x1d\x1e\x1f"  # which Python alone takes for spaces
UNSURE = rf"[{SEPARATORS}\x85\xa0\u1680\u180e\u2000-\u200f\u2028\u2029\u202f\u205f\u3000\ufeff]|[^{SPACE}]{{500}}"
MOST = 2_000_000  # ids in the table; beyond that it begins anew


class WordTable(dict):
    """The number of each word; a new one gets the next, and waits in `new`."""

    def __init__(self):
        super().__init__()
        self.new: list[str] = []

    def __missing__(self, word: str) -> int:
        number = len(self)
        self[word] = number
        self.new.append(word)
        return number


class WordEncoder:
    """Encodes with a tokenizer of the `tokenizers` library; `fits` says whether it is of the kind."""

    def __init__(self, tokenizer, eos_id: int):
        self._tokenizer, self._eos_id = tokenizer, eos_id
        self._ascii, self._other, self._unsure = (re.compile(p) for p in (ASCII_WORDS, OTHER_WORDS, UNSURE))
        self._clear()

    @staticmethod
    def fits(spec: str) -> bool:
        """Whether a tokenizer.json is a byte-level BPE with GPT-2's pattern and nothing before or beside it."""
        settings = json.loads(spec)
        model, before = settings.get("model") or {}, settings.get("pre_tokenizer") or {}
        return (
            (model.get("type"), before.get("type")) == ("BPE", "ByteLevel")
            and not (before.get("add_prefix_space") or settings.get("normalizer") or model.get("dropout"))
            and before.get("use_regex", True)
            and all(token["special"] for token in settings.get("added_tokens") or [])
        )

    def _clear(self) -> None:
        self._table = WordTable()
        self._ids = np.empty(0, np.int32)  # of all words, one behind the other
        self._starts, self._lengths = np.empty(0, np.int64), np.empty(0, np.int64)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """The ids of each text, int32."""
        sure = [self._is_sure(text) for text in texts]
        unsure = iter(self._by_library([text for text, ok in zip(texts, sure, strict=True) if not ok]))
        words = [self._words(text) for text, ok in zip(texts, sure, strict=True) if ok]
        known = iter(self._by_table(words))
        return [next(known if ok else unsure) for ok in sure]

    def _is_sure(self, text: str) -> bool:
        if text.isascii():
            return not any(separator in text for separator in SEPARATORS)
        return self._unsure.search(text) is None

    def _words(self, text: str) -> list[str]:
        return (self._ascii if text.isascii() else self._other).findall(text)

    def _by_library(self, texts: list[str]) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        arrays = (np.array(encoding.ids, np.int32) for encoding in encodings)
        return [ids[ids != self._eos_id] for ids in arrays]

    def _by_table(self, texts: list[list[str]]) -> list[np.ndarray]:
        if len(self._ids) > MOST:
            self._clear()
        counts = [len(words) for words in texts]
        every = itertools.chain.from_iterable(texts)
        numbers = np.fromiter(map(self._table.__getitem__, every), np.int32, sum(counts))
        self._learn()
        lengths = self._lengths[numbers]
        ends = np.cumsum(lengths)
        within = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)
        ids = self._ids[np.repeat(self._starts[numbers], lengths) + within]
        borders = np.append(0, ends)[np.cumsum(counts)] if counts else []
        return np.split(ids, borders[:-1]) if counts else []

    def _learn(self) -> None:
        """Tokenises the words that are new."""
        found = self._by_library(self._table.new)
        lengths = np.array([len(ids) for ids in found], np.int64)
        first = len(self._ids)
        self._ids = np.concatenate([self._ids, *found])
        self._starts = np.append(self._starts, first + np.cumsum(lengths) - lengths)
        self._lengths = np.append(self._lengths, lengths)
        self._table.new = []
