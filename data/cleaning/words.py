"""Texts as words, for comparing them: case, punctuation and spaces do not count."""

import re
import unicodedata

# Scripts that are written without spaces between words: each of their characters is a word of its own.
SPACELESS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
WORD = re.compile(rf"[{SPACELESS}]|[^\W{SPACELESS}]+")


def words_of(text: str) -> list[str]:
    """The words of a text, in order."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return WORD.findall(text.casefold())


def runs_of(words: list[str], length: int) -> list[str]:
    """Every run of so many words; of a shorter text the whole, of none nothing."""
    if len(words) <= length:
        return [" ".join(words)] if words else []
    return [" ".join(run) for run in zip(*(words[start:] for start in range(length)), strict=False)]


def same(text: str) -> str:
    """What two texts share that count as the same: Unicode's composed form, with any space as one."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    return " ".join(text.split())
