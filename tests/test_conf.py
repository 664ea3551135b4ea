"""The YAML in conf/ gives values to documented keys, and all of it composes."""

import dataclasses
import json
import re

import pytest
import yaml

from config import build, compose, help, schema
from data.prepared import digest_of
from data.tokenizer import ByteTokenizer

CONF = compose.CONF
PRESETS = sorted(path.relative_to(CONF).with_suffix("").as_posix() for path in CONF.glob("*/*.yaml"))
NEEDED = {
    "data/text": ["data.path=notes.txt"],
    "data/prepared": ["data.path=corpus"],
    "tokenizer/file": ["tokenizer.path=tokenizer.json"],
}
CORPUS = {"format": 2, "dtype": "<u2", "vocab_size": 256, "eos_id": 0, "tokenizer": "bytes", "shards": []}
CORPUS |= {"tokenizer_digest": ByteTokenizer.digest}
TOKENIZER = '{"model": {"type": "BPE", "vocab": {"a": 0, "<|endoftext|>": 1}, "merges": []}}'


def assert_holds(section: dict, values: dict) -> None:
    """All of these values, nested, are in the section; null stands for what follows from others."""
    for key, value in values.items():
        if isinstance(value, dict):
            assert_holds(section[key], value)
        elif value is not None:
            assert section[key] == value


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_composes(preset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tokenizer.json").write_text(TOKENIZER)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/index.json").write_text(json.dumps(CORPUS | {"digest": digest_of(CORPUS)}))
    group, name = preset.split("/")
    composed = compose.load([f"{group}={name}", *NEEDED.get(preset, [])])
    values = yaml.safe_load((CONF / f"{preset}.yaml").read_text())
    values.pop("defaults", None)
    whole = dataclasses.asdict(composed)  # a task also sets what suits it of other groups
    assert_holds(whole if group == "task" else whole[group], values)


def test_defaults_are_those_of_the_main_job():
    default = compose.load([])
    assert (default.model.layers % 4, default.model.heads % 4, default.model.kv_heads % 4) == (0, 0, 0)
    assert default.model.vocab_size == 256
    assert default.data.source == "stdlib"
    assert default.run.dir.startswith("runs/nano-")


def test_there_are_few_keys_and_each_is_documented():
    keys = build.keys(schema.Config)
    assert len(keys) == len(set(keys))
    assert len(keys) < 160
    documented = dict(re.findall(r"^  ([\w.]+)=.*?  # (.+)$", help.help_text(), re.MULTILINE))
    assert set(keys) <= documented.keys(), "a key has no text"


def test_a_text_may_stand_before_its_key_and_is_never_cut():
    @dataclasses.dataclass
    class Settings:
        # told in
        # two lines
        first: int = 1
        second: str = "#"  # after it
        third: int = 3

    assert help.comments(Settings) == {"first": "told in two lines", "second": "after it"}


def test_the_config_is_frozen_and_plain():
    default = compose.load([])
    with pytest.raises(dataclasses.FrozenInstanceError):
        default.seed = 1
    again = build.build(schema.Config, yaml.safe_load(compose.to_yaml(default)))
    assert again == default
    assert hash(again) == hash(default)


def test_one_directory_for_the_same_numbers_whatever_the_mesh():
    directory = compose.load([]).run.dir
    for same in (
        "mesh.tensor=2",
        "train.steps=700",
        "train.log_every=1",
        "checkpoint.every=7",
        "runtime.cpu_devices=8",
    ):
        assert compose.load([same]).run.dir == directory
    for other in ("seed=1", "optimizer.lr=1", "model.dropout=0.1", "train.batch_size=64", "data.heldout=0.1"):
        assert compose.load([other]).run.dir != directory
    assert compose.load(["run.name=mine"]).run.dir.startswith("runs/mine-")


def test_a_group_of_several_kinds_has_the_keys_of_one():
    assert compose.load(["adapter=lora", "adapter.rank=3"]).adapter.rank == 3
    assert "adapter.rank" not in build.keys(schema.Config)
    assert "adapter.rank=8" in help.help_text(overrides=["adapter=dora"])
    again = compose.to_yaml(compose.load(["adapter=ia3"]))
    assert build.build(schema.Config, yaml.safe_load(again)) == compose.load(["adapter=ia3"])
    for words, said in (
        (["adapter.rank=3"], "adapter=none has no adapter.rank; it is a key of adapter=lora, adapter=adalora"),
        (["adapter=prefix", "adapter.rank=3"], "adapter=prefix has no adapter.rank; it is a key of"),
        (["adapter=lora", "adapter.rnk=3"], "unknown adapter.rnk; did you mean adapter.rank"),
        (["adapter=lora", "adapter.kind=lra"], "adapter.kind=lra is not one of none, freeze, lora"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            compose.load(words)


def test_adapters_belong_to_what_a_run_is():
    assert compose.load(["adapter=lora"]).run.dir != compose.load([]).run.dir
    assert compose.load(["adapter=lora", "adapter.rank=9"]).run.dir != compose.load(["adapter=lora"]).run.dir
    assert "adapter" not in schema.identity(compose.load([]))
