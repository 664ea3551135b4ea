"""Answers as spans: windows over long texts, SQuAD's metrics, the same on every mesh."""

import functools
import itertools
import json
import random
import re
import string
import tempfile
from pathlib import Path

import numpy as np
import pytest
from tuning import ENCODER, assert_same, trace

from config import compose
from data.tokenizer import ByteTokenizer, train_bpe
from finetune.metrics import exact_match, words_f1
from finetune.opening import open_task
from finetune.table import LeftOut, Row

CITIES = ("Oslo", "Rome", "Bern", "Graz")
SIZES = ("train.seq_len=48", "model.max_positions=48", "task.options.stride=8", "task.options.question=12")


@functools.cache
def table() -> Path:
    """Where people live, in texts that are longer than a window."""
    draw, path = random.Random(0), Path(tempfile.mkdtemp()) / "where.jsonl"
    rows = []
    for _ in range(40):
        home, work = draw.sample(CITIES, 2)
        context = f"She works in {work} every day of the week. She lives in {home} now."
        rows.append(
            {
                "question": "lives in?",
                "context": context,
                "answers": {"text": [home], "answer_start": [context.rfind(home)]},
            }
        )
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def arguments(*more: str) -> list[str]:
    return ["task=span_qa", f"task.path={table()}", "task.heldout=0.2", *ENCODER, *SIZES, *more]


one_device = functools.cache(lambda: trace(arguments()))


@pytest.mark.parametrize("mesh", [{"data": 2, "context": 2}], ids=str)
def test_the_mesh_changes_nothing(mesh):
    assert_same(trace(arguments(), **mesh), one_device(), "head_labels.bias")  # no softmax sees it


def squad_words(text: str) -> list[str]:
    """What the published script compares: lower case, no punctuation, no articles."""
    text = re.sub(f"[{re.escape(string.punctuation)}]", "", text.lower())
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def test_metrics_are_those_of_squad():
    draw = random.Random(0)
    words = ["the", "a", "Cat", "cat,", "sat", "an", "on", "mat.", "U.S.", "-"]
    for _ in range(300):
        said, truth = (" ".join(draw.choices(words, k=draw.randint(0, 4))) for _ in range(2))
        ours, theirs = squad_words(said), squad_words(truth)
        assert exact_match(said, truth) == (ours == theirs)
        shared = sum(min(ours.count(word), theirs.count(word)) for word in set(ours))
        f1 = 2 * shared / (len(ours) + len(theirs)) if ours and theirs else float(ours == theirs)
        assert words_f1(said, truth) == pytest.approx(f1)


def opened(*more: str):
    return open_task(compose.load(arguments(*more)))


def test_every_window_holds_a_part_and_one_of_them_the_answer():
    task, context = opened(), "".join(chr(97 + i % 26) for i in range(100)) + " Graz ünd"
    row = Row("a:1", {"question": "where?", "context": context, "answers": "Graz"})
    (windows,) = task.encode([row], LeftOut())
    seen = set()
    for window in windows:
        places = window.about.places_N2
        seen |= {character for begin, end in places for character in range(begin, end)}
        targets = window.arrays["targets_T"]
        ends = np.flatnonzero(targets & 1)[0], np.flatnonzero(targets & 2)[0]
        if ends == (0, 0):
            continue
        first = window.about.first
        assert context[places[ends[0] - first, 0] : places[ends[1] - first, 1]] == "Graz"
    assert seen == set(range(len(context)))
    assert any(window.arrays["targets_T"][0] == 0 for window in windows)
    shared = [
        set(map(tuple, one.about.places_N2)) & set(map(tuple, two.about.places_N2))
        for one, two in itertools.pairwise(windows)
    ]
    assert {len(some) for some in shared} == {8}


