"""Two hosts, each with files of its own: they train on one version of a corpus, or not at all."""

import json
import shutil

import pytest
import runs

from data.__main__ import main
from runtime.overrides import override


@pytest.fixture
def homes(tmp_path):
    """Two home folders with the same corpus, and the shard that the tests change."""
    text = runs.corpus(tmp_path / "text")
    out = tmp_path / "home0" / "corpus"
    out.parent.mkdir()
    made = [
        "prepare",
        str(out),
        f"data.path={text}/*.txt",
        "data.heldout=0.2",
        "tokenizer=bpe",
        "tokenizer.vocab_size=280",
    ]
    assert main([*made, f"data.cache={tmp_path}/cache", "--workers", "1"]) == 0
    shutil.copytree(tmp_path / "home0", tmp_path / "home1")
    return [tmp_path / "home0", tmp_path / "home1"]


def train(tmp_path, homes, *more):
    tiny = [word for word in runs.TINY if word not in ("data=text", "data.heldout=0.2")]
    words = [
        *tiny,
        "data=prepared",
        override("data.path", "~/corpus"),
        f"run.dir={tmp_path}/run",
        "mesh.data=2",
        "train.steps=8",
    ]
    own = [[f"data.cache={home}/cache", *more] for home in homes]
    return runs.ended(runs.by_hand([*words, "train.steps=8"], *own, homes=homes))


def test_the_same_version(tmp_path, homes):
    codes, said = train(tmp_path, homes)
    assert codes == [0, 0], said
    assert "~/corpus/tokenizer.json" in (tmp_path / "run" / "config.yaml").read_text()


def test_another_version_of_a_shard(tmp_path, homes):
    """The second host has a corpus of as many tokens that is whole, too, of a text with one word changed."""
    text = tmp_path / "text" / "07.txt"
    text.write_text(text.read_text().replace("mesh", "mehs"))
    index = json.loads((homes[1] / "corpus/index.json").read_text())
    tokenizer = homes[0] / "corpus" / "tokenizer.json"
    shutil.copy(tokenizer, tmp_path / "tokenizer.json")
    shutil.rmtree(homes[1] / "corpus")
    made = ["prepare", str(homes[1] / "corpus"), f"data.path={tmp_path}/text/*.txt", "data.heldout=0.2"]
    made += ["tokenizer=file", f"tokenizer.path={tmp_path}/tokenizer.json", f"data.cache={tmp_path}/cache"]
    assert main([*made, "--workers", "1"]) == 0
    assert json.loads((homes[1] / "corpus/index.json").read_text())["digest"] != index["digest"]
    codes, said = train(tmp_path, homes)
    assert codes == [2, 2], said
    assert any("all processes of a run need the same" in one and "data (digest of the t" in one for one in said), said
    assert "Traceback" not in "".join(said)


def test_a_damaged_copy(tmp_path, homes):
    shard = homes[1] / "corpus" / "train-00000.bin"
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    codes, said = train(tmp_path, homes)
    assert codes == [2, 2], said
    assert "train-00000.bin is damaged" in said[1]
    codes, said = train(tmp_path, homes, f"data.replicas=[{homes[0]}/corpus]")
    assert codes == [0, 0], said
