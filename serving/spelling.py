"""Single tokens as clients see them: in log-probabilities, and what /tokenize tells."""

import codecs
from functools import lru_cache

from data.tokenizer import Tokenizer


class Spelling:
    """How the tokens of a tokenizer are spelled. No two ordinary tokens are spelled alike: clients use them as keys."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._specials = {i: token for token, i in getattr(tokenizer, "specials", {}).items()}
        # tokens that stand for text of their own ("▁the"): a decoder drops the space of the first
        words = tokenizer.vocab() if hasattr(tokenizer, "vocab") else {}
        self._words = {i: word for word, i in words.items()}
        self.text = lru_cache(65536)(self._text)

    def special(self, name: str) -> int | None:
        """The id of a special token, as it is published."""
        return next((i for i, token in self._specials.items() if token == name), None)

    def name_of(self, token: int | None) -> str | None:
        """The published name of a special token."""
        return self._specials.get(token)

    def _text(self, token: int) -> str:
        raw = self.bytes(token)
        if token in self._specials:
            return self._specials[token]
        if raw is None:
            return self._words.get(token, "").replace("▁", " ")
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def bytes(self, token: int) -> bytes | None:
        """The bytes that a token adds to a text; None where that depends on what stands beside it."""
        return self._tokenizer.bytes_of(token)


class Offsets:
    """Where each token of a text begins, in characters of the text."""

    def __init__(self, spelling: Spelling, at: int = 0):
        self._spelling, self._at = spelling, at
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def skip(self, text: str) -> None:
        """A text that stands before."""
        self._at += len(text)

    def push(self, token: int) -> int:
        """The place of the next token."""
        at = self._at
        raw = self._spelling.bytes(token)
        self._at += len(self._spelling.text(token)) if raw is None else len(self._decoder.decode(raw))
        return at
