"""Tables: every planted fault is named with its line, and none is used."""

import json

import numpy as np
import pytest

from scaling.fit.diagnostics import screen
from scaling.fit.laws import HOFFMANN, predict
from scaling.fit.runs_table import read_table

TRUTH = {"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658}
NAMES = {"N": "params", "D": "tokens", "loss": "final_loss"}


def rows(count=24, seed=0):
    rng = np.random.default_rng(seed)
    n, d = 10 ** rng.uniform(7.5, 9.5, count), 10 ** rng.uniform(9, 11, count)
    loss = predict(HOFFMANN, TRUTH, {"N": n, "D": d}) * np.exp(0.003 * rng.standard_normal(count))
    return [{"params": a, "tokens": b, "flops": 6 * a * b, "final_loss": y} for a, b, y in zip(n, d, loss, strict=True)]


def write(path, data, end="\n"):
    lines = [",".join(data[0]), *(",".join(repr(float(x)) for x in row.values()) for row in data)]
    path.write_text("\n".join(lines) + end)
    return path


def test_planted_faults_are_named_and_left_out(tmp_path):
    data = rows()
    data.insert(3, {**data[1], "final_loss": float("nan")})  # line 5
    data.insert(8, dict(data[0]))  # line 10: a duplicate
    data.insert(12, {**rows(seed=5)[0], "final_loss": 9.7})  # line 14: diverged
    odd = rows(seed=6)[1]
    data.insert(15, {**odd, "tokens": odd["tokens"] / 2048})  # line 17: examples
    path = write(tmp_path / "runs.csv", data)
    path.write_text(path.read_text() + "1.5e8,2.0e")  # line 30: cut short
    table = screen(HOFFMANN, read_table(path, NAMES))
    said = {row.line: row.reason for row in table.refused}
    assert sorted(said) == [5, 10, 14, 17, 30]
    assert "nan" in said[5]
    assert "repeats line 2" in said[10]
    assert "diverged" in said[14]
    assert "units mixed up" in said[17]
    assert "cut short" in said[30]
    assert len(table) == 24
    assert table.columns["loss"].max() < 5


def test_units_by_compute_and_by_group(tmp_path):
    data = rows()
    data[4]["tokens"] /= 512
    with_compute = read_table(write(tmp_path / "c.csv", data), {**NAMES, "C": "flops"})
    assert [(row.line, "0.00195" in row.reason or "512" in row.reason) for row in with_compute.refused] == [(6, True)]
    grouped = [{**row, "budget": float(place // 8)} for place, row in enumerate(rows())]
    for row in grouped:
        row["tokens"] = 10 ** (19 + row["budget"]) / 6 / row["params"]
    grouped[9]["tokens"] /= 1024
    by_group = read_table(write(tmp_path / "g.csv", grouped), {**NAMES, "group": "budget"})
    assert [row.line for row in by_group.refused] == [11]
    for row in data:
        row["tokens"] = row["flops"] / 6 / row["params"] / 2048
    with pytest.raises(ValueError, match="is D in tokens, not in examples"):
        read_table(write(tmp_path / "all.csv", data), {**NAMES, "C": "flops"})


def test_json_forms_give_the_same_numbers(tmp_path):
    data = rows()
    plain = read_table(write(tmp_path / "runs.csv", data), NAMES)
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data) + '{"params": 1e8, "tok')
    (tmp_path / "runs.json").write_text(json.dumps(data))
    lines, whole = read_table(tmp_path / "runs.jsonl", NAMES), read_table(tmp_path / "runs.json", NAMES)
    for letter in ("N", "D", "loss", "C"):
        assert np.array_equal(plain.columns[letter], lines.columns[letter])
        assert np.array_equal(plain.columns[letter], whole.columns[letter])
    assert [(row.line, "cut short" in row.reason) for row in lines.refused] == [(25, True)]


def test_d_follows_from_compute(tmp_path):
    data = rows()
    table = read_table(write(tmp_path / "runs.csv", data), {"N": "params", "C": "flops", "loss": "final_loss"})
    assert table.columns["D"] == pytest.approx([row["tokens"] for row in data])


def test_the_same_rows_however_they_are_written(tmp_path):
    """Line ends, encodings, the order of rows and columns that nobody asked for change no number, and no order."""
    plain = write(tmp_path / "runs.csv", rows()).read_text()
    lines = plain.splitlines()
    spare = ["x,x," + lines[0], *("1,2," + line for line in lines[1:])]
    expected = read_table(tmp_path / "runs.csv", NAMES).ordered()
    forms = {
        "carriage returns": plain.replace("\n", "\r").encode(),
        "utf-16": plain.encode("utf-16"),
        "blank first line": ("\n" + plain).encode(),
        "reversed": "\n".join([lines[0], *reversed(lines[1:]), ""]).encode(),
        "spare columns": ("\n".join(spare) + "\n").encode(),
    }
    for form, content in forms.items():
        (tmp_path / "other.csv").write_bytes(content)
        table = read_table(tmp_path / "other.csv", NAMES).ordered()
        assert (*table.refused, *table.notes) == (), form
        assert all(np.array_equal(table.columns[letter], expected.columns[letter]) for letter in NAMES), form


def test_an_open_quote_takes_its_own_line_only(tmp_path):
    lines = write(tmp_path / "runs.csv", rows()).read_text().splitlines()
    lines.insert(5, '"1e8,1e9,3')  # line 6
    (tmp_path / "runs.csv").write_text("\n".join(lines) + "\n")
    table = read_table(tmp_path / "runs.csv", NAMES)
    assert len(table) == 24
    assert [row.line for row in table.refused] == [6]


def test_json_values_that_are_no_numbers(tmp_path):
    odd = [True, [1], 10**400, None]
    data = rows() + [{"params": value, "tokens": 1e10, "final_loss": 3.0} for value in odd]
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    assert [row.line for row in read_table(tmp_path / "runs.jsonl", NAMES).refused] == [25, 26, 27, 28]


def test_a_value_cut_in_the_middle(tmp_path):
    path = write(tmp_path / "runs.csv", rows(), end="")
    whole = path.read_text()
    assert not read_table(path, NAMES).refused
    path.write_text(whole[:-14])
    assert "shorter than any other" in read_table(path, NAMES).refused[0].reason


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no rows"),
        ("params,tokens\n1,2\n", "has no column final_loss .for loss.; there are: params, tokens"),
        ("params,tokens,final_loss\n1,2,nan\n", "every row is refused; line 2: final_loss is nan"),
        ("params,params,final_loss\n1,2,3\n", "column params stands 2 times"),
        ("params,tokens,final_loss\n1,2,3,\n", "every line is refused; line 2: 4 fields of 3"),
        ("params,tokens,final_loss\n1,2," + "3" * 200_000, "line 2 does not parse as CSV"),
        ("\0\1\2\r", "is not text"),
        ("[" * 100_000, "does not parse, cut short"),
    ],
)
def test_mistakes_are_told(tmp_path, text, message):
    (tmp_path / "runs.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_table(tmp_path / "runs.csv", NAMES)
