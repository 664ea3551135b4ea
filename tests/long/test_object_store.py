"""Corpora in a real S3 server on this machine: prepared into it, trained from it, while it dies and comes back."""

import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import runs
import s3fs
from moto.server import main as _moto  # noqa: F401 - absent: told here, and not by a server that does not start

from data.corpus import DataConfig
from data.shards import prepare
from data.tokenizer import TokenizerConfig
from runtime.ports import free_port

ROOT = Path(__file__).parents[2]


class Server:
    """moto's S3 server as a process of its own, behind a door of ours that can be shut while it keeps its objects."""

    def __init__(self):
        self.port, behind = free_port(), free_port()
        self.url, self._behind = f"http://127.0.0.1:{self.port}", ("127.0.0.1", behind)
        moto = Path(sys.executable).with_name("moto_server")
        command = [moto, "-H", "127.0.0.1", "-p", str(behind)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(self._behind, 1).close()
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.1)
        self.bytes_before_cut, self._open = None, []
        self.open_door()

    def open_door(self):
        """Connections come through again."""
        self._door = socket.create_server(("127.0.0.1", self.port), reuse_port=True)
        threading.Thread(target=self._let_in, args=(self._door,), daemon=True).start()

    def shut_door(self):
        """Refuses connections, and cuts those that there are in the middle of whatever they carry."""
        with contextlib.suppress(OSError):
            self._door.shutdown(socket.SHUT_RDWR)
        self._door.close()
        for one in self._open:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        self._open.clear()

    def _let_in(self, door):
        while True:
            try:
                client = door.accept()[0]
            except OSError:
                return
            inner = socket.create_connection(self._behind)
            self._open += [client, inner]
            threading.Thread(target=self._carry, args=(client, inner), daemon=True).start()
            threading.Thread(target=self._carry, args=(inner, client, True), daemon=True).start()

    def _carry(self, one, other, answer=False):
        carried = 0
        with contextlib.suppress(OSError):
            while content := one.recv(1 << 14):
                carried += len(content)
                if answer and self.bytes_before_cut is not None and carried > self.bytes_before_cut:
                    break
                other.sendall(content)
        for end in (one, other):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def freeze(self):
        """It takes no request and answers none, as a machine that hangs."""
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self):
        """It goes on."""
        self.process.send_signal(signal.SIGCONT)

    def die(self):
        """For good."""
        self.shut_door()
        self.process.kill()
        self.process.wait()


@pytest.fixture
def server(monkeypatch):
    server = Server()
    for key, value in {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": server.url,
    }.items():
        monkeypatch.setenv(key, value)
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir("bucket")
    yield server
    server.die()


@pytest.fixture
def source(tmp_path):
    draw = np.random.default_rng(0)
    lines = (json.dumps({"text": f"{i} " + " ".join(map(str, draw.integers(0, 9999, 60)))}) for i in range(4000))
    path = tmp_path / "source.jsonl"
    path.write_text("".join(line + "\n" for line in lines))
    return path


def command(out, source, tmp_path, *more):
    options = ("--shard-tokens", "60000", "--workers", "1", "tokenizer=bytes")
    words = ["prepare", str(out), f"data.path={source}", f"data.cache={tmp_path}/cache", *options, *more]
    return [sys.executable, "-m", "data", *words]


