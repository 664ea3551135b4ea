"""Files of every kind give the same documents, here and in a store, and say what is wrong with file and line."""

import gzip
import json
import struct

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data.corpus import DataConfig, documents, items, source_files
from data.tokenizer import ByteTokenizer

TEXTS = ["one", 'with "quotes", commas', "two\nlines", "猫 café", "x" * 3000]


def config(path, **more):
    return DataConfig("text", str(path), **more)


def texts(path, tokenizer=None, **more):
    return [document.text for document in documents(config(path, **more), tokenizer)]


def csv_of(rows, comma=","):
    quoted = ['"' + row.replace('"', '""') + '"' for row in rows]
    return "".join(f"{n}{comma}{text}\n" for n, text in [("id", "text"), *enumerate(quoted)]).encode()


def table(**columns):
    return pa.table({"id": list(range(len(TEXTS))), "text": TEXTS} | columns)


def stream_of(content):
    with pa.OSFile(str(content[1]), "wb") as file, pa.ipc.new_stream(file, content[0].schema) as writer:
        writer.write_table(content[0], max_chunksize=2)


def file_of(content):
    with pa.OSFile(str(content[1]), "wb") as file, pa.ipc.new_file(file, content[0].schema) as writer:
        writer.write_table(content[0], max_chunksize=2)


def make(folder, name):
    """A file of this name that holds TEXTS."""
    path = folder / name
    kind = name.split(".")[1]
    if kind == "jsonl":
        path.write_bytes("".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode())
    elif kind in ("csv", "tsv"):
        path.write_bytes(csv_of(TEXTS, "\t" if kind == "tsv" else ","))
    elif kind == "parquet":
        pq.write_table(table(), path, row_group_size=2)
    else:
        {"stream": stream_of, "file": file_of}[name.split(".")[0]]((table(), path))
    if pack := {"gz": gzip.compress, "zst": zstandard.compress}.get(name.split(".")[-1]):
        path.write_bytes(pack(path.read_bytes()))
    return path


