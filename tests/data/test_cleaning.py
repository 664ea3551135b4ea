"""Cleaning: nothing is lost or made up, what is alike is found, and the same documents give the same bytes."""

import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data.cleaning.contamination import evaluation
from data.cleaning.near import bands_for, jaccard, runs
from data.cleaning.run import Cleaning, clean
from data.cleaning.steps import Steps
from data.cleaning.words import runs_of, same, words_of
from data.corpus import EMPTY, Document, Skipped

ROOT = Path(__file__).parent.parent.parent
WORDS = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in "bdfgklmnprst"]


def story(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words))


def corpus(seed: int = 0, count: int = 120) -> list[Document]:
    """Stories, some of them again: as they are, with other spaces, with some words changed."""
    rng, texts = random.Random(seed), []
    for _ in range(count):
        texts.append(story(rng, rng.randrange(1, 120)))
        old = rng.choice(texts).split()
        again = [[], [" ".join(old)], ["\n " + "  ".join(old)], [edited(rng, old)]][rng.randrange(4)]
        texts += again
    return [Document(f"doc:{i}", text) for i, text in enumerate(texts)]


def edited(rng: random.Random, words: list[str]) -> str:
    words = list(words)
    for _ in range(rng.randrange(4)):
        words[rng.randrange(len(words))] = rng.choice(WORDS)
    return " ".join(words)


def cleaned(items, folder: Path, steps: Steps, **more) -> tuple[list[dict], list[dict], dict]:
    """What is kept, what is removed, and the report."""
    folder.mkdir()
    facts = clean(items, folder, Cleaning("test", steps, **more), lambda done: None)
    kept, removed = (
        [json.loads(line) for line in (folder / f"{name}.jsonl").open("rb")] for name in ("documents", "removed")
    )
    return kept, removed, facts


def ids(records) -> list[str]:
    return [record["id"] for record in records]


EVERYTHING = Steps(min_chars=30, max_chars=500, exact=True, near=0.8, ngram=8)


def test_every_document_is_kept_or_removed_once_and_counted(tmp_path):
    documents = corpus()
    against = evaluation([Document("exam", documents[7].text)], 8)
    kept, removed, facts = cleaned(documents, tmp_path / "out", EVERYTHING, against=against)
    texts = {document.name: document.text for document in documents}
    assert Counter([*ids(kept), *ids(removed)]) == Counter(list(texts))
    assert all(record["text"] == texts[record["id"]] for record in [*kept, *removed])
    for records in (kept, removed):  # in the order of the source
        assert ids(records) == [name for name in texts if name in {*ids(records)}]
    counts = Counter(record["reason"] for record in removed)
    assert {reason: count["documents"] for reason, count in facts["removed"].items()} == counts
    assert len(counts) == 5
    assert facts["read"]["documents"] == len(documents)
    assert facts["kept"]["documents"] == len(kept)
    assert facts["read"]["bytes"] == sum(len(text.encode()) for text in texts.values())
    assert facts["kept"]["bytes"] + sum(c["bytes"] for c in facts["removed"].values()) == facts["read"]["bytes"]
    page = (tmp_path / "out/report.md").read_text()
    for reason, samples in facts["samples"].items():
        assert 0 < len(samples) <= 5
        assert {s["id"] for s in samples} <= {r["id"] for r in removed if r["reason"] == reason}
        assert all(s["id"] in page for s in samples)


@pytest.mark.parametrize("workers", [2, 3])
def test_the_number_of_workers_does_not_change_a_byte(tmp_path, workers, monkeypatch):
    monkeypatch.setattr("data.cleaning.run.CHUNK", 3000)  # many chunks
    documents = corpus()
    for name, count in (("one", 1), ("many", workers)):
        cleaned(documents, tmp_path / name, EVERYTHING, workers=count)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "many" / file.name).read_bytes()


def test_compressed_files_hold_the_same(tmp_path):
    cleaned(corpus(), tmp_path / "plain", EVERYTHING)
    (tmp_path / "small").mkdir()
    clean(corpus(), tmp_path / "small", Cleaning("test", EVERYTHING, compressed=True), lambda done: None)
    assert {file.name for file in (tmp_path / "small").iterdir()} == {
        *("documents.jsonl.zst", "removed.jsonl.zst", "report.json", "report.md")
    }
    for name in ("documents", "removed"):
        content = zstandard.ZstdDecompressor().decompress((tmp_path / f"small/{name}.jsonl.zst").read_bytes())
        assert content == (tmp_path / f"plain/{name}.jsonl").read_bytes()


# ------------------------------------------------------------------------------------------------- what is alike


