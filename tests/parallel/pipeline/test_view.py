"""What is drawn is the table: in the terminal, as SVG and as PNG; and the command line."""

import itertools
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from parallel.pipeline.__main__ import main
from parallel.pipeline.schedules import Op, make, read_csv
from parallel.pipeline.view import COLORS, boxes, terminal

SHAPES = [("1f1b", 4, 8), ("interleaved", 3, 7), ("zero_bubble_v", 4, 30), ("gpipe", 12, 1), ("zero_bubble", 1, 1)]


def operation(text: str) -> Op:
    kind, microbatch, chunk = re.fullmatch(r"([FBW])(\d+)(?:\.(\d+))?", text).groups()
    return Op(kind, int(chunk or 0), int(microbatch))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("width", [1, 40, 80, 1000])
def test_the_terminal_shows_the_table_within_its_width(shape, width):
    schedule = make(*shape)
    rows, ticks = {stage: [] for stage in range(schedule.stages)}, []
    for line in map(str, terminal(schedule, width)[1:]):
        if match := re.fullmatch(r"stage (\d+) (.*)", line):
            rows[int(match[1])] += [None if cell == "." else operation(cell) for cell in match[2].split()]
        ticks += map(int, line.split()[1:]) if line.startswith("tick") else []
        assert len(line) <= max(width, 16)  # a narrower terminal still gets one tick a line
    assert ticks == list(range(schedule.ticks))
    assert tuple(zip(*rows.values(), strict=True)) == schedule.table


@pytest.mark.parametrize("shape", SHAPES)
def test_the_picture_shows_the_table_without_overlaps(shape):
    schedule = make(*shape)
    width, height, found = boxes(schedule)
    cells = [box for box in found if box.fill]
    assert len({(box.x, box.y) for box in cells}) == len(cells) == schedule.ticks * schedule.stages
    assert sorted(box.text for box in cells) == sorted(
        "" if op is None else f"{op.kind}{op.microbatch}" + (f".{op.chunk}" if schedule.chunks > 1 else "")
        for row in schedule.table
        for op in row
    )
    assert all(box.x >= 0 and box.x + box.width <= width and 0 <= box.y < height - 8 for box in found)
    rows = {}
    for box in cells:
        rows.setdefault(box.y, []).append(box)
    for row in rows.values():
        assert all(box.x + box.width == after.x for box, after in itertools.pairwise(row))


def test_picture_files(tmp_path, capsys):
    for suffix in ("png", "svg"):
        arguments = [
            "show",
            "zero_bubble_v",
            "--stages",
            "2",
            "--microbatches",
            "3",
            "--out",
            str(tmp_path / f"a.{suffix}"),
        ]
        assert main(arguments) == 0
    width, height, found = boxes(make("zero_bubble_v", 2, 3))
    image = Image.open(tmp_path / "a.png")
    assert image.size == (width, height)
    for box in found:
        if box.text.endswith(".0") and box.fill:  # chunk 0 has the full color; near the corner there is no ink
            assert image.getpixel((box.x + 3, box.y + 3)) == COLORS[box.text[0]]
    root = ElementTree.parse(tmp_path / "a.svg").getroot()
    assert (root.get("width"), root.get("height")) == (str(width), str(height))
    drawn = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert drawn == [box.text for box in found if box.text]


def test_show_tells_peak_ticks_and_bubble(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["show", "1f1b", "--stages", "4", "--microbatches", "8", "--csv", str(tmp_path / "t.csv")]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out  # no colors where no terminal is
    assert "stage 3  .  .  . F0 B0 F1 B1" in out
    assert "ticks: 22" in out
    assert "stages 0..3: 4, 3, 2, 1 microbatches" in out
    assert "bubble: 27.3% predicted with F = 1, B = 2" in out
    assert read_csv(tmp_path / "t.csv").table == make("1f1b", 4, 8).table
    assert main(["show", str(tmp_path / "t.csv")]) == 0  # a table knows its own sizes
    assert capsys.readouterr().out.splitlines()[1:] == out.splitlines()[1:]


def test_compare(capsys):
    assert main(["compare", "--stages", "4", "--microbatches", "8"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:6]]
    assert rows == [
        ["gpipe", "1", "22", "8", "8", "27.3%", "27.3%"],
        ["1f1b", "1", "22", "4", "4", "27.3%", "40.0%"],
        ["interleaved", "2", "38", "11", "5.5", "15.8%", "29.4%"],
        ["zero_bubble", "1", "27", "4", "4", "11.1%", "11.1%"],
        ["zero_bubble_v", "2", "51", "8", "4", "5.9%", "5.9%"],
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("show 1f1b --stages 4 --microbatches 0", "0 microbatches is impossible"),
        ("show 1f1b --stages -2 --microbatches 4", "-2 stages is impossible"),
        (
            "show 1f1b --stages 4 --microbatches 1000000",
            "4 stages * 1 chunks * 1000000 microbatches = 4000000 is too large",
        ),
        ("compare --stages 100000 --microbatches 1", "at most 20000"),
        ("show interleaved --stages 2 --microbatches 2 --chunks 9999999", "is too large to draw"),
        ("show 1f1b --stages 4", "--microbatches missing"),
        ("show none.csv", "none.csv: No such file"),
        ("show 1f1b --stages 1 --microbatches 1 --out a.pdf", "a picture is .png or .svg"),
        ("show 1f1b --stages 1 --microbatches 1 --out /none/such/a.svg", "/none/such/a.svg"),
        ("show 2f2b --stages 1 --microbatches 1", "2f2b is unknown; use gpipe"),
        ("compare --stages four --microbatches 1", "invalid int value: 'four'"),
        ("draw", "invalid choice: 'draw'"),
        ("", "required: show|compare"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(capsys, arguments, message):
    try:
        code = main(arguments.split())
    except SystemExit as ended:
        code = ended.code
    error = capsys.readouterr().err
    assert code == 2
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_as_a_command():
    command = [
        sys.executable,
        "-m",
        "parallel.pipeline",
        "show",
        "zero_bubble",
        "--stages",
        "2",
        "--microbatches",
        "3",
    ]
    ran = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "stage 1  . F0 B0 F1 B1 W0 F2 B2 W1 W2" in ran.stdout
