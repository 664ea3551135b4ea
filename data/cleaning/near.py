"""Near-duplicates: documents that share most of their runs of words.

The measure is Jaccard's, |A and B| / |A or B|, of the sets of runs of `RUN` words. MinHash signatures in bands find the
few earlier documents that could be near a new one (Broder 1997; Leskovec et al., Mining of Massive Datasets, ch. 3);
these are then compared for good, so that nothing is removed by an estimate.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

from data.cleaning.words import runs_of, words_of

RUN = 5  # words
VALUES = 128  # of a signature at most
SEED = 1
FOUND = 0.99  # of the pairs that are just near enough: how many must become candidates
MOST = 100  # candidates that a document is compared with, the earliest first
REMEMBERED = 1024  # documents whose runs are kept at hand


class Bands(NamedTuple):
    """A signature is cut into `bands` of `rows` values; documents with one band alike are candidates."""

    bands: int
    rows: int

    @property
    def values(self) -> int:
        """How many values a whole signature has."""
        return self.bands * self.rows

    def chance(self, similarity: float) -> float:
        """That two documents so similar become candidates: 1 - (1 - s^rows)^bands."""
        return 1 - (1 - similarity**self.rows) ** self.bands


def bands_for(threshold: float) -> Bands:
    """The longest bands, which let the fewest others through, that still find `FOUND` of the pairs at the threshold."""
    choices = (Bands(VALUES // rows, rows) for rows in range(VALUES, 0, -1))
    return next((bands for bands in choices if bands.chance(threshold) >= FOUND), Bands(VALUES, 1))


def runs(text: str) -> set[str]:
    """What documents are compared by."""
    return set(runs_of(words_of(text), RUN))


def jaccard(one: set, other: set) -> float:
    """The Jaccard similarity |A and B| / |A or B| of two sets, 0 to 1; 0 where nothing is in both."""
    both = len(one & other)
    return both / (len(one) + len(other) - both) if both else 0.0


class NearIndex:
    """The documents that were kept so far. text_of: the text of a kept document, by its number."""

    def __init__(self, threshold: float, text_of: Callable[[int], str]):
        from rensa import RMinHashLSH

        bands = bands_for(threshold)
        self._threshold, self._text_of = threshold, text_of
        self._index = RMinHashLSH(threshold, bands.values, bands.bands)
        self._runs: OrderedDict[int, set] = OrderedDict()
        self.compared = 0
        self.cut_short = 0  # documents with more candidates than were compared

    def find(self, sketch, text: str) -> tuple[int, float] | None:
        """The first kept document that is near enough, and how similar it is."""
        candidates = sorted(self._index.query(sketch))
        self.cut_short += len(candidates) > MOST
        own = runs(text) if candidates else set()
        for number in candidates[:MOST]:
            self.compared += 1
            similarity = jaccard(own, self._runs_of(number))
            if similarity >= self._threshold:
                return number, similarity
        return None

    def add(self, number: int, sketch) -> None:
        """Another document that is kept."""
        self._index.insert(number, sketch)

    def _runs_of(self, number: int) -> set:
        if number not in self._runs:
            self._runs[number] = runs(self._text_of(number))
            if len(self._runs) > REMEMBERED:
                self._runs.popitem(last=False)
        self._runs.move_to_end(number)
        return self._runs[number]
