"""Near-duplicates in real text: what MinHash in bands finds, against comparing every pair."""

import json
import random
from collections import Counter, defaultdict

import pytest

from data.cleaning.near import bands_for, jaccard, runs
from data.cleaning.run import Cleaning, clean
from data.cleaning.steps import Steps
from data.corpus import DataConfig, Document, documents

THRESHOLD = 0.8
PLANTED = 2000


def edited(text: str, rng: random.Random) -> str:
    """The text with some of its words replaced, dropped or doubled."""
    words, share = text.split(), rng.uniform(0.0, 0.06)
    changed = []
    for word in words:
        if rng.random() >= share:
            changed.append(word)
        elif (kind := rng.randrange(3)) == 0:
            changed.append(rng.choice(words))
        elif kind == 1:
            changed += [word, word]
    return " ".join(changed)


@pytest.fixture(scope="module")
def reviews() -> list[Document]:
    """All reviews, with edited copies of some of them planted in between."""
    rng = random.Random(1)
    own = [document for document in documents(DataConfig("movie_reviews")) if len(document.text) > 200]
    planted = [Document(f"planted {i}", edited(rng.choice(own).text, rng)) for i in range(PLANTED)]
    mixed = [*own, *planted]
    rng.shuffle(mixed)
    return mixed


def similar_pairs(sets: list[set[str]], least: float) -> dict[int, list[tuple[int, float]]]:
    """For each document those before it that are at least so similar: all pairs with one run in common are compared."""
    where, found = defaultdict(list), {}
    for number, own in enumerate(sets):
        shared = Counter(other for run in own for other in where[run])
        found[number] = []
        for other, count in shared.items():
            similarity = count / (len(own) + len(sets[other]) - count)
            if similarity >= least:
                assert similarity == pytest.approx(jaccard(own, sets[other]))
                found[number].append((other, similarity))
        for run in own:
            where[run].append(number)
    return found


def test_nearly_all_near_duplicates_are_found_and_nothing_else(reviews, tmp_path):
    clean(reviews, tmp_path, Cleaning("reviews", Steps(near=THRESHOLD)), lambda done: None)
    names = {document.name: number for number, document in enumerate(reviews)}
    removed = {names[json.loads(line)["id"]] for line in (tmp_path / "removed.jsonl").open("rb")}
    pairs = similar_pairs([runs(document.text) for document in reviews], THRESHOLD)
    expected, kept = set(), set()
    for number in range(len(reviews)):  # the first of those alike is kept
        (expected if any(other in kept for other, _ in pairs[number]) else kept).add(number)
    recall = len(removed & expected) / len(expected)
    wrong = [number for number in removed if not pairs[number]]
    print(f"{len(reviews):,} documents, {len(expected):,} near-duplicates, found {len(removed):,}: recall {recall:.4f}")
    assert len(expected) > PLANTED / 4
    assert recall >= 0.99
    assert not wrong
    # what could be found at the threshold, by the arithmetic of bands, is what is found
    assert bands_for(THRESHOLD).chance(THRESHOLD) >= 0.99