def prepared(out, source, tmp_path, *more):
    done = subprocess.run(command(out, source, tmp_path, *more), cwd=ROOT, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stderr + done.stdout


def opened(tmp_path, path="s3://bucket/corpus", **more):
    return prepare(DataConfig("prepared", path, cache=str(tmp_path / "cache"), **more), TokenizerConfig())


def whole(dataset):
    return dataset.train.slice(0, len(dataset.train))


def test_from_a_store_into_a_store(server, source, tmp_path):
    files = s3fs.S3FileSystem()
    lines = source.read_bytes().splitlines(keepends=True)
    for number in range(3):
        files.pipe(f"bucket/source/{number}.jsonl", b"".join(lines[number::3]))
    code, said = prepared("s3://bucket/corpus", "s3://bucket/source/*.jsonl", tmp_path)
    assert code == 0, said
    code, said = prepared(tmp_path / "here", "s3://bucket/source/*.jsonl", tmp_path)
    assert code == 0, said
    there, here = opened(tmp_path), opened(tmp_path, str(tmp_path / "here"))
    assert there.told == here.told
    np.testing.assert_array_equal(whole(there), whole(here))
    assert not files.exists("bucket/corpus/journal.jsonl")
    assert {path.split("/")[-1] for path in files.ls("bucket/corpus")} == {
        p.name for p in (tmp_path / "here").iterdir()
    }
    code, said = prepared("s3://bucket/corpus", source, tmp_path)
    assert code == 2
    assert "s3://bucket/corpus holds a corpus of other files or settings" in said


def test_training_reads_from_the_store(server, source, tmp_path):
    assert prepared("s3://bucket/corpus", source, tmp_path)[0] == 0
    assert prepared(tmp_path / "here", source, tmp_path)[0] == 0
    losses = []
    for number, path in enumerate(("s3://bucket/corpus", tmp_path / "here")):
        words = [*runs.TINY, "data=prepared", f"data.path={path}", f"data.cache={tmp_path}/cache{number}"]
        words = [word for word in words if word != "data=text"]
        assert runs.run([*words, f"run.dir={tmp_path}/run{number}", "train.steps=8"]) == 0
        lines = (tmp_path / f"run{number}/metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["train/loss"] for line in lines if "train/loss" in line])
    assert len(losses[0]) == 8
    assert losses[0] == losses[1]


@pytest.mark.parametrize("how", ["freeze", "refuse"])
def test_a_server_that_is_away_for_a_while(server, source, tmp_path, how):
    """Frozen it holds its connections open; shut off, they are cut. Both while shards go there."""
    process = subprocess.Popen(
        command("s3://bucket/corpus", source, tmp_path), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    files = s3fs.S3FileSystem(use_listings_cache=False)
    while not files.glob("bucket/corpus/*.bin"):
        assert process.poll() is None, process.stdout.read().decode()
        time.sleep(0.02)
    server.freeze() if how == "freeze" else server.shut_door()
    time.sleep(8)
    server.thaw() if how == "freeze" else server.open_door()
    said = process.communicate(timeout=200)[0].decode()
    assert process.returncode == 0, said
    assert prepared(tmp_path / "here", source, tmp_path)[0] == 0
    assert opened(tmp_path).told == opened(tmp_path, str(tmp_path / "here")).told
    np.testing.assert_array_equal(whole(opened(tmp_path)), whole(opened(tmp_path, str(tmp_path / "here"))))


def test_downloads_that_break_off(server, source, tmp_path, monkeypatch):
    """Every answer is cut after 20 kB for a while; a shard has 120 kB."""
    assert prepared("s3://bucket/corpus", source, tmp_path)[0] == 0
    assert prepared(tmp_path / "here", source, tmp_path)[0] == 0
    dataset = opened(tmp_path)
    server.bytes_before_cut = 20_000
    threading.Timer(4, setattr, (server, "bytes_before_cut", None)).start()
    np.testing.assert_array_equal(whole(dataset), whole(opened(tmp_path, str(tmp_path / "here"))))
    for path in (tmp_path / "cache/.shards").iterdir():
        if not path.name.startswith("."):
            assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name


def test_reading_waits_for_a_server_that_comes_back(server, source, tmp_path, monkeypatch):
    assert prepared("s3://bucket/corpus", source, tmp_path)[0] == 0
    assert prepared(tmp_path / "here", source, tmp_path)[0] == 0
    monkeypatch.setattr("data.shard_cache._fetch_ahead", lambda parts: None)
    dataset = opened(tmp_path)
    dataset.train.slice(0, 10)
    server.freeze()
    threading.Timer(5, server.thaw).start()
    began = time.monotonic()
    np.testing.assert_array_equal(whole(dataset), whole(opened(tmp_path, str(tmp_path / "here"))))
    assert time.monotonic() - began > 4


def test_a_replica_is_taken_from_a_dead_server(server, source, tmp_path):
    assert prepared("s3://bucket/corpus", source, tmp_path)[0] == 0
    assert prepared(tmp_path / "here", source, tmp_path)[0] == 0
    expected = opened(tmp_path, str(tmp_path / "here"))
    first = opened(tmp_path, replicas=(str(tmp_path / "here"),))
    server.die()
    np.testing.assert_array_equal(whole(first), whole(expected))
    again = opened(tmp_path, replicas=(str(tmp_path / "here"),))  # from the start without it
    assert again.told == expected.told
    np.testing.assert_array_equal(whole(again), whole(expected))


def test_a_dead_server_without_a_replica_is_one_line(server, source, tmp_path, monkeypatch):
    assert prepared("s3://bucket/corpus", source, tmp_path)[0] == 0
    server.die()
    monkeypatch.setattr("data.objects.DEFAULT_PATIENCE_S", 3.0)
    with pytest.raises(ValueError, match=r"s3://bucket/corpus/index.json: .*tried \d+ times in 3 s") as caught:
        opened(tmp_path)
    assert "\n" not in str(caught.value)


def test_no_credentials_and_no_bucket(server, source, tmp_path, monkeypatch):
    code, said = prepared("s3://nowhere/corpus", source, tmp_path)
    assert code == 2
    assert "s3://nowhere/corpus" in said.splitlines()[-1]
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(key)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    code, said = prepared("s3://bucket/corpus", source, tmp_path)
    assert code == 2
    assert "no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in said


def test_killed_while_shards_go_to_the_store(server, source, tmp_path):
    process = subprocess.Popen(
        command("s3://bucket/corpus", source, tmp_path), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    files = s3fs.S3FileSystem(use_listings_cache=False)
    while len(files.glob("bucket/corpus/*.bin")) < 4:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not files.exists("bucket/corpus/index.json")
    there = {name: info["LastModified"] for name, info in files.glob("bucket/corpus/*.bin", detail=True).items()}
    code, said = prepared("s3://bucket/corpus", source, tmp_path)
    assert code == 0, said
    after = {name: info["LastModified"] for name, info in files.glob("bucket/corpus/*.bin", detail=True).items()}
    assert sum(after[name] == when for name, when in there.items()) >= len(there) - 3  # not sent again
    assert prepared(tmp_path / "here", source, tmp_path)[0] == 0
    np.testing.assert_array_equal(whole(opened(tmp_path)), whole(opened(tmp_path, str(tmp_path / "here"))))
    assert not [path for path in (tmp_path / "cache/staging").iterdir() if path.is_dir()]
    assert os.environ["AWS_ENDPOINT_URL"] == server.url