def test_the_first_of_exact_duplicates_is_kept(tmp_path):
    texts = ["caf\u00e9 au lait", "other", " cafe\u0301  au\nlait ", "Caf\u00e9 au lait", "other", "caf\u00e9 au lait"]
    documents = [Document(str(i), text) for i, text in enumerate(texts)]
    kept, removed, _ = cleaned(documents, tmp_path / "out", Steps(exact=True))
    assert ids(kept) == ["0", "1", "3"]
    assert [(r["id"], r["of"], r["reason"]) for r in removed] == [(i, of, "duplicate") for i, of in ("20", "41", "50")]


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.95])
def test_near_duplicates_are_those_of_all_pairs(tmp_path, threshold):
    documents = corpus(seed=3, count=200)
    kept, removed, _ = cleaned(documents, tmp_path / "out", Steps(near=threshold))
    sets, first = {}, []
    for document in documents:
        own = runs(document.text)
        if not any(jaccard(own, other) >= threshold for other in sets.values()):
            sets[document.name] = own
            first.append(document.name)
    missed = set(ids(kept)) - set(first)
    assert len(removed) > 40
    assert len(missed) <= 0.02 * len(removed)
    texts = {document.name: document.text for document in documents}
    for record in removed:  # none of them by mistake
        similarity = jaccard(runs(record["text"]), runs(texts[record["of"]]))
        assert similarity >= threshold
        assert record["similarity"] == round(similarity, 4)
        assert record["of"] in ids(kept)


@given(threshold=st.floats(0.3, 1.0))
def test_bands_find_what_is_near_enough(threshold):
    bands = bands_for(threshold)
    assert bands.values <= 128
    assert bands.chance(threshold) >= 0.99
    assert bands.chance(threshold) >= bands.chance(threshold / 2)


@settings(max_examples=200)
@given(one=st.sets(st.integers(0, 8)), other=st.sets(st.integers(0, 8)))
def test_jaccard(one, other):
    union = one | other
    assert jaccard(one, other) == (len(one & other) / len(union) if union else 0.0)
    assert jaccard(one, other) == jaccard(other, one)


def test_words():
    assert words_of("It's  FINE, ﬁne; a_b 12.5 straße") == ["it", "s", "fine", "fine", "a_b", "12", "5", "strasse"]
    assert words_of("猫が好き abc ไทย") == [*"猫が好き", "abc", *"ไทย"]  # each character where there are no spaces
    assert words_of("...") == []
    assert runs_of(["a", "b", "c"], 2) == ["a b", "b c"]
    assert runs_of(["a"], 2) == ["a"]
    assert runs_of([], 2) == []
    assert same(" a\tb\u3000c\n") == "a b c"


def test_texts_without_words_are_not_alike(tmp_path):
    kept, _, _ = cleaned([Document("a", "..."), Document("b", "!!!")], tmp_path / "out", Steps(near=0.5))
    assert ids(kept) == ["a", "b"]


# --------------------------------------------------------------------------------------------- a document alone


def test_bounds_of_length_are_kept(tmp_path):
    documents = [Document(str(n), "é" * n) for n in range(1, 8)]  # characters, not bytes
    kept, removed, _ = cleaned(documents, tmp_path / "out", Steps(min_chars=3, max_chars=5))
    assert ids(kept) == ["3", "4", "5"]
    assert [(r["id"], r["reason"]) for r in removed] == [(n, "too_short" if n < "3" else "too_long") for n in "1267"]


def test_languages(tmp_path):
    texts = {
        "en": "The committee will meet again on Thursday\nto talk about the new library in the old town.",
        "de": "Der Ausschuss trifft sich am Donnerstag wieder,\num über die neue Bibliothek der Altstadt zu sprechen.",
        "fr": "Le comité se réunira de nouveau jeudi pour parler de la nouvelle bibliothèque de la vieille ville.",
        "ja": "委員会は木曜日に再び集まり、旧市街の新しい図書館について話し合います。",
    }
    documents = [Document(code, text) for code, text in texts.items()]
    kept, removed, _ = cleaned(documents, tmp_path / "one", Steps(languages=("en",)))
    assert ids(kept) == ["en"]
    assert all(record["language"] == record["id"] and record["score"] > 0.5 for record in removed)
    assert ids(cleaned(documents, tmp_path / "two", Steps(languages=("ja", "fr")))[0]) == ["fr", "ja"]


