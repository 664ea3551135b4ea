"""The cache of prepared tokens: right, whole or absent, shared by processes, renewed when its source changes."""

import errno
import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from config.build import build
from data.corpus import DataConfig, is_heldout, items
from data.shards import prepare
from data.tokenizer import TokenizerConfig

ROOT = Path(__file__).parents[2]
BPE = TokenizerConfig("bpe", vocab_size=270)
TEXTS = [f"document number {i} says {'ha' * (i % 7)} 猫" for i in range(40)]


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


@pytest.fixture
def data(source, tmp_path):
    return DataConfig("text", str(source), heldout=0.2, cache=str(tmp_path / "new" / "cache"))


def split(stream, tokenizer):
    stream = stream.slice(0, len(stream))
    ends = np.flatnonzero(stream == tokenizer.eos_id)
    assert ends[-1] == len(stream) - 1
    return [tokenizer.decode(part) for part in np.split(np.asarray(stream), ends + 1)[:-1]]


def whole(stream):
    return stream.slice(0, len(stream))


def entries(cache):
    return sorted(path.name for path in Path(cache).iterdir() if path.name[0] != "." and path.name != "sources")


def temporary(cache):
    return list(Path(cache).rglob(".tmp-*"))


def start(code, data, tokenizer=BPE):
    """A process of its own with `data` and `tokenizer` in scope."""
    names = "import data.shards as shards, data.writer as writer\nfrom data.shards import *\n"
    names += f"data, tokenizer = {data!r}, {tokenizer!r}\n"
    return subprocess.Popen([sys.executable, "-c", names + code], stdout=subprocess.PIPE, text=True, cwd=ROOT)


@pytest.mark.parametrize("tokenizer", [TokenizerConfig(), BPE], ids=["bytes", "bpe"])
def test_streams_hold_the_documents_of_their_split(data, tokenizer):
    dataset = prepare(data, tokenizer)
    assert split(dataset.train, dataset.tokenizer) == [text for text in TEXTS if not is_heldout(text, 0.2)]
    assert split(dataset.heldout, dataset.tokenizer) == [text for text in TEXTS if is_heldout(text, 0.2)]
    assert dataset.train.dtype == np.uint16
    array = dataset.train.parts[0].array()
    assert isinstance(array.base, np.memmap)
    assert not array.flags.writeable
    splits = json.loads(Path(dataset.directory, "index.json").read_text())["splits"]
    assert splits["train"]["tokens"] == len(dataset.train)
    size = sum(len(text.encode()) for text in TEXTS)
    assert splits["train"]["bytes"] + splits["heldout"]["bytes"] == size == dataset.train.bytes + dataset.heldout.bytes


def test_a_large_vocabulary_takes_four_bytes(data):
    dataset = prepare(data, TokenizerConfig("bpe", vocab_size=70_000))
    assert dataset.train.dtype == np.uint32
    assert len(split(dataset.train, dataset.tokenizer)) + len(split(dataset.heldout, dataset.tokenizer)) == len(TEXTS)


def test_bpe_learns_from_training_documents_only(tmp_path):
    train = [text for text in (f"common words {i}" for i in range(50)) if not is_heldout(text, 0.2)]
    heldout = next(t for t in (f"zzzzzzzz {i} " * 50 for i in range(99)) if is_heldout(t, 0.2))
    for number, text in enumerate([*train, heldout]):
        (tmp_path / f"{number}.txt").write_text(text)
    data = DataConfig("text", f"{tmp_path}/*.txt", heldout=0.2, cache=str(tmp_path / "cache"))
    assert (prepare(data, BPE).tokenizer.token_bytes[prepare(data, BPE).tokenizer.encode("zzzzzzzz")] == 1).all()


def test_second_start_reads_the_cache(data, monkeypatch):
    first = prepare(data, BPE)
    monkeypatch.setattr("data.corpus.items", lambda *_: pytest.fail("the source was read again"))
    second = prepare(data, BPE)
    assert second.digest == first.digest
    assert second.tokenizer.digest == first.tokenizer.digest
    np.testing.assert_array_equal(whole(first.train), whole(second.train))


def test_second_start_on_the_standard_library_is_quick(tmp_path, monkeypatch):
    data = DataConfig(cache=str(tmp_path))
    prepare(data, TokenizerConfig())
    times = []
    for _ in range(3):
        before = time.perf_counter()
        prepare(data, TokenizerConfig())
        times.append(time.perf_counter() - before)
    assert min(times) < 0.2