NAMES = ["a.jsonl", "a.csv", "a.tsv", "a.csv.gz", "a.tsv.zst", "a.parquet", "stream.arrow", "file.arrow"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("place", ["here", "store"])
def test_every_kind_gives_the_same_documents(tmp_path, name, place):
    path = make(tmp_path, name)
    if place == "store":
        fsspec.filesystem("memory").pipe_file(f"/{name}", path.read_bytes())
        path = f"memory://{name}"
    found = list(documents(config(path)))
    assert [document.text for document in found] == TEXTS
    assert 0.9 * source_size(path) <= found[-1].read <= source_size(path)  # an index may follow
    assert [document.read for document in found] == sorted(document.read for document in found)
    assert len({document.name for document in found}) == len(TEXTS)
    assert all(str(path) in document.name for document in found)


def source_size(path):
    if "://" in str(path):
        return fsspec.filesystem("memory").size(str(path).removeprefix("memory:/"))
    return path.stat().st_size


def test_patterns_in_a_store():
    memory = fsspec.filesystem("memory")
    for name in ("b.txt", "a.txt", "deep/c.txt", "d.md"):
        memory.pipe_file(f"/patterns/{name}", name.encode())
    assert texts("memory://patterns/*.txt") == ["a.txt", "b.txt"]
    assert sorted(texts("memory://patterns/**/*.txt,memory://patterns/d.md")) == [
        "a.txt",
        "b.txt",
        "d.md",
        "deep/c.txt",
    ]
    with pytest.raises(ValueError, match=r"data.path=memory://patterns/\*.csv matches no file"):
        texts("memory://patterns/*.csv")
    with pytest.raises(ValueError, match="memory://patterns/e.txt: not found"):
        texts("memory://patterns/e.txt")


def test_a_store_that_is_not_installed():
    with pytest.raises(ValueError, match="gs://bucket/a.txt: .*gcsfs"):
        texts("gs://bucket/a.txt")
    with pytest.raises(ValueError, match="abc://a.txt: .*[Pp]rotocol"):
        texts("abc://a.txt")


def test_the_folder_of_a_dataset(tmp_path):
    made = datasets.Dataset.from_dict({"text": TEXTS, "n": range(len(TEXTS))})
    made.save_to_disk(tmp_path / "one", num_shards=2)
    assert texts(tmp_path / "one") == TEXTS
    made.filter(lambda row: row["n"] > 2).save_to_disk(tmp_path / "chosen")
    assert texts(tmp_path / "chosen") == TEXTS[3:]
    datasets.DatasetDict({"train": made, "test": made}).save_to_disk(tmp_path / "both")
    with pytest.raises(ValueError, match=r"holds the splits train, test: name one, as in .*/both/train"):
        texts(tmp_path / "both")
    assert texts(tmp_path / "both" / "train") == TEXTS
    (tmp_path / "one" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(ValueError, match="data-00001-of-00002.arrow: named in .* and not there"):
        texts(tmp_path / "one")


def test_a_dataset_of_the_hub(tmp_path, monkeypatch):
    made = datasets.Dataset.from_dict({"text": TEXTS})
    made.save_to_disk(tmp_path / "there")
    asked = []

    def load_dataset(name, split, revision):
        asked.append((name, split, revision))
        return datasets.load_from_disk(tmp_path / "there")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert texts("hf://datasets/owner/name@v1") == TEXTS
    assert asked[0] == ("owner/name", "train", "v1")


def test_without_a_network_the_hub_is_one_line(monkeypatch):
    def unreachable(*arguments, **named):
        raise ConnectionError("Couldn't reach\nthe hub")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(ValueError, match="hf://datasets/a/b: the hub did not give it .Couldn't reach the hub.; where"):
        texts("hf://datasets/a/b")


# ---- tokens ------------------------------------------------------------------------------------------------------

DOCUMENTS = [[104, 105], [7] * 300, [200], [1, 2, 3]]


def megatron(path, sequences, borders, code=8, dtype="<u2"):
    """Written after the format's description, apart from the reader."""
    lengths = [len(sequence) for sequence in sequences]
    size = np.dtype(dtype).itemsize
    path.with_suffix(".bin").write_bytes(b"".join(np.array(s, dtype).tobytes() for s in sequences))
    pointers = [sum(lengths[:i]) * size for i in range(len(lengths))]
    content = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(lengths), len(borders))
    content += struct.pack(f"<{len(lengths)}i", *lengths) + struct.pack(f"<{len(pointers)}q", *pointers)
    path.with_suffix(".idx").write_bytes(content + struct.pack(f"<{len(borders)}q", *borders))


def tokens(path):
    return [document.text.tolist() for document in documents(config(path), ByteTokenizer())]


@pytest.mark.parametrize(("code", "dtype"), [(8, "<u2"), (4, "<i4"), (1, "u1")])
def test_megatron(tmp_path, code, dtype):
    ended = [[*document, 0] for document in DOCUMENTS]
    megatron(tmp_path / "a", ended, range(5), code, dtype)
    assert tokens(tmp_path / "a.bin") == DOCUMENTS
    assert tokens(tmp_path / "*") == DOCUMENTS
    assert [file.name for file in source_files(config(tmp_path / "a.bin"))] == ["a.bin", "a.idx"]
    megatron(
        tmp_path / "b", [[104], [105], *DOCUMENTS[1:]], [0, 2, 3, 4, 5], code, dtype
    )  # a document of two sequences
    assert tokens(tmp_path / "b.bin") == DOCUMENTS
    megatron(tmp_path / "c", [[104, 105, 0, *DOCUMENTS[1], 0]], [0, 1], code, dtype)  # and two documents in one
    assert tokens(tmp_path / "c.bin") == DOCUMENTS[:2]


@pytest.mark.parametrize("bare", [True, False])
@pytest.mark.parametrize("ended", [True, False])
def test_olmo(tmp_path, bare, ended, monkeypatch):
    monkeypatch.setattr("data.sources.tokens.BLOCK", 64)
    flat = np.array([token for document in DOCUMENTS for token in [*document, 0]][: None if ended else -1], "<u2")
    path = tmp_path / "part-0.npy"
    flat.tofile(path) if bare else np.save(path, flat)
    assert tokens(path) == DOCUMENTS


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda p: p.with_suffix(".idx").unlink(),
            "a.bin: .* read with its index, and .*a.idx is not there",
        ),
        (lambda p: p.with_suffix(".idx").write_bytes(b"TNTIDX\0\0" * 9), "a.idx: not an index of Megatron"),
        (lambda p: p.with_suffix(".idx").write_bytes(p.with_suffix(".idx").read_bytes()[:-1]), "a.idx: .* cut short"),
        (lambda p: p.write_bytes(b"\1\1"), "a.bin: 2 bytes, and .*a.idx speaks of 6"),
    ],
)
def test_damaged_megatron(tmp_path, damage, message):
    megatron(tmp_path / "a", [[1, 2], [3]], [0, 1, 2])
    damage(tmp_path / "a.bin")
    with pytest.raises(ValueError, match=message):
        tokens(tmp_path / "a.bin")


