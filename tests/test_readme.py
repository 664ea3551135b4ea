"""The README and docs tell the truth: their commands are accepted, and what they name exists."""

import re
import shlex
from pathlib import Path

import pytest

import performance.__main__ as performance
import planner.__main__ as planner
import scaling.__main__ as scaling
import serving.__main__ as serving
import tracking.__main__ as tracking
from config import command_line, compose, layout
from evaluation import options as evaluation
from inference.options import parse
from runtime import commands

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = [
    (page.name, line)
    for page in PAGES
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]


def test_there_are_commands():
    assert len([line for page, line in COMMANDS if page == "README.md"]) >= 10


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=[line[:50] for _, line in COMMANDS])
def test_commands_are_accepted(page, line, tmp_path, monkeypatch):
    words = shlex.split(line, comments=True)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    assert words[0] == "python"
    words = words[1:]
    if words[:2] == ["-m", "runtime.launch"]:
        words = words[words.index("train.py") :]
    if words[:2] in (["-m", "inference"], ["-m", "evaluation"]):
        run = tmp_path / words[2]
        run.mkdir(parents=True)
        (run / "config.yaml").write_text(compose.to_yaml(compose.load([])))
        monkeypatch.chdir(tmp_path)
        (parse if words[1] == "inference" else evaluation.parse)(words[2:])
        return
    if words[:2] == ["-m", "scaling"]:
        commands.parser("scaling", "", scaling.COMMANDS, words[2]).parse_intermixed_args(words[3:])
        return
    if words[:2] == ["-m", "serving"]:
        name, rest = (words[2], words[3:]) if words[2] in serving.COMMANDS else (serving.SERVE, words[2:])
        commands.parser("serving", "", serving.COMMANDS, name).parse_intermixed_args(rest)
        return
    if words[:2] == ["-m", "tracking"]:
        assert tracking.options(words[2:]).runs
        return
    if words[:2] == ["-m", "planner"]:
        ways = {"inference": planner.inference_arguments, "calibrate": planner.calibrate_arguments}
        read, rest = (ways[words[2]], words[3:]) if words[2] in ways else (planner.arguments, words[2:])
        assert compose.load(read(rest)[1])
        return
    if words[0] == "train.py":
        words = words[1:]
    elif words[:2] == ["-m", "performance"]:
        options, words = performance.arguments(words[2:])
        assert options.hardware in performance.TARGETS
    else:
        assert words[:2] == ["-m", "training.parity"]
        words = words[2:]
    for job in command_line.command_line(words):
        devices = job.runtime.cpu_devices * (2 if "runtime.launch" in line else 1)
        assert layout.mesh_sizes(job, devices)


def test_named_files_exist():
    for page in PAGES:
        text = page.read_text()
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"
    tree = re.search(r"## The tree\n\n```text\n(.*?)```", PAGES[0].read_text(), re.DOTALL)[1]
    for line in tree.splitlines():
        folder, rest = line.split(maxsplit=1)
        assert (ROOT / folder).exists(), folder
        for name in re.findall(r"\b\w+\.(?:py|md)\b", rest):
            assert (ROOT / folder / name).exists(), f"{folder}{name}"


def test_presets_named_are_all_there_are():
    named = re.search(r"`model=([\w|]+)`", PAGES[0].read_text())[1].split("|")
    assert {*named, "nano"} == {path.stem for path in (ROOT / "conf" / "model").glob("*.yaml")}