def test_an_unchanged_source_is_not_even_hashed(data, source, monkeypatch):
    old = time.time_ns() - 3600 * 10**9
    os.utime(source, ns=(old, old))
    monkeypatch.setattr("data.shards.SETTLED_S", -1)
    first = prepare(data, BPE)
    monkeypatch.setattr("hashlib.file_digest", lambda *args: pytest.fail("the source was hashed again"))
    assert prepare(data, BPE).digest == first.digest
    for memo in (Path(data.cache) / "sources").iterdir():
        memo.write_text("cut sho")
    monkeypatch.undo()
    assert prepare(data, BPE).digest == first.digest


def test_the_key_is_the_content_and_the_settings(data, source, tmp_path):
    first = prepare(data, BPE)
    moved = source.rename(tmp_path / "moved.jsonl")
    here = DataConfig("text", str(moved), heldout=0.2, cache=data.cache, segments=True)
    assert prepare(here, BPE).digest == first.digest
    digests = {
        first.digest,
        prepare(here, TokenizerConfig()).digest,
        prepare(here, TokenizerConfig("bpe", vocab_size=280)).digest,
        prepare(DataConfig("text", str(moved), heldout=0.3, cache=data.cache), BPE).digest,
    }
    times = moved.stat()
    moved.write_text(moved.read_text().replace("number 7", "number 0"))  # the same size, and the same time
    os.utime(moved, ns=(times.st_atime_ns, times.st_mtime_ns))
    changed = prepare(here, BPE)
    assert len(digests | {changed.digest}) == 5
    streams = split(changed.train, changed.tokenizer) + split(changed.heldout, changed.tokenizer)
    assert sum(text.startswith("document number 0 ") for text in streams) == 2
    elsewhere = DataConfig("text", str(moved), heldout=0.2, cache=str(tmp_path / "other"))
    assert prepare(elsewhere, BPE).digest == changed.digest
    assert prepare(elsewhere, BPE).tokenizer.digest == changed.tokenizer.digest


def test_a_tokenizer_file_is_part_of_the_key(data, tmp_path):
    trained = prepare(data, BPE)
    config = TokenizerConfig("file", path=str(tmp_path / "tokenizer.json"))
    trained.tokenizer.save(Path(config.path))
    first = prepare(data, config)
    np.testing.assert_array_equal(whole(first.train), whole(trained.train))
    Path(config.path).write_text(Path(config.path).read_text().replace("<|endoftext|>", "</s>"))
    assert prepare(data, config).digest != first.digest


@pytest.mark.parametrize(
    "name", ["train-00000.bin", "heldout-00000.bin", "train-00000.ends.npy", "index.json", "tokenizer.json"]
)
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_entry_is_made_again(data, name, damage):
    first = prepare(data, BPE)
    expected = whole(first.train), whole(first.heldout)
    path = Path(first.directory, name)
    path.unlink() if damage == "gone" else os.truncate(path, path.stat().st_size - 2)
    again = prepare(data, BPE)
    np.testing.assert_array_equal(whole(again.train), expected[0])
    np.testing.assert_array_equal(whole(again.heldout), expected[1])
    assert entries(data.cache) == [first.digest]
    assert not temporary(data.cache)


def test_two_processes_at_once_agree(data):
    code = "d = prepare(data, tokenizer, lambda what, *_: print(what))\n"
    code += "print(d.digest, d.tokenizer.digest, d.tokens_digest, len(d.train), len(d.heldout))"
    processes = [start(code, data) for _ in range(3)]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len({output.splitlines()[-1] for output in outputs}) == 1
    assert sum("tokenizing" in output for output in outputs) == 1  # the others waited for it, or came later
    assert len(entries(data.cache)) == 1
    assert not temporary(data.cache)


# Where a process is stopped for the kill, by the step of the preparation that it is about to take.
STOP = "import time\ndef stop(*args, **kw):\n    print('there', flush=True); time.sleep(60)\n"
PLACES = {
    "training": "writer.train = stop",
    "writing": "writer._chunks = stop",
    "index": "shards._publish = stop",
    "before the rename": "os.rename = stop",
}


@pytest.mark.parametrize("place", PLACES)
def test_a_killed_preparation_leaves_nothing_half_made(data, place):
    process = start(f"{STOP}{PLACES[place]}\nprepare(data, tokenizer)", data)
    assert process.stdout.readline() == "there\n"
    waiting = start("prepare(data, tokenizer, lambda what, *_: print(what, flush=True)); print('done')", data)
    while not waiting.stdout.readline().startswith("waiting for another process"):
        assert waiting.poll() is None
    assert entries(data.cache) == []
    assert len(temporary(data.cache)) == 1
    process.send_signal(signal.SIGKILL)
    output, _ = waiting.communicate(timeout=60)  # the lock ended with its holder
    process.communicate()
    assert output.endswith("done\n")
    assert not temporary(data.cache)
    dataset = prepare(data, BPE)
    assert split(dataset.train, dataset.tokenizer) == [text for text in TEXTS if not is_heldout(text, 0.2)]


