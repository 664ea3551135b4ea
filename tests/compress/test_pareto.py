"""Several compressions beside each other: which are best for their size, and what is not comparable."""

import json
from pathlib import Path

import pytest

from compress.__main__ import main
from compress.options import parse
from compress.pareto import best, points_of


def folder(path: Path, recipe: str, memory: int, loss: float, group: int = 64, before: float = 2.0) -> Path:
    path.mkdir()
    side = lambda memory, loss: {"memory": memory, "disk": memory + 9, "loss": loss, "reads": 5.0, "writes": None}
    asked = {"name": recipe, "group": group, "tables": "int8", "wide": [], "share": 0.5, "sizes": {}}
    cost = {"recipe": recipe, "before": side(400, before), "after": side(memory, loss), "stderr": 0.01}
    cost |= {"change": loss / before - 1, "provenance": {"recipe": asked}}
    (path / "cost.json").write_text(json.dumps(cost))
    return path


@pytest.fixture
def folders(tmp_path):
    made = [("int8", 100, 2.01), ("int4", 60, 2.3), ("int4", 70, 2.1, 32), ("int4-gptq", 60, 2.05), ("fp8", 100, 2.02)]
    return [folder(tmp_path / str(number), *one) for number, one in enumerate(made)]


def test_the_best_for_their_size(folders):
    points = points_of(folders)
    assert [p.name for p in points] == ["before", "int8", "int4 group=64", "int4 group=32", "int4-gptq", "fp8"]
    assert [p.name for p in best(points)] == ["int4-gptq", "int8", "before"]


def test_a_table_and_a_picture(folders, tmp_path, capsys):
    words = ["compare", *map(str, folders), "--picture"]
    for name, begin in (("all.svg", b"<?xml"), ("all.png", b"\x89PNG")):
        assert main(parse([*words, str(tmp_path / name)])) == 0
        assert (tmp_path / name).read_bytes().startswith(begin)
    out = capsys.readouterr().out
    assert "| **int4-gptq** | 0.00 | 0.00 | 0.150x | 2.05000 | +2.50% ± 0.50% | 5 |  |" in out
    assert "| int4 group=64 |" in out


def test_an_encoder_has_the_loss_and_the_first_metric_of_its_task(tmp_path, capsys):
    for name, memory, loss, accuracy in (("int8", 100, 0.22, 0.9), ("int4", 60, 0.3, 0.8)):
        file = folder(tmp_path / name, name, memory, loss) / "cost.json"
        cost = json.loads(file.read_text())
        for side, metrics in (
            ("before", {"accuracy": 0.92, "loss": 0.2}),
            ("after", {"accuracy": accuracy, "loss": loss}),
        ):
            cost[side] |= {"loss": None, "task": metrics}
        file.write_text(json.dumps(cost | {"change": None, "stderr": None}))
    assert main(parse(["compare", str(tmp_path / "int8"), str(tmp_path / "int4")])) == 0
    out = capsys.readouterr().out
    assert "| held-out loss | change | accuracy | tokens/s read |" in out
    assert "| 0.20000 |  | 0.9200 |" in out
    assert "| 0.22000 | +10.00% ± 0.00% | 0.9000 |" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["0", "other"], "they are not of one model and one text"),
        (["0", "none"], "none"),
        (["0", "--picture", "all.jpg"], "all.jpg is neither .svg nor .png"),
    ],
)
def test_mistakes_are_one_line(folders, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "other", "int8", 100, 2.0, before=3.0)
    try:
        code = main(parse(["compare", *words]))
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert message in err.strip().splitlines()[-1]
