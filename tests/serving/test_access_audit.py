"""The audit: every record altered, cut or moved is named, at the first line where it shows."""

import json
import os
import re
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.access import audit, verify
from serving.access.audit import Chain

SECRET = b"s" * 40


def written(folder, count: int = 8, name: str = "server") -> None:
    chain = Chain(folder, name, SECRET)
    for number in range(count):
        chain.note({"who": f"im-{number}", "action": "chat", "status": 200, "model": 'a"\n\x00é'})
    chain.close()


def verdict(folder, chain: str = "server-0", copied=None) -> verify.Verdict:
    return verify.verify(folder, chain, SECRET, copied or {})


@pytest.fixture(scope="module")
def lines(tmp_path_factory) -> tuple[list[bytes], str]:
    folder = tmp_path_factory.mktemp("audit")
    written(folder)
    head = (folder / "server-0.head").read_text()
    return (folder / "server-0.000000.jsonl").read_bytes().splitlines(keepends=True), head


def put(folder, lines: list[bytes], head: str) -> verify.Verdict:
    folder.mkdir(exist_ok=True)
    (folder / "server-0.head").write_text(head)
    (folder / "server-0.000000.jsonl").write_bytes(b"".join(lines))
    return verdict(folder)


def blamed(found: verify.Verdict) -> int:
    return int(re.search(r"\.jsonl:(\d+): ", found.fault)[1])


def test_a_chain_as_it_was_written(lines, tmp_path):
    assert put(tmp_path, *lines) == verify.Verdict("server-0", 8)
    records = [line.record for line in verify.lines(tmp_path, "server-0")]
    assert [record["sequence"] for record in records] == list(range(1, 9))
    assert records[0]["model"] == 'a"\n\x00é'


def test_a_server_that_had_nothing_to_write_leaves_a_whole_chain(tmp_path):
    for _ in range(2):
        written(tmp_path, 0)
        assert verdict(tmp_path) == verify.Verdict("server-0", 0)
    written(tmp_path, 2)
    assert verdict(tmp_path) == verify.Verdict("server-0", 2)
    (tmp_path / "server-0.head").write_text("")  # with records, a head that is gone stays so
    written(tmp_path, 0)
    assert "no head" in verdict(tmp_path).fault


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_changed_byte_is_named(lines, tmp_path_factory, data):
    texts, head = lines
    number = data.draw(st.integers(0, 7))
    place = data.draw(st.integers(0, len(texts[number]) - 2))
    value = data.draw(st.integers(0, 255).filter(lambda byte: byte not in (texts[number][place], 10)))
    changed = texts[number][:place] + bytes([value]) + texts[number][place + 1 :]
    found = put(tmp_path_factory.getbasetemp() / "changed", [*texts[:number], changed, *texts[number + 1 :]], head)
    assert blamed(found) == number + 1, found


@settings(max_examples=60, deadline=None)
@given(first=st.integers(0, 7), count=st.integers(1, 8))
def test_lines_that_were_cut_are_named(lines, tmp_path_factory, first, count):
    texts, head = lines
    left = texts[:first] + texts[first + count :]
    found = put(tmp_path_factory.getbasetemp() / "cut", left, head)
    if first == 0 and left:
        assert found.archived == count
    elif not left:
        assert "record 0 is the last here, its head tells of record 8" in found.fault
    else:
        assert blamed(found) == (first + 1 if first + count < 8 else first), found


@settings(max_examples=60, deadline=None)
@given(order=st.permutations(range(8)).filter(lambda order: order != list(range(8))))
def test_lines_that_were_moved_are_named(lines, tmp_path_factory, order):
    texts, head = lines
    found = put(tmp_path_factory.getbasetemp() / "moved", [texts[number] for number in order], head)
    first = next(place for place, number in enumerate(order) if place and number != order[place - 1] + 1)
    assert blamed(found) == first + 1, found


def test_a_chain_that_was_written_anew_is_seen_by_its_head(lines, tmp_path):
    forged = Chain(tmp_path, "server", b"another secret")
    for number in range(8):
        forged.note({"who": f"im-{number}", "action": "nothing"})
    forged.close()
    assert "no head that this server signed" in verdict(tmp_path).fault
    (tmp_path / "server-0.head").write_text(lines[1])
    assert "record 8 is altered: its head knows another" in verdict(tmp_path).fault


