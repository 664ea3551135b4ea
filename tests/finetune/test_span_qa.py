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


def test_rows_without_an_answer_are_told_unless_that_is_an_answer():
    rows = [
        Row("a:1", {"question": "who?", "context": "a text", "answers": "nobody"}),
        Row("a:2", {"question": "who?"}),
    ]
    left_out = LeftOut()
    assert opened().encode(rows, left_out) == [[], []]
    assert "without an answer in the text" in left_out.told()
    assert "without a question or a text" in left_out.told()
    (windows, none) = opened("task.options.unanswerable=true").encode(rows, LeftOut())
    assert (len(windows), none) == (1, [])
    assert windows[0].arrays["targets_T"][0] == 3


def test_a_decoder_and_a_stride_too_large_are_refused():
    with pytest.raises(ValueError, match="needs an encoder"):
        opened("model.causal=true")
    row = Row("a:1", {"question": "who?", "context": "a text", "answers": "text"})
    with pytest.raises(ValueError, match="task.options.stride=60"):
        opened("task.options.stride=60").encode([row], LeftOut())
