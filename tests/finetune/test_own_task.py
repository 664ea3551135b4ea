"""A task of one's own, in a file outside of the project: the one that the guide shows."""

from pathlib import Path

import pytest
from tuning import ENCODER, assert_same, trace

from config import compose
from finetune.opening import open_task

ROOT = Path(__file__).parents[2]
STARS = Path(__file__).parent / "stars.py"


def test_it_trains_alike_on_every_mesh(tmp_path):
    rows = tmp_path / "rows.csv"
    rows.write_text("text,stars\n" + "".join(f"{'good ' * (i % 5)}film {i},{1 + i % 5}\n" for i in range(60)))
    own = [f"task.kind={STARS}", "task.head=classes", f"task.path={rows}", "task.heldout=0.2", *ENCODER]
    one = trace(own)
    assert 0 < one.metrics["mean_error"] < 3
    assert_same(trace(own, data=2, tensor=2), one)


def test_the_guide_shows_it_and_it_is_short():
    text = STARS.read_text()
    assert text in (ROOT / "docs" / "finetune.md").read_text()
    assert len(text.splitlines()) < 60


@pytest.mark.parametrize(
    ("text", "said"),
    [("import nothing_at_all", "ModuleNotFoundError"), ("x = 1", "has no class Task"), ("(", "SyntaxError")],
)
def test_a_file_that_holds_none_is_a_mistake(tmp_path, text, said):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(ValueError, match=said):
        open_task(compose.load([f"task.kind={tmp_path / 'mine.py'}", f"task.path={tmp_path}/a.csv"]))


def test_a_file_that_is_not_there_is_a_mistake(tmp_path):
    with pytest.raises(ValueError, match="there is no such file"):
        compose.load([f"task.kind={tmp_path / 'mine.py'}"])
