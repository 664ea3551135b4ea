"""Corpora prepared by hand: whole or absent, the same however they were made, refused where they are damaged."""

import json
import os
import shutil
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest

from config import compose
from data.__main__ import main
from data.corpus import DataConfig, is_heldout
from data.opening import open_corpora
from data.shards import prepare
from data.tokenizer import TokenizerConfig, train_bpe

TEXTS = [f"document number {i} says {i * i % 977} {'ha' * (i % 50)} 猫 {i * 31}" for i in range(400)]


@pytest.fixture
def source(tmp_path):
    for number in range(4):
        lines = (json.dumps({"text": text}) + "\n" for text in TEXTS[number::4])
        (tmp_path / f"part-{number}.jsonl").write_text("".join(lines))
    return tmp_path / "part-*.jsonl"


@pytest.fixture
def in_order():
    return [text for number in range(4) for text in TEXTS[number::4]]


@pytest.fixture
def tokenizer(tmp_path):
    path = tmp_path / "words.json"
    train_bpe(TEXTS, 300).save(path)
    return path


def run(out, source, *more, cache=None):
    cache = cache or Path(str(source)).parent / "cache"
    workers = () if "--workers" in more else ("--workers", "1")
    return main(["prepare", str(out), f"data.path={source}", f"data.cache={cache}", *more, *workers])


def opened(path, cache, **more):
    return prepare(DataConfig("prepared", str(path), cache=str(cache), **more), TokenizerConfig())


def texts_of(tokens, tokenizer):
    stream, starts = tokens.slice(0, len(tokens)), [0, *tokens.ends_N[:-1]]
    pieces = [stream[start:end] for start, end in zip(starts, tokens.ends_N, strict=True)]
    assert all(piece[-1] == tokenizer.eos_id for piece in pieces)
    return [tokenizer.decode(piece) for piece in pieces]


def index_of(folder):
    return json.loads((Path(folder) / "index.json").read_text())


def test_a_corpus_and_its_card(source, tmp_path, tokenizer, in_order, capsys):
    out = tmp_path / "corpus"
    options = ("tokenizer=file", f"tokenizer.path={tokenizer}", "--shard-tokens", "900", "--workers", "1")
    assert run(out, source, *options) == 0
    said = capsys.readouterr().out
    dataset = opened(out, tmp_path / "cache")
    assert texts_of(dataset.train, dataset.tokenizer) == [t for t in in_order if not is_heldout(t, 0.05)]
    assert texts_of(dataset.heldout, dataset.tokenizer) == [t for t in in_order if is_heldout(t, 0.05)]
    index, card = index_of(out), json.loads((out / "card.json").read_text())
    assert sum(shard["split"] == "train" for shard in index["shards"]) > 5
    assert card["documents"] == 400 == sum(one["documents"] for one in card["lengths"])
    assert card["tokens"] == len(dataset.train) + len(dataset.heldout)
    assert card["bytes"] == sum(len(text.encode()) for text in TEXTS)
    lengths = np.diff([0, *dataset.train.ends_N]).tolist() + np.diff([0, *dataset.heldout.ends_N]).tolist()
    for one in card["lengths"]:
        assert one["documents"] == sum(one["from"] <= length <= one["to"] for length in lengths)
    assert "█" in said
    assert (out / "card.md").read_text() in said
    assert not list(tmp_path.glob("*.partial"))
    assert run(out, source, *options) == 0
    assert "is prepared already" in capsys.readouterr().out


def test_the_same_corpus_however_it_is_made(source, tmp_path, tokenizer, monkeypatch):
    options = ("tokenizer=file", f"tokenizer.path={tokenizer}", "--shard-tokens", "900")
    assert run(tmp_path / "one", source, *options, "--workers", "1") == 0
    assert run(tmp_path / "two", source, *options, "--workers", "3") == 0
    files = {path.name for path in (tmp_path / "one").iterdir()}
    assert files == {path.name for path in (tmp_path / "two").iterdir()}
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    assert run(tmp_path / "big", source, *options[:2]) == 0  # one shard
    a, b = (opened(tmp_path / name, tmp_path / "cache") for name in ("one", "big"))
    np.testing.assert_array_equal(a.train.slice(0, len(a.train)), b.train.slice(0, len(b.train)))
    # and the cache of train.py makes the same tokens by the same code
    text = DataConfig("text", str(source), cache=str(tmp_path / "cache"))
    c = prepare(text, TokenizerConfig("file", path=str(tokenizer)))
    np.testing.assert_array_equal(a.train.slice(0, len(a.train)), c.train.slice(0, len(c.train)))
    assert (a.train.bytes, a.train.documents) == (c.train.bytes, c.train.documents)


