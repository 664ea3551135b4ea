"""The text of one choice as its tokens come, up to the first of its stop strings."""

from collections.abc import Sequence

from data.tokenizer import Tokenizer
from inference.detokenizer import Detokenizer
from inference.requests import Sampling


class Text:
    """Gives text out as soon as it is settled: no half character, and nothing that may yet become a stop string.

    What is given out does not depend on where the borders of tokens are, nor on how many come at a time. The stop
    string that is complete first ends the text, of several that end there the longest; it is not given out.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], sampling: Sampling):
        self._detokenizer = Detokenizer(tokenizer, prompt)
        self._watches = [_Watch(stop) for stop in sampling.stop]
        self._held = ""  # may yet become a stop string
        self._stopped_by = None

    def push(self, tokens: Sequence[int]) -> tuple[str, str | None]:
        """The text that these further tokens settle, often empty, and the stop string that is now complete, if one is.

        Nothing comes after a stop string.
        """
        return ("", self._stopped_by) if self._stopped_by else self._until_stop(self._detokenizer.push(tokens))

    def finish(self) -> tuple[str, str | None]:
        """The rest of the text, when no more tokens come, and the stop string that ends it, if one does."""
        if self._stopped_by:
            return "", self._stopped_by
        text, stopped_by = self._until_stop(self._detokenizer.finish())
        text, self._held = text + self._held, ""
        return text, stopped_by

    def _until_stop(self, new: str) -> tuple[str, str | None]:
        if not self._watches:
            return new, None
        text = self._held + new
        for end, character in enumerate(new, len(self._held) + 1):
            complete = [watch.stop for watch in self._watches if watch.is_complete_with(character)]
            if complete:
                self._stopped_by, self._held = max(complete, key=len), ""
                return text[: end - len(self._stopped_by)], self._stopped_by
        held = max(watch.matched for watch in self._watches)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], None


class _Watch:
    """How much of one stop string the text ends with, character by character (Knuth, Morris and Pratt 1977)."""

    def __init__(self, stop: str):
        self.stop, self.matched = stop, 0
        self._shorter = [0]  # for each beginning of the string: the longest shorter one that it ends with
        for character in stop[1:]:
            self._shorter.append(self._longer(self._shorter[-1], character))

    def is_complete_with(self, character: str) -> bool:
        """Reads one more character of the text."""
        self.matched = self._longer(self.matched, character)
        return self.matched == len(self.stop)

    def _longer(self, matched: int, character: str) -> int:
        while matched and self.stop[matched] != character:
            matched = self._shorter[matched - 1]
        return matched + (self.stop[matched] == character)
