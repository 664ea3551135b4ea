"""Expressions: right values, every way out of arithmetic refused in one line; numbers as people write them."""

import numpy as np
import pytest

from scaling.fit.expressions import cell, number, parse


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("tokens*1e9", 3e9),
        ("10**logN", 1e8),
        ("10^logN", 1e8),
        ("`tokens (B)` * 1e9 + 1", 5e9 + 1),
        ("-2^2", -4.0),
        ("log10(exp(0)) + sqrt(4) - abs(-1) + max(1, 2, tokens)", 4.0),
        ("kind == 'adamw' and lr < 1e-2", True),
        ("kind in ('sgd', 'lion') or not lr >= 1", True),
        ("0 < lr < 1", True),
        ("7 // 2 % 2", 1),
    ],
)
def test_values(text, value):
    row = {"tokens": 3.0, "logN": 8, "tokens (B)": 5.0, "kind": "adamw", "lr": 1e-3}
    assert parse(text)(row) == value


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('x')",
        "().__class__.__bases__",
        "a.b",
        "a[0]",
        "lambda: 1",
        "[x for x in a]",
        "f'{a}'",
        "open('x')",
        "log(a, base=2)",
        "a if b else c",
        "(a := 1)",
        "a; b",
        "1 +",
        "",
        "b'x'",
        "(" * 500 + "1" + ")" * 500,
        "a + " * 1000 + "a",
    ],
)
def test_what_is_no_arithmetic_is_refused(text):
    with pytest.raises(ValueError, match=r"not allowed|is not an expression|characters") as refused:
        parse(text)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "text", ["a / 0", "a + 'x'", "9^9^9^9", "'x' * 999999999", "log(-1)", "sqrt('x')", "(0-1)^0.5"]
)
def test_what_has_no_value_is_told(text):
    with pytest.raises(ValueError, match="has no value here"):
        parse(text)({"a": 1.0})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("2.8B", 2.8e9), ("125m", 125e6), ("125M", 125e6), ("70k", 7e4), ("1.4T", 1.4e12), ("1,000,000", 1e6)),
        *(("3e8", 3e8), (" -1.5 ", -1.5), (".5", 0.5), ("1.3 B", 1.3e9), (7, 7.0)),
    ],
)
def test_numbers_as_people_write_them(text, value):
    assert number(text) == pytest.approx(value, rel=1e-15)


@pytest.mark.parametrize("text", ["", "B", "2.8BB", "1,0", "1e", "true", True, "2.8X"])
def test_what_is_no_number(text):
    with pytest.raises(ValueError, match="could not convert"):
        number(text)


def test_a_cell_is_a_number_or_a_text():
    assert [cell(raw) for raw in ("2B", "c4", None, 3)] == [2e9, "c4", "", 3.0]
    assert np.isnan(cell("nan"))
