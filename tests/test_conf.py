"""The YAML in conf/ gives values to documented keys, and all of it composes."""

import dataclasses
from pathlib import Path

import pytest
import yaml

import config

CONF = Path(config.__file__).parent / "conf"
PRESETS = sorted(path.relative_to(CONF).with_suffix("").as_posix() for path in CONF.glob("*/*.yaml"))
NEEDED = {"data/text": ["data.path=notes.txt"], "tokenizer/file": ["tokenizer.path=tokenizer.json"]}
TOKENIZER = '{"model": {"type": "BPE", "vocab": {"a": 0, "<|endoftext|>": 1}, "merges": []}}'


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_composes(preset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tokenizer.json").write_text(TOKENIZER)
    group, name = preset.split("/")
    composed = config.load([f"{group}={name}", *NEEDED.get(preset, [])])
    values = yaml.safe_load((CONF / f"{preset}.yaml").read_text())
    section = dataclasses.asdict(getattr(composed, group))
    for key, value in values.items():
        if isinstance(value, dict):
            assert section[key].items() >= value.items()
        elif value is not None:
            assert section[key] == value


def test_defaults_are_those_of_the_main_job():
    default = config.load([])
    assert (default.model.layers % 4, default.model.heads % 4, default.model.kv_heads % 4) == (0, 0, 0)
    assert default.model.vocab_size == 256
    assert default.data.source == "stdlib"
    assert default.run.dir.startswith("runs/nano-")


def test_there_are_few_keys_and_each_is_documented():
    keys = config.keys()
    assert len(keys) == len(set(keys))
    assert len(keys) < 150
    documented = {line.split("=")[0].strip(): line for line in config.help_text().splitlines() if "=" in line}
    assert set(keys) <= documented.keys()


def test_the_config_is_frozen_and_plain():
    default = config.load([])
    with pytest.raises(dataclasses.FrozenInstanceError):
        default.seed = 1
    again = config.build(config.Config, yaml.safe_load(config.to_yaml(default)))
    assert again == default
    assert hash(again) == hash(default)


def test_one_directory_for_the_same_numbers_whatever_the_mesh():
    directory = config.load([]).run.dir
    for same in (
        "mesh.tensor=2",
        "train.steps=700",
        "train.log_every=1",
        "checkpoint.every=7",
        "runtime.cpu_devices=8",
    ):
        assert config.load([same]).run.dir == directory
    for other in ("seed=1", "optimizer.lr=1", "model.dropout=0.1", "train.batch_size=64", "data.heldout=0.1"):
        assert config.load([other]).run.dir != directory
    assert config.load(["run.name=mine"]).run.dir.startswith("runs/mine-")