@pytest.mark.parametrize("kept", [0, 1, 4])
@pytest.mark.parametrize("bpe", [True, False])
def test_it_goes_on_after_the_last_whole_shard(source, tmp_path, monkeypatch, kept, bpe):
    tokenizer = ("tokenizer=bpe", "tokenizer.vocab_size=300") if bpe else ("tokenizer=bytes",)
    options = (*tokenizer, "--shard-tokens", "900")
    assert run(tmp_path / "whole", source, *options) == 0
    import data.writer as writer

    finish, made = writer.Shards.finish, []

    def stops(shards):
        if len(made) == kept:
            raise ValueError("stopped here")
        made.append(1)
        return finish(shards)

    monkeypatch.setattr(writer.Shards, "finish", stops)
    assert run(tmp_path / "corpus", source, *options) == 2
    assert not (tmp_path / "corpus").exists()
    partial = tmp_path / "corpus.partial"
    with (partial / "journal.jsonl").open("a") as file:
        file.write('{"shards": [{"na')  # killed while writing this
    before = {path: path.stat().st_mtime_ns for path in partial.glob("*.ends.npy")}
    monkeypatch.setattr(writer.Shards, "finish", finish)
    read = []
    items = writer.split
    monkeypatch.setattr(writer, "split", lambda *a, **k: (read.append(k.get("skip")), items(*a, **k))[1])
    assert run(tmp_path / "corpus", source, *options) == 0
    assert index_of(tmp_path / "corpus") == index_of(tmp_path / "whole")
    assert (tmp_path / "corpus/card.md").read_text() == (tmp_path / "whole/card.md").read_text()
    for path, time_ns in before.items():
        if int(path.name.split("-")[1].split(".")[0]) < kept:
            assert (tmp_path / "corpus" / path.name).stat().st_mtime_ns == time_ns  # not made again
    assert len(read) == 1  # the tokenizer was not trained again
    assert (read[0][1] > 0) == (kept > 0)


def test_other_settings_do_not_go_on(source, tmp_path, monkeypatch, capsys):
    def stops(*_):
        raise OSError(5, "stopped")

    monkeypatch.setattr("data.writer.write_card", stops)
    assert run(tmp_path / "corpus", source, "--shard-tokens", "900") == 2
    monkeypatch.undo()
    for other in (["data.heldout=0.2", "--shard-tokens", "900"], ["--shard-tokens", "800"]):
        assert run(tmp_path / "corpus", source, *other) == 2
        assert "corpus.partial was begun from other files or with other settings" in capsys.readouterr().err
    assert run(tmp_path / "corpus", source, "--shard-tokens", "900") == 0


def test_what_is_there_is_not_overwritten(source, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    assert run(tmp_path / "full", source) == 2
    assert "full is there and no prepared corpus: give another name" in capsys.readouterr().err
    assert run(tmp_path / "corpus", source) == 0
    assert run(tmp_path / "corpus", source, "data.heldout=0.2") == 2
    assert "holds a corpus of other files or settings" in capsys.readouterr().err
    (tmp_path / "part-0.jsonl").write_text('{"text": "new"}\n')
    assert run(tmp_path / "corpus", source) == 2  # of the same names, with other contents


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.steps=3"], "train.steps decides nothing here"),
        (["data.source=prepared"], "prepared"),
        (["--shard-tokens", "0"], "'0' is no number from 1 on"),
        (["data.fied=x"], "unknown data.fied; did you mean data.field"),
    ],
)
def test_mistakes(source, tmp_path, arguments, message, capsys):
    try:
        code = run(tmp_path / "corpus", source, *arguments)
    except SystemExit as end:
        code = end.code
    assert code == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert message in said[-1]
    assert not (tmp_path / "corpus").exists()


# ---- bad input ---------------------------------------------------------------------------------------------------