def test_what_a_killed_one_left_is_removed_by_any_other(data, source):
    process = start(f"{STOP}shards._publish = stop\nprepare(data, tokenizer)", data)
    assert process.stdout.readline() == "there\n"
    prepare(data, TokenizerConfig())  # another entry: the living one's folder stays
    assert len(temporary(data.cache)) == 1
    process.kill()
    process.communicate()
    prepare(DataConfig("text", str(source), heldout=0.3, cache=data.cache), TokenizerConfig())
    assert not temporary(data.cache)


def test_an_error_leaves_nothing(data, source):
    source.write_text(source.read_text() + "damaged\n")
    with pytest.raises(ValueError, match=r"source.jsonl:41: not JSON"):
        prepare(data, BPE)
    assert entries(data.cache) == []
    assert not temporary(data.cache)


def test_a_source_that_changes_under_the_reader(data, source, monkeypatch):
    def changing(*arguments):
        yield from items(*arguments)
        source.write_text(json.dumps({"text": "new"}))

    monkeypatch.setattr("data.corpus.items", changing)
    with pytest.raises(ValueError, match="changed while"):
        prepare(data, TokenizerConfig())
    assert entries(data.cache) == []


def test_neither_side_is_ever_empty(data, source):
    for share, kept in ((1e-6, 1), (1 - 1e-6, 39)):
        dataset = prepare(DataConfig("text", str(source), heldout=share, cache=data.cache), TokenizerConfig())
        assert len(split(dataset.heldout, dataset.tokenizer)) == kept
        assert len(split(dataset.train, dataset.tokenizer)) == 40 - kept


def test_a_text_that_is_alone_is_cut_at_a_line(tmp_path):
    path, lines = tmp_path / "alone.txt", [f"line {i}\n" for i in range(100)]
    path.write_text("".join(lines))
    for config in (TokenizerConfig(), BPE):
        dataset = prepare(DataConfig("text", str(path), heldout=0.1, cache=str(tmp_path / "cache")), config)
        (head,), (tail,) = split(dataset.train, dataset.tokenizer), split(dataset.heldout, dataset.tokenizer)
        assert head + tail == "".join(lines)
        assert head.endswith("\n")
        assert 0.85 < len(head) / len(head + tail) <= 0.9
    for text in ("", "x"):
        path.write_text(text)
        with pytest.raises(ValueError, match="no text for training and evaluation"):
            prepare(DataConfig("text", str(path), cache=str(tmp_path / "cache")), TokenizerConfig())


def test_a_cache_that_cannot_be_written(source, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"data.cache=.*File exists; set data.cache"):
        prepare(DataConfig("text", str(source), cache=str(tmp_path / "file" / "cache")), BPE)


def test_a_full_disk_leaves_nothing(data, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ValueError, match=r"No space left on device; set data\.cache"):
        prepare(data, BPE)
    assert entries(data.cache) == []
    assert not temporary(data.cache)


def test_the_cache_is_private(data):
    prepare(data, BPE)
    folders = [Path(data.cache).parent, Path(data.cache), *(p for p in Path(data.cache).iterdir() if p.is_dir())]
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in folders} == {0o700}


def test_progress_counts_up_to_all_of_the_bytes(data, source):
    calls = []
    prepare(data, BPE, lambda *call: calls.append(call))
    assert list(dict.fromkeys(what for what, _, _ in calls)) == [
        "looking at the files",
        "training the tokenizer",
        "tokenizing",
    ]
    for what in ("training the tokenizer", "tokenizing"):
        done = [call[1] for call in calls if call[0] == what]
        assert done == sorted(done)
        assert (done[0], done[-1]) == (0, source.stat().st_size)
    assert {call[2] for call in calls} == {source.stat().st_size}


def test_presets_name_only_fields_that_exist():
    needed = {"text": {"path": "x.txt"}, "file": {"path": "tokenizer.json"}, "prepared": {"path": "corpus"}}
    for group, config in (("data", DataConfig), ("tokenizer", TokenizerConfig)):
        presets = list((ROOT / "conf" / group).glob("*.yaml"))
        assert len(presets) >= 3
        for preset in presets:
            values = yaml.safe_load(preset.read_text())
            made = build(config, {**values, **needed.get(preset.stem, {})})
            assert preset.stem in (getattr(made, "source", None), getattr(made, "kind", None))


def test_importing_data_is_light():
    code = "import sys, data.shards, data.loader; assert not {'jax', 'tokenizers', 'pandas'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