def test_tokens_of_another_tokenizer(tmp_path):
    np.array([5, 0, 300, 0], "<u2").tofile(tmp_path / "a.npy")
    with pytest.raises(ValueError, match="a.npy:document 1: a token 300, and the tokenizer has ids below 256"):
        tokens(tmp_path / "a.npy")
    with pytest.raises(ValueError, match="a.npy holds tokens: give the tokenizer that made them"):
        texts(tmp_path / "a.npy")
    (tmp_path / "b.npy").write_bytes(b"abc")
    with pytest.raises(ValueError, match="b.npy: 3 bytes are no whole number of 2-byte tokens"):
        tokens(tmp_path / "b.npy")
    np.save(tmp_path / "c.npy", np.zeros((2, 2)))
    with pytest.raises(ValueError, match="c.npy: an array of float64 with 2 dims"):
        tokens(tmp_path / "c.npy")


# ---- what is wrong -----------------------------------------------------------------------------------------------


def broken_parquet(path):
    pq.write_table(table(), path)
    path.write_bytes(path.read_bytes()[:-9])


FAULTS = {
    "columns.csv": (b"id,text\n1,one\n2,two,2\n3,three\n", r"columns.csv:3: 3 columns where the first line has 2", 2),
    "quote.csv": (b'id,text\n1,"one"x\n2,two\n', r"quote.csv:2: not CSV: ',' expected", 1),
    "open.csv": (b'id,text\n1,one\n2,"two\n3,three\n', r"open.csv:3: not CSV: unexpected end of data", 1),
    "bytes.csv": (b"id,text\n1,one\n2,tw\xff\n3,x\n", r"bytes.csv:3: not UTF-8 at character 2 of 'text'", 2),
    "lines.jsonl": (b'{"text": "a"}\n{"text": \n{"text": "\xff"}\n{"text": "b"}\n', r"lines.jsonl:2: not JSON", 2),
    "half.txt.gz": (gzip.compress(b"hello" * 99)[:-12], r"half.txt.gz: Compressed file ended", 0),
    "half.jsonl.gz": (
        gzip.compress(b'{"text": "a"}\n' * 9 + np.random.default_rng(0).bytes(3000))[:-12],
        r"half.jsonl.gz:10: not UTF-8",
        9,
    ),
    "no.parquet": (b"PAR1 and no more", r"no.parquet: .*[Pp]arquet", 0),
    "no.arrow": (b"ARROW1\0\0 and no more", r"no.arrow: .*", 0),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_refused_or_counted(tmp_path, name):
    content, message, kept = FAULTS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        texts(tmp_path / name)
    assert "\n" not in str(caught.value)
    left = [item for item in items(config(tmp_path / name)) if not hasattr(item, "text")]
    assert all(item.bad for item in left)
    assert len(left) >= 1
    assert len(list(documents(config(tmp_path / name), skip_bad=True))) == kept


def test_null_and_broken_strings_of_tables(tmp_path):
    broken = pa.Array.from_buffers(pa.string(), 3, pa.array([b"a", b"\xff\xfe", b"b"]).buffers())
    pq.write_table(pa.table({"text": broken}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match="a.parquet:row 2: not UTF-8 at byte 0"):
        texts(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="b.parquet:row 2: null"):
        texts(tmp_path / "b.parquet")
    assert [d.text for d in documents(config(tmp_path / "*"), skip_bad=True)] == ["a", "b", "a"]


@pytest.mark.parametrize("name", ["a.csv", "a.parquet", "stream.arrow"])
def test_a_missing_column(tmp_path, name):
    path = make(tmp_path, name)
    with pytest.raises(ValueError, match=rf"{name}.* no column 'body'; set data.field .* one of id, text"):
        texts(path, field="body")
    if name != "a.csv":
        with pytest.raises(ValueError, match=rf"{name}: column 'id' holds int64, not strings"):
            texts(path, field="id")


def test_what_is_empty_is_counted(tmp_path):
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.jsonl").write_text('{"text": ""}\n{"text": "x"}\n')
    (tmp_path / "c.parquet").write_bytes(b"")
    found = list(items(config(tmp_path / "*")))
    assert [getattr(item, "reason", None) for item in found] == ["empty", "empty", None, "empty"]
    assert not any(getattr(item, "bad", False) for item in found)
    assert texts(tmp_path / "*") == ["x"]