def test_bad_lines_are_refused_or_counted(source, tmp_path, capsys):
    bad = b'{"text": "good one"}\n{"text": \n{"text": "\xff"}\n{"text": ""}\n{"body": "x"}\n{"text": "last"}\n'
    (tmp_path / "part-9.jsonl").write_bytes(bad)
    assert run(tmp_path / "corpus", source) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "part-9.jsonl:2: not JSON" in said
    assert "--skip-bad" in said
    assert run(tmp_path / "corpus", source, "--skip-bad") == 2  # begun without it
    shutil.rmtree(tmp_path / "corpus.partial")
    assert run(tmp_path / "corpus", source, "--skip-bad") == 0
    card = json.loads((tmp_path / "corpus/card.json").read_text())
    assert card["documents"] == 402
    assert card["skipped"] == {"not JSON": 1, "not UTF-8": 1, "empty": 1, "no field 'text'": 1}
    assert [sample.split(":")[1] for sample in card["samples"]] == ["2", "3", "5"]
    text = (tmp_path / "corpus/card.md").read_text()
    assert "Left out: 1 not JSON" in text
    assert "part-9.jsonl:2: not JSON" in text


def test_empty_files_are_told(source, tmp_path):
    (tmp_path / "part-8.jsonl").write_bytes(b"")
    assert run(tmp_path / "corpus", source) == 0
    assert json.loads((tmp_path / "corpus/card.json").read_text())["skipped"] == {"empty": 1}
    assert "Left out: 1 empty documents" in (tmp_path / "corpus/card.md").read_text()


# ---- opening -----------------------------------------------------------------------------------------------------


@pytest.fixture
def corpus(source, tmp_path, tokenizer):
    out = tmp_path / "corpus"
    assert run(out, source, "tokenizer=file", f"tokenizer.path={tokenizer}", "--shard-tokens", "900") == 0
    return out


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    time.sleep(0.01)  # the clock of files is coarse
    path.write_bytes(content)


