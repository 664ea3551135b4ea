"""What processes must have been given alike: the differences that are told, and the code that they run."""

import sys

import jax

from runtime.agreement import code_versions, differing, require_same, require_shared


def test_the_same_values_do_not_differ():
    values = {"optimizer.lr": 1e-3, "data.path": None, "sample.prompts": ("a", "b")}  # JSON has no tuples
    assert differing(values, {"optimizer.lr": 1e-3, "data.path": None, "sample.prompts": ["a", "b"]}, 1) == []


def test_each_difference_is_told_with_its_key_and_both_values():
    ours = {"seed": 1, "model.width": 8, "late": None}
    theirs = {"seed": 0, "model.width": 8, "early": 1}
    assert differing(ours, theirs, 3) == [
        "seed is 0 in process 0 and 1 in process 3",
        "early is 1 in process 0 and absent in process 3",
        "late is absent in process 0 and None in process 3",
    ]


def test_one_process_agrees_with_itself(tmp_path):
    require_same({"seed": 1})
    require_shared(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_code_is_told_by_file_and_version(tmp_path, monkeypatch):
    before = code_versions()
    assert before["the version of jax"] == jax.__version__
    assert {"runtime/agreement.py", "runtime/leave.py"} <= before.keys()
    assert not any(".venv" in name for name in before)
    changed = tmp_path / "runtime" / "agreement.py"
    changed.parent.mkdir()
    changed.write_text("another version")
    monkeypatch.setattr("runtime.agreement.ROOT", tmp_path)
    monkeypatch.setattr(sys.modules["runtime.agreement"], "__file__", str(changed))
    assert code_versions()["runtime/agreement.py"] != before["runtime/agreement.py"]
