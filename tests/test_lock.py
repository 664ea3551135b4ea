"""The pinned versions: enough, exact, and within the bounds that pyproject.toml gives."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCK = [Requirement(line) for line in (ROOT / "requirements.lock").read_text().splitlines()]


def pins(python: str) -> dict[str, str]:
    """The version of each package on Linux with this Python."""
    on = default_environment() | {
        "python_version": python, "python_full_version": f"{python}.1", "sys_platform": "linux",
        "platform_machine": "x86_64",
    }  # fmt: skip
    found = [requirement for requirement in LOCK if requirement.marker is None or requirement.marker.evaluate(on)]
    names = [requirement.name for requirement in found]
    assert len(names) == len(set(names))
    return {requirement.name: str(requirement.specifier).removeprefix("==") for requirement in found}


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_pins_are_within_the_projects_bounds(python):
    locked = pins(python)
    extras = PROJECT["project"]["optional-dependencies"]
    asked = [*PROJECT["project"]["dependencies"], *extras["dev"], *extras["tensorboard"], *extras["search"]]
    for requirement in map(Requirement, asked):
        if requirement.name != PROJECT["project"]["name"]:
            version = locked[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version, prereleases=True), f"{requirement}, not {version}"
    for requirement in map(Requirement, PROJECT["tool"]["uv"]["constraint-dependencies"]):
        version = locked.get(requirement.name)
        assert version is None or requirement.specifier.contains(version), f"{requirement}, not {version}"


def test_the_lock_has_versions_only():
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        assert re.fullmatch(r"[a-z0-9-]+==[\w.]+( ; [\w .!<>='()]+)?", line), line
