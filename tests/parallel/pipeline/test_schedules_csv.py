"""A user's own table: what is written is read back, and every mistake is told with its line."""

import dataclasses

import pytest

from parallel.pipeline.schedules import make, read_csv, write_csv

# 1f1b with 2 stages and 2 microbatches; the header is line 1
TABLE = """\
tick,stage,operation,chunk,microbatch
0,0,F,0,0
1,0,F,0,1
1,1,F,0,0
2,1,B,0,0
3,0,B,0,0
3,1,F,0,1
4,1,B,0,1
5,0,B,0,1
"""


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "mine.csv"
    file.write_text(TABLE)
    return file


def edited(path, line, text):
    lines = path.read_text().splitlines()
    lines[line - 1 : line] = [] if text is None else text.split("\n")
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "interleaved", "zero_bubble", "zero_bubble_v"])
@pytest.mark.parametrize("sizes", [(1, 1), (3, 2), (2, 5), (4, 8)])
def test_round_trip(tmp_path, name, sizes):
    schedule, path = make(name, *sizes), tmp_path / "table.csv"
    write_csv(schedule, path)
    assert read_csv(path) == dataclasses.replace(schedule, name=str(path))
    assert make(str(path), *sizes) == make(str(path), *sizes, schedule.chunks) == read_csv(path)


def test_lines_may_be_in_any_order_and_idle_ticks_of_a_stage_are_left_out(path):
    header, *lines = path.read_text().splitlines()
    path.write_text("\r\n".join([header, "", *reversed(lines)]))
    assert read_csv(path).table == make("1f1b", 2, 2).table


def test_columns_may_be_in_any_order(path):
    rows = [line.split(",") for line in TABLE.splitlines()]
    path.write_text("".join(", ".join(reversed(row)) + "\n" for row in rows))
    assert read_csv(path).table == make("1f1b", 2, 2).table


def test_the_virtual_column_gives_the_placement(path):
    lines = ["tick,stage,operation,chunk,microbatch,virtual"]
    lines += ["0,1,F,0,0,0", "1,0,F,0,0,1", "2,0,B,0,0,1", "3,1,B,0,0,0"]  # the model goes down the stages
    path.write_text("\n".join(lines))
    assert read_csv(path).placement == ((1, 0), (0, 0))
    path.write_text("\n".join([*lines[:3], "2,0,B,0,0,0", *lines[4:]]))
    with pytest.raises(ValueError, match=r"mine.csv:4: stage 0, chunk 0 is virtual 1 above, 0 here"):
        read_csv(path)
    path.write_text("\n".join(line.replace("0,0,1", "0,0,2") for line in lines))
    with pytest.raises(
        ValueError, match=r"the numbers 0..1 once each, but gives stage 1 chunk 0: 0, stage 0 chunk 0: 2"
    ):
        read_csv(path)


@pytest.mark.parametrize(
    ("line", "text", "message"),
    [
        (1, "tick,stage,op,chunk,microbatch", r"mine.csv:1: the header is tick,stage,op,.*; use tick,stage,operation,"),
        (3, "1,0,X,0,1", r"mine.csv:3: operation 'X' is unknown; use F, B, W"),
        (3, "1,0,f,0,1", r"mine.csv:3: operation 'f' is unknown"),
        (3, "1,0,F,0", r"mine.csv:3: 4 fields for 5 columns"),
        (3, "one,0,F,0,1", r"mine.csv:3: tick 'one' is no number"),
        (3, "1,-1,F,0,1", r"mine.csv:3: stage '-1' is no number; use 0, 1, 2"),
        (3, "1,0,F,0,", r"mine.csv:3: microbatch '' is no number"),
        (3, "0,0,F,0,1", r"mine.csv:3: tick 0, stage 0 has an operation already, F of .*microbatch 0 \(line 2\)"),
        (
            3,
            "1,0,F,0,0",
            r"mine.csv:3: tick 1, stage 0: F of chunk 0, microbatch 0 is there twice: .*tick 0 \(line 2\)",
        ),
        (3, None, r"mine.csv:8: tick 5, stage 0: B of .*microbatch 1 is there, but stage 0 has no F of .*microbatch 1"),
        (
            9,
            None,
            r"mine.csv:3: tick 1, stage 0: F of .* is there, but stage 0 has no B of chunk 0, microbatch 1; add it",
        ),
        (9, "5,0,B,0,1\n6,0,W,0,1", r"mine.csv:2: .* stage 0 has no W of chunk 0, microbatch 0"),
        (
            4,
            "0,1,F,0,0",
            r"mine.csv:4: tick 0, stage 1: F .* needs F .* of stage 0, which is at tick 0 \(line 2\).*tick 1",
        ),
        (
            6,
            "2,0,B,0,0",
            r"mine.csv:6: tick 2, stage 0: B .* needs B .* of stage 1, .* at tick 2 \(line 5\): .* tick 3",
        ),
        (9, "7,0,B,0,1", r"mine.csv:9: tick 7 is there, but no tick 5; count without gaps"),
        (9, "5,0,B,0,1\n6,3,F,0,0", r"mine.csv:10: stage 3 is there, but no stage 2"),
        (9, "5,0,B,0,1\n6,0,F,0,5", r"mine.csv:10: microbatch 5 is there, but no microbatch 2"),
        (9, "5,0,B,0,1\n6,0,F,2,0", r"mine.csv:10: chunk 2 is there, but no chunk 1"),
        (9, "5,0,B,0,1\n999999999,0,F,0,0", r"mine.csv:10: tick 999999999 is there, but no tick 6"),
    ],
)
def test_mistakes_are_told_with_their_line(path, line, text, message):
    edited(path, line, text)
    with pytest.raises(ValueError, match=message) as caught:
        read_csv(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "mine.csv:1: the header is missing"),
        (b"tick,stage,operation,chunk,microbatch\n", "holds no operation"),
        (b"\xff\xfe\x00", "is no CSV text"),
    ],
)
def test_files_that_are_no_table(path, content, message):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_csv(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"none.csv: No such file"):
        make(str(tmp_path / "none.csv"), 2, 2)


def test_a_table_of_other_sizes_is_refused(path):
    with pytest.raises(ValueError, match=r"table for stages=2, microbatches=2, but stages=4, microbatches=8 is asked"):
        make(str(path), 4, 8)
    with pytest.raises(ValueError, match=r"table for chunks=1, but chunks=2 is asked"):
        make(str(path), 2, 2, 2)