def test_contamination_is_a_run_of_words_as_long_as_asked_for(tmp_path):
    exam = "One, two; three four five six seven eight nine ten eleven twelve thirteen fourteen."
    short = "What is the capital of France?"
    against = evaluation([Document("exam", exam), Document("short", short), Document("tiny", "Yes or no?")], 13)
    assert against.too_short == 1
    documents = [
        Document("13", "and ONE two three\nfour - five six seven eight nine ten eleven twelve THIRTEEN too"),
        Document("12", "two three four five six seven eight nine ten eleven twelve thirteen 14"),
        Document("inside", "They asked: what is the capital of France, then?"),
        Document("part", "the capital of France is Paris, and yes or no?"),
    ]
    kept, removed, facts = cleaned(documents, tmp_path / "out", Steps(), against=against)
    assert ids(kept) == ["12", "part"]
    assert [(r["id"], r["evaluation"]) for r in removed] == [("13", "exam"), ("inside", "short")]
    assert removed[0]["run"] == " ".join(words_of(exam)[:13])
    assert facts["against"] == {"documents": 3, "runs": 3, "too_short": 1}


def test_an_evaluation_set_with_nothing_to_look_for():
    with pytest.raises(ValueError, match="none of 1 documents has 5 words"):
        evaluation([Document("a", "too short")], 13)


def test_what_cannot_be_read_is_refused_or_counted(tmp_path):
    items = [Document("a", "x"), Skipped("f:2", "not JSON"), Skipped("f:3", EMPTY)]
    with pytest.raises(ValueError, match="f:2: not JSON; --skip-bad"):
        cleaned(items, tmp_path / "refused", Steps(exact=True))
    kept, removed, facts = cleaned(items, tmp_path / "out", Steps(exact=True), skip_bad=True)
    assert ids(kept) == ["a"]
    assert [(r["id"], r["reason"]) for r in removed] == [("f:2", "unreadable"), ("f:3", "empty")]
    assert facts["read"]["documents"] == 3


# -------------------------------------------------------------------------------------------------- the command


def run(*arguments, **more) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "data", "clean", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **more)


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "in, [1].jsonl"  # a name that needs quotes
    path.write_text("".join(json.dumps({"text": document.text}) + "\n" for document in corpus()))
    return path


def test_the_command_cleans_and_its_words_are_true(lines, tmp_path):
    out = tmp_path / "out"
    done = run(lines, out, "--exact", "--near", "0.8", "--workers", "2")
    assert done.returncode == 0, done.stderr
    facts = json.loads((out / "report.json").read_text())
    assert f"| read | {facts['read']['documents']} |" in done.stdout
    assert [path.name for path in tmp_path.iterdir() if path not in (lines, out)] == []
    again = run(lines, out, "--exact")
    assert again.returncode == 2
    assert again.stderr == f"error: {out} is there already: give another name\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["IN", "OUT"], "nothing to do: give --exact"),
        (["IN", "OUT", "--near", "80"], "--near 80.0: a similarity from 0.3 to 1"),
        (["IN", "OUT", "--min-chars", "9", "--max-chars", "3"], "--min-chars 9 is more than --max-chars 3"),
        (["IN", "--exact"], "clean takes IN and OUT"),
        (["nowhere.jsonl", "OUT", "--exact"], "nowhere.jsonl matches no file"),
        (["IN", "OUT", "--against", "nowhere.txt"], "nowhere.txt matches no file"),
        (["IN", "OUT", "--language", "english"], "--language english: no code that the model knows; choose of af als"),
        (["IN", "s3://bucket/out", "--exact"], "s3://bucket/out: OUT is a folder of this machine"),
        (["IN", "OUT", "--exact", "--workers", "0"], "'0' is no number from 1 on"),
    ],
)
def test_mistakes_end_in_one_line(lines, tmp_path, arguments, message):
    names = {"IN": lines, "OUT": tmp_path / "out"}
    done = run(*(names.get(word, word) for word in arguments))
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_broken_line_is_named_and_leaves_nothing(lines, tmp_path):
    with lines.open("a") as file:
        file.write('{"text": \n')
    number = len(lines.read_text().splitlines())
    done = run(lines, tmp_path / "out", "--exact")
    assert done.returncode == 2
    assert f"{lines}:{number}: not JSON" in done.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == [lines]
    assert run(lines, tmp_path / "out", "--exact", "--skip-bad").returncode == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_stopped_command_leaves_nothing(tmp_path, number, code):
    lines = tmp_path / "big.jsonl"
    lines.write_text("".join(json.dumps({"text": f"text {i} " * 20}) + "\n" for i in range(300_000)))
    command = [sys.executable, "-m", "data", "clean", str(lines), str(tmp_path / "out"), "--near", "0.8"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    partial = tmp_path / ".out.partial"
    until = time.monotonic() + 30
    while not partial.exists() and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == code
    assert "intact" in errors.splitlines()[-1]
    assert {path.name for path in tmp_path.iterdir()} == {"big.jsonl"}
