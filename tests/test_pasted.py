"""Advice survives a shell: what a message tells to write is pasted into `sh` and gives what was meant."""

import re
import subprocess
import sys

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from config import command_line, compose
from data.corpus import DataConfig, source_files
from inference import options
from runtime import launch
from runtime.overrides import override, pasted

HOSTILE = ["a,b", "~/x/*.md", "it's", 'say "a"', "back\\", '\\"', "${x}", "\\${x}", "$(x) `x`", "[a]", "{a: b}", "é猫"]
HOSTILE += ["", " a ", "null", "True", "3", "1e3", "0x1F", "a=b", "a#b", "-x", "!x", "a;b&c|d>e", "%s", "*", "a\\ b"]
TEXTS = st.text(alphabet="\\\"'${}[]()~#=,:; abé\t", max_size=8)


def words(typed: str, folder=None) -> list[str]:
    """The words that a shell makes of what is typed."""
    script = f"for word in {typed}; do printf '%s\\0' \"$word\"; done"
    done = subprocess.run(["sh", "-c", script], cwd=folder, capture_output=True, check=True)
    assert done.stderr == b""
    return done.stdout.decode().split("\0")[:-1]


def advice(overrides: list[str], after: str) -> str:
    """What the message about these overrides says to write behind the words `after`."""
    with pytest.raises(ValueError, match=re.escape(after)) as error:
        compose.load(overrides)
    message = str(error.value)
    assert "\n" not in message
    return message.partition(after)[2].partition(", as a list")[0]


@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
@example(text="\\" * 3 + '"' + "\\" * 2)
def test_any_text_comes_through_hydra(text):
    assert compose.load([override("run.name", text)]).run.name == text


@pytest.mark.parametrize("text", HOSTILE)
def test_any_text_comes_through_shell_and_hydra(text, tmp_path):
    (tmp_path / "file").touch()  # which a bare * would match
    (word,) = words(pasted("run.name", text), tmp_path)
    assert compose.load([word]).run.name == text


@pytest.mark.parametrize("text", ["~/notes/**/*.md", "a#b", "a=b", "it's", "é.txt", "/a/[b] c", "(x)", "{a"])
def test_what_cannot_be_read_is_told_with_what_can(text):
    (word,) = words(advice([f"run.name={text}"], "as a text write "))
    assert compose.load([word]).run.name == text


def test_several_values_are_a_text_or_a_list_on_request(tmp_path):
    text = advice(["wandb.tags=a b,c"], "as one text write ")
    assert compose.load(words(text, tmp_path)).wandb.tags == ("a b,c",)
    with pytest.raises(ValueError, match="is several values: for a run of each add -m") as error:
        compose.load(["wandb.tags=a b,c"])
    assert compose.load(words(str(error.value).partition("as a list ")[2], tmp_path)).wandb.tags == ("a b", "c")


def test_the_example_of_a_path_reaches_the_run_whole(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.md").write_text("x")
    found = compose.load(["data=text", *words(advice(["data=text"], "as in "), tmp_path)])
    assert found.data.path == "~/notes/**/*.md"
    assert [path.name for path in source_files(found.data)] == ["a.md"]


def test_a_folder_is_told_with_the_pattern_for_its_files(tmp_path):
    folder = tmp_path / "it's a (b),c"
    folder.mkdir()
    (folder / "a.txt").write_text("x")
    with pytest.raises(ValueError, match="is a folder") as error:
        source_files(DataConfig("text", path=str(tmp_path)))
    (word,) = words(str(error.value).partition("as in ")[2], tmp_path)
    assert [path.name for path in source_files(compose.load(["data=text", word]).data)] == ["a.txt"]
    with pytest.raises(ValueError, match="is a folder") as error:
        source_files(DataConfig("text", path=str(folder)))
    (word,) = words(str(error.value).partition("as in ")[2], tmp_path)
    assert [path.name for path in source_files(compose.load(["data=text", word]).data)] == ["a.txt"]


@pytest.mark.parametrize("name", ["a,b", "it's", "~x", "a=b", "${x}"])
def test_the_commands_at_the_end_of_a_run(name, tmp_path, monkeypatch):
    given = [override("run.dir", str(tmp_path / name)), override("run.name", name), 'sample.prompts=["-x=1"]']
    monkeypatch.setattr(sys, "argv", ["train.py", *given])
    config = compose.load(given)
    told = command_line.next_commands(config, launch.words(), done=True)
    assert compose.load(words(told["extend"])[2:]).run == config.run
    (tmp_path / name).mkdir()
    (tmp_path / name / "config.yaml").touch()
    asked = options.parse(words(told["generate"])[3:])
    assert (asked.run, asked.prompts) == (tmp_path / name, ["-x=1"])


def test_a_list_of_one_needs_no_brackets():
    assert compose.load(["wandb.tags=a"]).wandb.tags == ("a",)
    assert compose.load(["wandb.tags=3"]).wandb.tags == ("3",)
    assert compose.load(['sample.prompts="a,b"']).sample.prompts == ("a,b",)
    for wrong in ("null", "{a: b}"):
        with pytest.raises(ValueError, match=r"wandb.tags=.* should be a list, as in \[a,b\]"):
            compose.load([f"wandb.tags={wrong}"])
