"""What an evaluation set holds, so that no document is trained on that has some of it in it."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from data.cleaning.words import runs_of, words_of
from data.corpus import Document

SHORTEST = 5  # words: what is shorter is found everywhere


@dataclass
class Evaluation:
    """The runs of `ngram` words of an evaluation set; of a shorter document, of `SHORTEST` words at least, the whole.

    (Brown et al. 2020, appendix C, with runs of 13 words.)
    """

    ngram: int
    names: list[str] = field(default_factory=list)  # of its documents
    runs: dict[int, dict[str, int]] = field(default_factory=dict)  # by their length: run -> number of a document
    too_short: int = 0  # documents that cannot be looked for

    def find(self, words: list[str]) -> tuple[str, int] | None:
        """The first run of a text that the set holds, and the number of the document there."""
        for length, known in self.runs.items():
            for run in runs_of(words, length):
                if run in known:
                    return run, known[run]
        return None


def evaluation(documents: Iterable[Document], ngram: int) -> Evaluation:
    """An evaluation set, read. Raises ValueError where it has nothing to look for."""
    found = Evaluation(ngram)
    for document in documents:
        if not isinstance(document.text, str):
            raise ValueError(f"--against: {document.name} holds tokens, and texts are compared")
        words, number = words_of(document.text), len(found.names)
        found.names.append(document.name)
        if len(words) < min(SHORTEST, ngram):
            found.too_short += 1
            continue
        known = found.runs.setdefault(min(ngram, len(words)), {})
        for run in runs_of(words, ngram):
            known.setdefault(run, number)
    if not found.runs:
        raise ValueError(
            f"--against: none of {len(found.names)} documents has {min(SHORTEST, ngram)} words to look for"
        )
    found.runs = dict(sorted(found.runs.items(), reverse=True))
    return found
