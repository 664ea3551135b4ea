"""Rows of every kind of table, and what is told of those that cannot be used."""

import csv
import gzip
import json

import pytest
from tuning import ENCODER

from config import compose
from finetune.opening import encoded, open_task, read_sides
from finetune.table import LeftOut, Row, is_heldout, read_rows

COLUMNS = {"text": "review", "label": "stars"}
ROWS = [
    {"review": f'film, number {i}\nwith "quotes" and ünïcode', "stars": "good" if i % 2 else "bad"} for i in range(20)
]


def write(path, rows=ROWS):
    """A table of the kind that its name says."""
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    opened = gzip.open if path.suffix == ".gz" else open
    if kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    with opened(path, "wt", encoding="utf-8", newline="") as file:
        if kind == "jsonl":
            file.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            writer = csv.DictWriter(file, rows[0].keys(), delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.parquet", "a.csv.gz", "a.jsonl.gz"])
def test_tables_of_every_kind_hold_the_same_rows(tmp_path, name):
    rows = read_rows(str(write(tmp_path / name)), COLUMNS, (), "task.path")
    assert [dict(row.values) for row in rows] == [{"text": r["review"], "label": r["stars"]} for r in ROWS]
    assert len({row.name for row in rows}) == len(rows)


def test_a_folder_for_each_class(tmp_path):
    for label in ("good", "bad"):
        (tmp_path / label).mkdir()
        for number in range(3):
            (tmp_path / label / f"{number}.txt").write_text(f"{label} {number}")
    rows = read_rows(str(tmp_path), {"text": "text", "label": "label"}, (), "task.path")
    assert [(row.text("text"), row.text("label")) for row in rows] == [
        (f"{label} {number}", label) for label in ("bad", "good") for number in range(3)
    ]


def test_other_files_beside_those_of_classes_are_counted_and_hidden_ones_no_class(tmp_path):
    for name in (
        "good/a.txt",
        "bad/b.md",
        "bad/c.html",
        "bad/d.txt.gz",
        "bad/.DS_Store",
        ".checkpoints/a.txt",
        "e.csv",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    left_out = LeftOut()
    rows = read_rows(str(tmp_path), {"text": "text", "label": "label"}, (), "task.path", left_out)
    assert [row.text("label") for row in rows] == ["bad", "good"]
    assert left_out.told().startswith("3 that are no .txt or .md in a folder of a class: left out (first: ")
    (tmp_path / "good" / "a.txt").unlink()
    (tmp_path / "bad" / "b.md").unlink()
    with pytest.raises(ValueError, match=r"holds no row: 3 that are no .txt"):
        read_rows(str(tmp_path), {"text": "text", "label": "label"}, (), "task.path")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            "review,rating\na,b\n",
            "no column 'stars' for label; there are review, rating: set task.columns.label=review",
        ),
        ("review,stars\na,b,c\n", "3 columns where the first line has 2"),
        ("review,stars\n", "holds no row"),
        ('review,stars\n"a,b\n', "unexpected end of data"),
    ],
)
def test_what_is_wrong_with_a_table_is_told_in_one_line(tmp_path, content, said):
    path = tmp_path / "wrong.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match="wrong.csv") as caught:
        read_rows(str(path), COLUMNS, (), "task.path")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("[" * 100_000, "not JSON: maximum recursion depth"),
        ('{"review": "a\\ud800b", "stars": "x"}', "holds half a surrogate pair"),
        ("[1]", "a list, not an object"),
    ],
)
def test_a_line_of_json_that_is_no_row_is_named(tmp_path, line, said):
    (tmp_path / "a.jsonl").write_text('{"review": "\\ud83d\\ude00", "stars": "x"}\n' + line)
    with pytest.raises(ValueError, match=r"a.jsonl:2: ") as caught:
        read_rows(str(tmp_path / "a.jsonl"), COLUMNS, (), "task.path")
    assert said in str(caught.value)


def test_a_compressed_table_that_breaks_off(tmp_path):
    whole = write(tmp_path / "whole.csv.gz").read_bytes()
    (tmp_path / "cut.csv.gz").write_bytes(whole[:-20])
    with pytest.raises(ValueError, match="cut.csv.gz"):
        read_rows(str(tmp_path / "cut.csv.gz"), COLUMNS, (), "task.path")


def test_no_file_and_no_table(tmp_path):
    with pytest.raises(ValueError, match="task.path="):
        read_rows(str(tmp_path / "absent.csv"), COLUMNS, (), "task.path")
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match="a table is one of"):
        read_rows(str(tmp_path / "a.txt"), COLUMNS, (), "task.path")


def test_what_is_held_out_depends_on_the_row_alone():
    rows = [Row(f"a:{i}", {"text": f"text {i}"}) for i in range(2000)]
    share = sum(is_heldout(row, 0.1) for row in rows) / len(rows)
    assert 0.07 < share < 0.13
    for row in rows[:50]:
        assert is_heldout(row, 0.1) == is_heldout(Row("elsewhere", dict(row.values)), 0.1)
        assert is_heldout(row, 0.1) <= is_heldout(row, 0.5)  # a larger share holds a smaller one


def task_of(path, *more):
    config = compose.load(["task=classification", f"task.path={path}", *ENCODER, *more])
    return config, open_task(config)


def test_what_is_left_out_is_counted_and_told(tmp_path):
    texts = [("fine", "good"), ("", "good"), ("  ", "bad"), ("bad " * 40, "bad"), ("odd", ""), ("odd", "strange")]
    path = write(tmp_path / "a.csv", [{"text": text, "label": label} for text, label in texts])
    config, task = task_of(path, "task.labels=[good,bad]")
    rows = read_rows(str(path), task.columns, task.optional, "task.path")
    table = encoded(task, rows, "training")
    assert [example.row for example in table.examples] == [0, 3]
    assert len(table.examples[1]) == config.train.seq_len
    told = table.left_out.told()
    for part in ("2 with an empty text: left out", "1 longer than train.seq_len=32 tokens: cut", "1 without a label"):
        assert part in told
    assert "none of task.labels (strange)" in told
    assert "a.csv:3" in told


def test_labels_are_sorted_and_none_is_lost(tmp_path):
    path = write(tmp_path / "a.csv", [{"text": f"t{i}", "label": str(i % 12)} for i in range(60)])
    config, task = task_of(path)
    training, kept = read_sides(config.task, task)
    assert len(training) + len(kept) == 60
    assert task.find_labels(training + kept) == tuple(str(i) for i in range(12))  # as numbers


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["task.options.kind=many"], "one, several, regression"),
        (["task.options.colour=red"], "task.options.colour"),
        (["task.columns.colour=red"], "task.columns.colour: classification has columns text, label, pair"),
        (["task.metric=bleu"], "task.metric=bleu is not one of accuracy"),
        (
            ["task.options.kind=regression", "task.metric=accuracy"],
            "task.metric=accuracy is not one of mse, pearson, loss",
        ),
        (["tokenizer=bpe"], "tokenizer.kind=bpe is trained on text"),
    ],
)
def test_settings_that_do_not_fit_are_told_with_the_choices(tmp_path, more, said):
    with pytest.raises(ValueError) as caught:
        task_of(tmp_path / "a.csv", *more)
    assert said in str(caught.value)


def test_an_empty_side_is_a_mistake(tmp_path):
    path = write(tmp_path / "a.csv", [{"text": "one", "label": "a"}])
    config, task = task_of(path)
    with pytest.raises(ValueError, match="both sides need some"):
        read_sides(config.task, task)
    assert LeftOut().told() == ""