DAMAGE = {
    "flipped": (lambda c: flip(c / "train-00001.bin"), r"train-00001.bin is damaged: sha256"),
    "ends": (lambda c: flip(c / "train-00001.ends.npy"), r"train-00001.ends.npy is damaged"),
    "cut": (lambda c: os.truncate(c / "train-00001.bin", 100), r"train-00001.bin: 100 bytes, and index.json says"),
    "gone": (lambda c: (c / "train-00001.bin").unlink(), r"train-00001.bin: No such file"),
    "index": (lambda c: flip(c / "index.json"), r"index.json is damaged or no index"),
    "no index": (lambda c: (c / "index.json").unlink(), r"corpus is no prepared corpus: it has no index.json"),
    "tokenizer": (lambda c: (c / "tokenizer.json").write_text("{}"), r"tokenizer.json is not the tokenizer that made"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("seen", [True, False])
def test_damage_is_named(corpus, tmp_path, damage, seen):
    if seen:
        opened(corpus, tmp_path / "cache")
    act, message = DAMAGE[damage]
    act(corpus)
    with pytest.raises(ValueError, match=message) as caught:
        opened(corpus, tmp_path / "cache")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_replica_is_taken(corpus, tmp_path, damage):
    whole = opened(corpus, tmp_path / "cache")
    tokens = whole.train.slice(0, len(whole.train))
    shutil.copytree(corpus, tmp_path / "replica")
    DAMAGE[damage][0](corpus)
    again = opened(corpus, tmp_path / "cache", replicas=(str(tmp_path / "replica"),))
    assert again.told == whole.told
    np.testing.assert_array_equal(again.train.slice(0, len(again.train)), tokens)


def test_files_are_hashed_once(corpus, tmp_path, monkeypatch):
    first = opened(corpus, tmp_path / "cache")
    monkeypatch.setattr("data.prepared.sha256_of", lambda path: pytest.fail(f"{path} was read again"))
    assert opened(corpus, tmp_path / "cache").told == first.told


def test_two_versions_are_told_apart(corpus, source, tmp_path, tokenizer):
    first = opened(corpus, tmp_path / "cache").told
    (tmp_path / "part-3.jsonl").write_text((tmp_path / "part-3.jsonl").read_text().replace("number 7 ", "number 8 "))
    assert run(tmp_path / "new", source, "tokenizer=file", f"tokenizer.path={tokenizer}", "--shard-tokens", "900") == 0
    second = opened(tmp_path / "new", tmp_path / "cache").told
    assert first["data (training tokens)"] == second["data (training tokens)"]
    assert first["data (digest of the tokens)"] != second["data (digest of the tokens)"]
    flip(corpus / "train-00001.bin")
    with pytest.raises(ValueError, match=r"train-.*damaged.*new holds another corpus"):
        opened(corpus, tmp_path / "cache", replicas=(str(tmp_path / "new"),))


def test_it_brings_its_tokenizer(corpus, tmp_path, tokenizer):
    asked = ["data=prepared", f"data.path={corpus}"]
    config = compose.load(asked)
    assert (config.tokenizer.kind, config.tokenizer.path) == ("file", f"{corpus}/tokenizer.json")
    assert config.model.vocab_size == 300
    assert compose.load(["data=prepared", f"data.path={corpus}", "tokenizer=file", f"tokenizer.path={tokenizer}"])
    with pytest.raises(ValueError, match="tokenizer=bpe is trained on texts"):
        compose.load(["data=prepared", f"data.path={corpus}", "tokenizer=bpe"])
    train_bpe(["other"], 280).save(tmp_path / "other.json")
    with pytest.raises(ValueError, match="other.json is not the tokenizer of data.path"):
        compose.load([*asked, "tokenizer=file", f"tokenizer.path={tmp_path}/other.json"])
    with pytest.raises(ValueError, match="nowhere is no prepared corpus"):
        compose.load(["data=prepared", "data.path=nowhere"])


def test_prepared_corpora_in_a_mixture(corpus, source, tmp_path):
    mixture = f"data.mixture={{a: {{source: prepared, path: {corpus}}}, b: {{path: '{source}'}}}}"
    config = compose.load(["data.source=mixture", mixture, f"data.cache={tmp_path}/cache"])
    assert config.model.vocab_size == 300
    corpora = open_corpora(config.data, config.tokenizer)
    a, b = (corpora.by_name[name].train for name in "ab")
    np.testing.assert_array_equal(a.slice(0, len(a)), b.slice(0, len(b)))


# ---- stores ------------------------------------------------------------------------------------------------------


@pytest.fixture
def stored(source, tmp_path):
    memory = fsspec.filesystem("memory")
    memory.rm("/", recursive=True) if memory.exists("/corpus") else None
    address = "memory://corpus"
    assert run(address, source, "tokenizer=bytes", "--shard-tokens", "2000", cache=tmp_path / "cache") == 0
    return address


def test_a_corpus_in_a_store(stored, source, tmp_path):
    assert run(tmp_path / "here", source, "tokenizer=bytes", "--shard-tokens", "2000") == 0
    assert not list((tmp_path / "cache" / "staging").iterdir())
    here, there = opened(tmp_path / "here", tmp_path / "cache"), opened(stored, tmp_path / "cache")
    assert here.told == there.told
    np.testing.assert_array_equal(here.train.slice(0, len(here.train)), there.train.slice(0, len(there.train)))
    np.testing.assert_array_equal(here.train.ends_N, there.train.ends_N)


def test_copies_stay_within_their_bound(stored, tmp_path, caplog):
    cache, limit = tmp_path / "small", 20_000
    dataset = opened(stored, cache, cache_gb=limit / 1e9)
    assert "shards are fetched again and again; set data.cache_gb=" in caplog.text
    whole = np.concatenate([dataset.train.slice(i, i + 50) for i in range(0, len(dataset.train) - 50, 50)])
    largest = 0
    draw = np.random.default_rng(0)
    for _ in range(40):
        starts = draw.integers(0, len(whole) - 30, 8)
        np.testing.assert_array_equal(dataset.train.read(starts, 30), np.stack([whole[s : s + 30] for s in starts]))
        largest = max(largest, sum(path.stat().st_size for path in (cache / ".shards").iterdir()))
    assert limit / 2 < largest <= limit
    with pytest.raises(ValueError, match="allows for less; set data.cache_gb="):
        opened(stored, tmp_path / "tiny", cache_gb=100 / 1e9).train.slice(0, 10)


def test_a_damaged_shard_of_a_store(stored, tmp_path, monkeypatch):
    memory = fsspec.filesystem("memory")
    memory.copy("/corpus", "/replica", recursive=True)
    content = bytearray(memory.cat_file("/corpus/train-00002.bin"))
    content[5] ^= 4
    memory.pipe_file("/corpus/train-00002.bin", bytes(content))
    dataset = opened(stored, tmp_path / "a")
    with pytest.raises(ValueError, match="memory://corpus/train-00002.bin: .*damaged, sha256"):
        dataset.train.slice(0, len(dataset.train))
    dataset = opened(stored, tmp_path / "b", replicas=("memory://replica",))
    assert len(dataset.train.slice(0, len(dataset.train))) == len(dataset.train)
    memory.rm("/corpus/train-00003.bin")
    dataset = opened(stored, tmp_path / "c", replicas=("memory://replica",))
    assert len(dataset.train.slice(0, len(dataset.train))) == len(dataset.train)
