"""What each kind of task can be told is in docs/finetune.md, with the default that it has."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def own_options(path: Path) -> dict[str, object]:
    """The settings of a kind, by name, with their defaults: read from its source, without importing JAX."""
    classes = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)]
    fields = [line for one in classes if one.name == "Options" for line in one.body if isinstance(line, ast.AnnAssign)]
    return {field.target.id: ast.literal_eval(field.value) for field in fields}


def documented(kind: str) -> str:
    """The line of a kind in the table of task.options."""
    table = (ROOT / "docs/finetune.md").read_text().partition("| kind | `task.options.` |")[2]
    found = re.search(rf"^\| `{kind}` \| (.*) \|$", table, re.MULTILINE)
    return found[1] if found else ""


@pytest.mark.parametrize("path", sorted((ROOT / "finetune/tasks").glob("[a-z]*.py")), ids=lambda path: path.stem)
def test_options_are_documented_with_their_defaults(path):
    for name, default in own_options(path).items():
        told = re.search(rf"`{name}(?:=([^`]*))?`", documented(path.stem))
        assert told, f"{path.stem}: task.options.{name} is not in docs/finetune.md"
        if told[1] is not None and isinstance(default, bool | int | float):
            assert told[1] == str(default).lower()
