"""The points of the growth table, its text, and the section of the results file."""

from bench import growth
from config import compose, layout, schema


def row(dial: str, value: int, speed: float | None, memory: float = 8.0, compile_s: float = 2.0) -> dict:
    about = {"dial": dial, "value": value, "parameters": 1_000_000}
    return {**about, "tokens_per_s": speed, "step_mib": memory, "compile_s": compile_s}


def test_every_point_is_a_legal_config_and_changes_one_dial():
    base = schema.identity(compose.load(list(growth.BASE)))
    for point in growth.points():
        asked = compose.load([*growth.BASE, *point.overrides])
        layout.mesh_sizes(asked, point.devices)
        if (point.dial, point.value) in [("width", 128), ("layers", 4), ("sequence", 128), ("batch", 16)]:
            assert schema.identity(asked) == base, "every dial goes through the base"


def test_rows_are_relative_to_the_base():
    rows = [row("layers", 2, 50.0), row("layers", 4, 40.0), row("layers", 8, 20.0, memory=12.0)]
    last = growth.table(rows).splitlines()[-1]
    assert last == "| layers | 8 | 1.00M | 20 | 0.50 | 12 | 1.50 | 2.0 |"


def test_what_is_only_compiled_has_its_compile_time_compared():
    rows = [row("scanned layers", 8, None), row("scanned layers", 80, None, compile_s=2.6)]
    assert "| 1.30x compile |" in growth.table(rows)


def test_a_section_is_replaced_in_place():
    once = growth.replaced("# Results\n\nbefore\n", "first\n")
    twice = growth.replaced(once + "after\n", "second\n")
    assert "first" not in twice
    assert twice.startswith("# Results\n\nbefore\n")
    assert twice.endswith("after\n")
    assert growth.replaced(twice, "second\n") == twice
