"""Tags of words: spans as seqeval finds them, subwords aligned, the same on every mesh."""

import functools
import json
import random
import tempfile
from pathlib import Path

import numpy as np
import pytest
from every import few_of
from seqeval import metrics as reference
from tuning import ENCODER, assert_same, trace

from config import compose
from data.tokenizer import ByteTokenizer
from evaluation.__main__ import with_errors
from finetune.metrics import spans, spans_report
from finetune.opening import open_task
from finetune.table import LeftOut, Row

TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC", "I-MISC")
NAMES = {"Ada": "B-PER", "Bo": "B-PER", "Oslo": "B-LOC", "Rome": "B-LOC"}


@functools.cache
def table() -> Path:
    """Sentences in which capitalised words are names."""
    draw, path = random.Random(0), Path(tempfile.mkdtemp()) / "names.jsonl"
    rows = []
    for _ in range(60):
        words = draw.choices(["to", "met", *NAMES], k=draw.randint(2, 6))
        rows.append({"tokens": words, "ner": [NAMES.get(word, "O") for word in words]})
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def arguments(*more: str) -> list[str]:
    columns = ["task.columns.words=tokens", "task.columns.tags=ner"]
    return ["task=token_classification", f"task.path={table()}", *columns, "task.heldout=0.2", *ENCODER, *more]


one_device = functools.cache(lambda: trace(arguments()))


MESHES = [{"context": 2, "fsdp": 2}, {"pipe": 2}]


@pytest.mark.parametrize("mesh", few_of(MESHES, MESHES[:1]), ids=str)
def test_the_mesh_changes_nothing(mesh):
    assert_same(trace(arguments(), **mesh), one_device())


def test_spans_are_those_of_seqeval():
    """Of random tags, most of which no tagger with rules would give."""
    draw = random.Random(0)
    truths = [[draw.choice(TAGS) for _ in range(draw.randint(1, 9))] for _ in range(300)]
    saids = [[draw.choice((tag, draw.choice(TAGS))) for tag in tags] for tags in truths]
    for tags in truths:
        theirs = {(kind, begin, end + 1) for kind, begin, end in reference.sequence_labeling.get_entities(tags)}
        assert spans(tags) == theirs, tags
    found, by_label = spans_report(truths, saids)
    assert found["f1"] == pytest.approx(reference.f1_score(truths, saids))
    assert found["precision"] == pytest.approx(reference.precision_score(truths, saids))
    assert found["recall"] == pytest.approx(reference.recall_score(truths, saids))
    theirs = reference.classification_report(truths, saids, output_dict=True)
    for kind, one in by_label.items():
        assert one["f1"] == pytest.approx(theirs[kind]["f1-score"])
        assert one["support"] == theirs[kind]["support"]


def test_a_tag_stands_at_the_first_token_of_its_word_and_cut_words_are_wrong():
    task = open_task(compose.load(arguments("train.seq_len=16")))
    task.labels = TAGS
    words, tags = ["Ada", "Lovelace", "met", "nobody"], ["B-PER", "I-PER", "O", "B-LOC"]
    left_out = LeftOut()
    ((example,),) = task.encode([Row("a:1", {"words": words, "tags": tags})], left_out)
    text = ByteTokenizer().decode(example.arrays["tokens_T"])
    assert text == " Ada Lovelace"  # the other words do not fit
    assert "cut" in left_out.told()
    at = np.flatnonzero(example.arrays["mask_T"])
    assert [text[place:].split()[0] for place in at] == words[:2]
    assert [TAGS[tag] for tag in example.arrays["targets_T"][at]] == tags[:2]
    said_T = example.arrays["targets_T"][None]  # all right, as far as it was read
    judgement = task.judge(
        [Row("a:1", {"words": words, "tags": tags})], [example], {"said_BT": said_T, "loss_B": np.zeros(1)}
    )
    assert judgement.metrics["precision"] == 1
    assert judgement.metrics["recall"] == pytest.approx(1 / 2)  # of Ada Lovelace and the place that was cut off


def test_rows_of_which_no_word_is_read_are_left_out_and_told():
    task, left_out = open_task(compose.load(arguments("train.seq_len=16"))), LeftOut()
    task.labels = TAGS
    rows = [
        Row("a:1", {"words": ["a" * 40, "b"], "tags": ["B-PER", "O"]}),
        Row("a:2", {"words": ["b", "a" * 40], "tags": ["B-PER", "O"]}),
    ]
    first, second = task.encode(rows, left_out)
    assert (first, len(second)) == ([], 1)
    assert "1 whose first word is longer than train.seq_len=16: left out (first: a:1)" in left_out.told()
    assert "1 longer than train.seq_len=16 tokens: cut (first: a:2)" in left_out.told()
    row, no_tokens = Row("a:3", {"words": ["\u200b"], "tags": ["O"]}), [np.zeros(0, np.int32)]
    assert task._example(0, row, ["\u200b"], no_tokens, left_out) == []
    assert "1 none of whose words has a token: left out (first: a:3)" in left_out.told()


def test_evaluation_tells_the_accuracy_of_tags_and_not_that_of_sentences():
    """One that counts the judged items has a standard error over them."""
    items = {"loss": np.zeros(4), "right": np.array([True, True, False, False])}
    told = lambda accuracy: with_errors({"accuracy": accuracy}, {"accuracy": 1}, items)["accuracy"]
    assert (told(0.8).value, told(0.8).stderr) == (0.8, None)
    assert told(0.5).value == 0.5
    assert told(0.5).stderr > 0


def test_rows_without_a_tag_for_each_word_are_told():
    task = open_task(compose.load(arguments()))
    task.labels = TAGS
    rows = [Row("a:1", {"words": "a b", "tags": "O"}), Row("a:2", {"words": "a", "tags": "B-XYZ"}), Row("a:3", {})]
    left_out = LeftOut()
    assert task.encode(rows, left_out) == [[], [], []]
    for part in ("without a tag for each word", "none of task.labels (B-XYZ)", "without words"):
        assert part in left_out.told()
