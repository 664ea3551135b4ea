"""JSON that other programs read: no NaN, whole or not there; and no writer of this room that goes around it."""

import ast
import json
from pathlib import Path

import numpy as np
import pytest

from scaling.strict_json import dumps, write

ROOM = Path(__file__).parents[2] / "scaling"


def refuse(word):
    raise AssertionError(f"{word} is not JSON")


def test_what_is_not_finite_is_null():
    value = {"a": [float("nan"), 1.5, (np.float64("inf"), np.int64(3))], 7: np.array([1.0, np.nan]), "t": "NaN"}
    read = json.loads(dumps(value), parse_constant=refuse)
    assert read == {"a": [None, 1.5, [None, 3]], "7": [1.0, None], "t": "NaN"}


def test_a_file_is_whole_or_the_one_before(tmp_path):
    write(tmp_path / "out.json", {"x": 1})
    with pytest.raises(TypeError):
        write(tmp_path / "out.json", {"x": object()})
    assert json.loads((tmp_path / "out.json").read_text()) == {"x": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["out.json"]


def test_files_are_written_through_it():
    """json.dumps is left for digests alone: each call in this room is hashed, or sorts its keys for a hash."""
    loose = []
    for file in ROOM.rglob("*.py"):
        tree = ast.parse(file.read_text())
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            if ast.unparse(call.func) in ("json.dump", "json.dumps"):
                strict = {word.arg for word in call.keywords} & {"sort_keys", "allow_nan"}
                within = "sha256" in ast.get_source_segment(file.read_text(), _statement(tree, call))
                loose += [] if strict or within else [f"{file}:{call.lineno}"]
    assert loose == []


def _statement(tree, call):
    """The smallest statement that the call is in."""
    holding = [node for node in ast.walk(tree) if isinstance(node, ast.stmt) and call in ast.walk(node)]
    return min(holding, key=lambda node: node.end_lineno - node.lineno)