@pytest.mark.parametrize(
    "tokenizer", [ByteTokenizer(), train_bpe(["the mesh of a naïve run 猫"] * 9, 280)], ids=["bytes", "bpe"]
)
def test_tokens_know_where_they_stand(tokenizer):
    """Together they hold the whole text, but for spaces; bytes of one character all stand at it."""
    for text in ("the mesh of a run", "a naïve 猫, twice: 猫猫", ""):
        ((ids, places),) = tokenizer.encode_places([text])
        np.testing.assert_array_equal(ids, tokenizer.encode(text))
        assert places.shape == (len(ids), 2)
        assert (places[:, 0] < places[:, 1]).all()
        seen = {at for begin, end in places.tolist() for at in range(begin, end)}
        assert {text[at] for at in set(range(len(text))) - seen} <= {" "}


def test_the_surest_window_answers():
    task, context = opened(), "nothing to see here, nothing at all, and then at last there is Graz"
    row = Row("a:1", {"question": "where?", "context": context, "answers": ["Oslo", "Graz"]})
    (windows,) = task.encode([row], LeftOut())
    logits = np.zeros((len(windows), 48, 2), np.float32)
    for window, logits_T2 in zip(windows, logits, strict=True):
        logits_T2[0] = 1
        targets = window.arrays["targets_T"]
        if targets[0] == 0:
            logits_T2[np.flatnonzero(targets & 1)[0], 0] = logits_T2[np.flatnonzero(targets & 2)[0], 1] = 5
    judgement = task.judge([row], windows, {"logits_BT": logits, "loss_B": np.zeros(len(windows))})
    assert judgement.metrics == {"f1": 1.0, "exact_match": 1.0}


def encoded(answers, *more: str, **columns):
    """The first window of a row about `it was Ada, ada`, and what is told of the row."""
    left_out, values = LeftOut(), {"question": "who?", "context": "it was Ada, ada", "answers": answers, **columns}
    (windows,) = opened(*more).encode([Row("a:1", values)], left_out)
    return (windows[0] if windows else None), left_out.told()


def test_an_answer_that_is_not_there_is_no_question_without_an_answer():
    """Rows without an answer are told unless that is an answer, those whose answer is not found in any case."""
    nobody, no_text = "task.options.unanswerable=true", {"context": None}
    for empty in ("", " ", [], None, {"text": [], "answer_start": []}):
        assert encoded(empty) == (None, "1 without an answer: left out (first: a:1)")
        window, told = encoded(empty, nobody)
        assert (window.arrays["targets_T"][0], told) == (3, "")
    for more in ((), (nobody,)):
        assert encoded("Bob", *more) == (None, "1 whose answer does not stand in the text: left out (first: a:1)")
        assert "without a question or a text" in encoded("ada", *more, **no_text)[1]
    window, told = encoded(["Bob", "ada"], nobody)
    assert window.about.answers == [(12, 15)]
    assert "without that one" in told


@pytest.mark.parametrize(
    ("answers", "columns"),
    [
        ({"text": ["ada"], "answer_start": [12]}, {}),
        ({"text": "ada", "answer_start": 12}, {}),
        ([{"text": "ada", "answer_start": 12}], {}),  # as SQuAD's own files
        (["ada"], {}),
        ("ada", {"start": "12"}),
    ],
)
def test_answers_in_every_spelling_are_the_same_span(answers, columns):
    window, told = encoded(answers, **columns)
    targets = window.arrays["targets_T"]
    assert (window.about.answers, told) == ([(12, 15)], "")
    assert bytes(window.arrays["tokens_T"][np.flatnonzero(targets & 1)[0] :][:3].tolist()) == b"ada"


def test_a_start_at_which_the_answer_does_not_stand_is_told():
    window, told = encoded({"text": ["ada"], "answer_start": [5]})
    assert window.about.answers == [(12, 15)]
    assert "does not stand at its start" in told
    window, told = encoded([1998], context="in 1998")
    assert window.about.answers == [(3, 7)]
    assert "neither texts nor {text, answer_start}" in encoded([["ada"]])[1]


def test_a_decoder_and_a_stride_too_large_are_refused():
    with pytest.raises(ValueError, match="needs an encoder"):
        opened("model.causal=true")
    row = Row("a:1", {"question": "who?", "context": "a text", "answers": "text"})
    with pytest.raises(ValueError, match="task.options.stride=60"):
        opened("task.options.stride=60").encode([row], LeftOut())
