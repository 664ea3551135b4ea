"""Text from tokens as they come: the one way from new ids to text, for samples, `python -m inference` and streams."""

import codecs
from collections.abc import Iterator, Sequence

from data.tokenizer import Tokenizer


class Detokenizer:
    """The text of one sequence's new tokens, piece by piece; the pieces joined are what decoding all at once gives.

    A tokenizer's decoder looks at a token's neighbours: the first one of a text loses its space, bytes of several
    tokens make up one character. New tokens are therefore decoded behind those before them, and a token waits until
    what follows can no longer change its text. No piece holds a half character; one that stays half is left out.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._ids = list(prompt)  # of which those before _start are not needed any more
        self._start, self._read = 0, len(self._ids)  # the text of ids before _read has been given out

    def push(self, ids: Sequence[int]) -> str:
        """The text that these further tokens settle, often empty."""
        self._ids += ids
        end = len(self._ids)
        while end > self._read and self._is_open(end):
            end -= 1
        return self._take(end)

    def finish(self) -> str:
        """The rest of the text, without a half character at its end."""
        end, half = len(self._ids), self._half(len(self._ids))
        while half and end > self._read and len(last := self._tokenizer.bytes_of(self._ids[end - 1])) <= half:
            end, half = end - 1, half - len(last)
        text = self._take(end)
        return text.removesuffix("\ufffd") if half else text  # the last token began with whole characters

    def _take(self, end: int) -> str:
        """The text of the ids from _read to `end`, as it stands behind those before."""
        if end == self._read:
            return ""
        decode, before = self._tokenizer.decode, self._ids[self._start : self._read]
        text, whole = decode(before), decode(self._ids[self._start : end])
        # a broken character right behind the prompt can spoil the prompt's own end in `whole`
        piece = whole[len(text) :] if whole.startswith(text) else decode(self._ids[self._read : end])
        if piece:  # else there may be nothing in these ids that could stand as the first of a text
            self._start = self._read
        self._read = end
        return piece

    def _is_open(self, end: int) -> bool:
        """Whether the next token may change the text of the ids up to `end`."""
        if self._tokenizer.joins_bytes:  # a broken character spoils all bytes beside it
            return any(self._back(end))
        return self._half(end) > 0

    def _half(self, end: int) -> int:
        """Bytes at the end of the ids up to `end` that begin a character and do not complete it."""
        tail = b""
        for piece in self._back(end):
            tail = piece + tail
            if len(tail) >= 3:  # the most that a half character has
                break
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.decode(tail)
        return len(decoder.getstate()[0])

    def _back(self, end: int) -> Iterator[bytes]:
        """The bytes of the tokens before `end`, last one first, as far as tokens stand for bytes."""
        for token in reversed(self._ids[:end]):
            if (piece := self._tokenizer.bytes_of(token)) is None:
                return
            yield piece


def continuation(tokenizer: Tokenizer, prompt: Sequence[int], new: Sequence[int]) -> str:
    """The text of new tokens behind those of a prompt."""
    detokenizer = Detokenizer(tokenizer, prompt)
    return detokenizer.push(new) + detokenizer.finish()


def after_prompt(tokenizer: Tokenizer, prompt: str, ids: Sequence[int], new: Sequence[int]) -> str:
    """The text of new tokens to be printed behind `prompt`, the text whose ids are `ids`.

    Some tokenizers drop the space that a prompt ends with, and give one to the next word: it is printed once.
    """
    text = continuation(tokenizer, ids, new)
    dropped = prompt[-1:].isspace() and not tokenizer.decode(ids)[-1:].isspace()
    return text.removeprefix(" ") if dropped else text