def test_a_chain_and_head_put_back_together_are_seen_by_the_copy_in_the_database(lines, tmp_path):
    old = Chain(tmp_path, "server", SECRET)
    old.note({"who": "a"})
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    old.note({"who": "b"})
    _, sequence, digest = old.head()
    old.close()
    for path, data in before.items():
        path.write_bytes(data)
    assert verdict(tmp_path).fault is None
    assert "cut after this line" in verdict(tmp_path, copied={"server-0": (sequence, digest)}).fault
    for path in tmp_path.iterdir():
        path.unlink()
    assert "tells of record 2" in verdict(tmp_path, copied={"server-0": (sequence, digest)}).fault


def test_what_was_cut_before_a_restart_is_still_seen_after_it(lines, tmp_path):
    texts, head = lines
    put(tmp_path, texts[:5], head)
    written(tmp_path, 3)
    assert blamed(verdict(tmp_path)) == 6
    assert "record 9 follows record 5: 3 were cut" in verdict(tmp_path).fault


def test_a_process_goes_on_where_the_one_before_ended_and_two_at_once_have_a_chain_each(tmp_path):
    written(tmp_path, 3)
    one, two = Chain(tmp_path, "server", SECRET), Chain(tmp_path, "server", SECRET)
    assert (one.name, two.name) == ("server-0", "server-1")
    for chain in (one, two):
        chain.note({"who": "x"})
        chain.close()
    assert [verdict(tmp_path, name).records for name in verify.chains(tmp_path)] == [4, 1]
    assert verdict(tmp_path).fault is None


def test_files_follow_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr(audit, "LARGEST", 1000)
    written(tmp_path, 30)
    files = audit.files_of(tmp_path, "server-0")
    assert len(files) > 3
    assert verdict(tmp_path) == verify.Verdict("server-0", 30)
    gone = sum(1 for _ in files[0].open())
    files[0].unlink()
    assert verdict(tmp_path).archived == gone
    written(tmp_path, 2)
    assert verdict(tmp_path).fault is None
    files[2].unlink()
    assert verdict(tmp_path).fault


def test_threads_write_one_chain_and_it_can_be_verified_meanwhile(tmp_path):
    chain = Chain(tmp_path, "server", SECRET)
    threads = [threading.Thread(target=lambda: [chain.note({"who": "x"}) for _ in range(200)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert verdict(tmp_path).fault is None
    assert verdict(tmp_path).records == 800
    chain.close()


def test_a_full_disk(tmp_path, monkeypatch):
    """An admin's record raises; others wait, in order, and what there was no memory for is counted."""
    chain = Chain(tmp_path, "server", SECRET)
    chain.note({"who": "first"})
    whole = os.write

    def full(file, data):
        whole(file, data[:10])  # as a disk does
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(audit, "MOST_KEPT", 3)
    monkeypatch.setattr(audit.os, "write", full)
    assert not any(chain.note({"who": f"kept{number}"}) for number in range(5))
    with pytest.raises(OSError, match="No space"):
        chain.write({"who": "admin"}, sync=True)
    monkeypatch.setattr(audit.os, "write", whole)
    assert verdict(tmp_path).records == 1
    chain.write({"who": "later"})
    chain.close()
    records = [line.record for line in verify.lines(tmp_path, "server-0")]
    assert [record["who"] for record in records] == ["first", "kept0", "kept1", "kept2", "later"]
    assert sum(record.get("lost", 0) for record in records) == 2
    assert verdict(tmp_path).fault is None


def test_half_a_line_is_named_and_the_next_process_begins_a_new_file(tmp_path):
    written(tmp_path, 2)
    path = tmp_path / "server-0.000000.jsonl"
    path.write_bytes(path.read_bytes() + b'{"sequence":3,"ti')
    written(tmp_path, 1)
    assert len(audit.files_of(tmp_path, "server-0")) == 2
    assert blamed(verdict(tmp_path)) == 3


def test_words_from_outside_are_bounded_and_stay_on_their_line(tmp_path):
    chain = Chain(tmp_path, "server", SECRET)
    chain.note({"who": 'x"}\n{"forged":1}\u2028\r', "path": "/" + "a" * 10_000})
    chain.close()
    (line,) = (tmp_path / "server-0.000000.jsonl").read_text().splitlines()
    assert len(json.loads(line)["path"]) == 256
