"""Somebody's table: the same runs however it writes, splits, packs, filters and marks them."""

import gzip

import numpy as np
import pytest

from scaling.fit.runs_table import read_table
from scaling.fit.selection import Selection, binned

HEAD = ("params", "tokens", "loss", "data", "bad")
ROWS = [
    (n, float(n * ratio), round(1.8 + 480 / n**0.35 + 2100 / (n * ratio) ** 0.37, 6), data, bad)
    for n, data, bad in ((1e8, "web", "no"), (3e8, "web", "no"), (1e9, "code", "no"), (3e9, "code", ""))
    for ratio in (5, 20, 80)
]
ROWS[2] = (*ROWS[2][:4], "yes")
ROWS[6] = (*ROWS[6][:3], "web", "no")


def texts(head, rows):
    return "".join(",".join(map(str, row)) + "\n" for row in (head, *rows))


NAMES = {"N": "params", "D": "tokens", "loss": "loss"}


@pytest.fixture
def plain(tmp_path):
    path = tmp_path / "runs.csv"
    path.write_text(texts(HEAD, ROWS))
    return path


def same(table, other, letters="ND"):
    assert len(table) == len(other)
    for letter in (*letters, "loss"):
        assert table.ordered().columns[letter] == pytest.approx(other.ordered().columns[letter], rel=1e-12)


def test_expressions_constants_and_suffixes(plain, tmp_path):
    expected = read_table(plain, NAMES)
    other = tmp_path / "other.csv"
    rows = [(f"{n / 1e6!r}M", np.log10(d), y, "x") for n, d, y, *_ in ROWS]
    other.write_text(texts(("size", "log D", "loss", "note"), rows))
    table = read_table(other, {"N": "size", "D": "10**`log D`", "loss": "loss*1", "U": "1B"})
    same(table, expected)
    assert np.all(table.columns["U"] == 1e9)
    same(read_table(plain, {**NAMES, "C": "6 * params * tokens"}), expected, "NDC")


def test_several_files_packed_files_and_leading_comments(plain, tmp_path):
    expected = read_table(plain, NAMES)
    first, second, third = (tmp_path / name for name in ("a.csv", "b.csv.gz", "c.csv"))
    first.write_text("# made by hand\n#\n" + texts(HEAD, ROWS[:4]))
    second.write_bytes(gzip.compress(texts(HEAD, ROWS[4:8]).encode()))
    third.write_text("# a comment\n# " + texts(HEAD[:3], [row[:3] for row in ROWS[8:]]))  # as numpy.savetxt writes it
    table = read_table([first, second, third], NAMES)
    same(table, expected)
    assert sorted(set(table.others["file"])) == ["a.csv", "b.csv.gz", "c.csv"]
    assert table.lines[0] == 4
    assert table.lines[4] == 9  # the second file's first row: its lines follow on
    assert "lines 8 to 12 are those of" in table.notes[1]


def test_a_filter_and_marked_outliers(plain):
    table = read_table(plain, NAMES, Selection(where="data == 'web' and params < 2e9"))
    assert [len(table), *table.notes] == [7, "--where data == 'web' and params < 2e9 leaves 7 of 12 rows"]
    marked = read_table(plain, NAMES, Selection(marked="bad"))
    assert [(row.line, row.reason) for row in marked.refused] == [(4, "marked as an outlier by bad")]
    same(read_table(plain, NAMES, Selection(marked="loss > 5 or bad == 'yes'")), marked)


def test_the_best_of_a_grid_of_settings(tmp_path):
    """Three learning rates at each size: the least loss counts, the others are named."""
    rows = [(n, d, y + 0.1 * abs(rate), data, bad) for n, d, y, data, bad in ROWS for rate in (-1, 0, 2)]
    (tmp_path / "grid.csv").write_text(texts(HEAD, rows))
    table = read_table(tmp_path / "grid.csv", NAMES, Selection(best=True))
    assert table.columns["loss"] == pytest.approx([row[2] for row in ROWS])
    assert len(table.refused) == 24
    assert table.refused[0].reason == "line 3 has a lower loss at the same sizes (--best)"


def test_budgets_in_bins(plain):
    values = np.array([1.0e18, 1.03e18, 2.2e18, 0.99e18, 2.1e18, 9e18])
    assert list(binned(values, 0.1)) == ["1e+18", "1e+18", "2.15e+18", "1e+18", "2.15e+18", "9e+18"]
    table = read_table(plain, NAMES, Selection(bins=1.5))
    for label in set(table.columns["group"]):
        mine = table.columns["C"][table.columns["group"] == label]
        assert mine.max() <= 2.5 * mine.min()
    assert len(set(table.columns["group"])) < len(table)


@pytest.mark.parametrize(
    ("names", "selection", "message"),
    [
        ({"N": "parms"}, {}, "has no column parms .for N.; there are: params, tokens"),
        ({"N": "params * widht"}, {}, "has no column widht .for N."),
        ({"N": "params."}, {}, "has no column params. .for N."),
        ({"N": "().__class__"}, {}, "Attribute is not allowed"),
        ({"N": "data * 2"}, {}, "every row is refused; line 2: data . 2 has no value here: 'web' is a text"),
        ({}, {"where": "params >"}, "is not an expression"),
        ({}, {"where": "parms > 1"}, "has no column parms .for --where."),
        ({}, {"where": "params < 0"}, "holds for none of the 12 rows"),
        ({}, {"marked": "odd"}, "has no column odd .for --outliers."),
        ({"group": "data"}, {"bins": 0.1}, "needs numbers in --group"),
        ({}, {"bins": 0.0}, "--group-width 0 must be above 0"),
    ],
)
def test_mistakes(plain, names, selection, message):
    with pytest.raises(ValueError, match=message) as told:
        read_table(plain, {**NAMES, **names}, Selection(**selection))
    assert "\n" not in str(told.value)


def test_a_packed_file_cut_short(plain, tmp_path):
    (tmp_path / "cut.csv.gz").write_bytes(gzip.compress(plain.read_bytes())[:-9])
    with pytest.raises(ValueError, match="does not unpack, cut short"):
        read_table(tmp_path / "cut.csv.gz", NAMES)
