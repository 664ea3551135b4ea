"""Keys: found by what they are alone, never stored, over when they are said to be, in every replica at once."""

import os
import sqlite3

import pytest

from serving import __main__ as serving
from serving.access import secrets
from serving.access.keys import Keys
from serving.access.opening import open_state
from serving.access.store import open_store


class Clock:
    """A clock that stands still until it is set."""

    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def keys(tmp_path, clock):
    secret = secrets.server_secret(secrets.folder(tmp_path))
    return Keys(open_store(tmp_path, secret, clock), secret)


def run(*words) -> int:
    """A command; its exit code."""
    try:
        return serving.main([str(word) for word in words])
    except SystemExit as ended:
        return ended.code


def test_a_key_is_found_by_all_of_its_characters(keys):
    key, text = keys.create("user", made_by="test", name="bob", models=("small*",), limits={"concurrent": 2})
    assert keys.find(text) == key
    assert (key.name, key.role, key.models, key.limits) == ("bob", "user", ("small*",), {"concurrent": 2})
    assert key.tenant == key.holder == key.id == text[:13]
    for wrong in (
        text[:-1],
        text + "a",
        text[:-1] + ("a" if text[-1] != "a" else "b"),
        text.upper(),
        "im-",
        "",
        "é" * 54,
    ):
        assert keys.find(wrong) is None
    other = keys.create("user", made_by="test")[1]
    assert keys.find(text[:13] + other[13:]) is None


def test_the_database_holds_no_key(keys, tmp_path):
    texts = [keys.create("user", made_by="test")[1] for _ in range(3)]
    keys.rotate(texts[0][:13], made_by="test")
    everything = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    for text in texts:
        assert text[:13].encode() in everything
        assert text[14:].encode() not in everything


def test_only_the_owner_can_read_the_files(tmp_path):
    state = tmp_path / "state"
    open_state(state).chain("server").close()
    assert {path.name: path.stat().st_mode & 0o077 for path in (state, *state.rglob("*"))} == dict.fromkeys(
        (
            "state",
            "secret",
            "access.db",
            "access.db-wal",
            "access.db-shm",
            "audit",
            "server-0.head",
            "server-0.000000.jsonl",
        ),
        0,
    )
    os.chmod(state / "secret", 0o640)
    with pytest.raises(ValueError, match="others can read this secret; run chmod 600"):
        open_state(state)


def test_a_key_expires(keys, clock):
    text = keys.create("user", made_by="test", seconds=60)[1]
    clock.now += 59.9
    assert keys.find(text)
    clock.now += 0.1
    assert keys.find(text) is None
    with pytest.raises(ValueError, match="is expired; make a new one"):
        keys.rotate(text[:13], made_by="test")


def test_a_rotated_key_works_beside_the_new_one_for_a_while(keys, clock):
    old, text = keys.create("user", made_by="test", tenant="team", limits={"concurrent": 1}, seconds=7200)
    clock.now += 10
    new, other = keys.rotate(old.id, made_by="test", overlap=60)
    same = ("holder", "role", "tenant", "models", "limits")
    assert [getattr(new, name) for name in same] == [getattr(old, name) for name in same]
    assert new.expires == clock.now + 7200
    clock.now += 59
    assert keys.find(text)
    assert keys.find(other)
    clock.now += 1
    assert keys.find(text) is None
    assert keys.find(other)


def test_a_revoked_key_is_refused_in_other_replicas_at_once(keys, tmp_path, clock):
    secret = secrets.server_secret(tmp_path)
    other = Keys(open_store(tmp_path, secret, clock), secret)
    key, text = keys.create("user", made_by="test")
    assert other.find(text)
    keys.revoke(key.id)
    assert other.find(text) is None
    with pytest.raises(ValueError, match="is revoked; make a new one"):
        keys.rotate(key.id, made_by="test")
    with pytest.raises(ValueError, match="no key 'im-x'"):
        keys.revoke("im-x")


def test_the_first_key_is_made_once(keys, tmp_path, clock):
    secret = secrets.server_secret(tmp_path)
    others = [Keys(open_store(tmp_path, secret, clock), secret) for _ in range(2)]
    made = [each.create_first("admin", made_by="test") for each in (*others, keys)]
    assert [one is None for one in made] == [False, True, True]


def test_keys_of_another_secret_are_told_at_the_start(keys, tmp_path, monkeypatch):
    monkeypatch.setenv("ISOMESH_SECRET", "x" * 40)
    with pytest.raises(ValueError, match="made with another secret: give all replicas the same ISOMESH_SECRET"):
        open_state(tmp_path)
    monkeypatch.setenv("ISOMESH_SECRET", "short")
    with pytest.raises(ValueError, match="5 characters, not 32"):
        open_state(tmp_path)


@pytest.mark.parametrize(
    "address", ["mysql://u:hunter2@h/d", "not an address hunter2", "postgresql://u:hunter2@127.0.0.1:9/d"]
)
def test_a_database_that_is_none_is_told_without_its_password(tmp_path, monkeypatch, address):
    monkeypatch.setenv("ISOMESH_DATABASE", address)
    with pytest.raises(ValueError) as error:
        open_state(tmp_path)
    assert "hunter2" not in str(error.value)
    assert "hunter2" not in repr(error.value.__cause__)


def test_the_commands(tmp_path, capsys):
    assert run("keys", "create", "--role", "user", "--name", "bob", "--expires", "90d", "--state", tmp_path) == 0
    said = capsys.readouterr()
    text = said.out.strip()
    assert said.out == f"{text}\n"
    assert text not in said.err
    assert open_state(tmp_path).keys.find(text).name == "bob"
    assert run("keys", "rotate", text[:13], "--overlap", "0s", "--state", tmp_path) == 0
    new = capsys.readouterr().out.strip()
    keys = open_state(tmp_path).keys
    assert keys.find(text) is None
    assert keys.find(new)
    assert run("keys", "revoke", new[:13], "--state", tmp_path) == 0
    assert keys.find(new) is None
    assert run("keys", "list", "--state", tmp_path) == 0
    listed = capsys.readouterr().out
    assert [line.split()[0] for line in listed.splitlines()[1:]] == [text[:13], new[:13]]
    assert "expired" in listed
    assert "revoked" in listed
    assert text[14:] not in listed
    assert run("keys", "roles", "--state", tmp_path) == 0
    assert run("audit", "verify", "--state", tmp_path) == 0
    said = capsys.readouterr().out
    assert "3 records, as they were written" in said
    assert run("audit", "show", "--state", tmp_path) == 0
    said = capsys.readouterr().out
    assert new[14:] not in said
    assert [
        f'"keys {word}"' in line for word, line in zip(("create", "rotate", "revoke"), said.splitlines(), strict=True)
    ]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["create"], "create needs --role: admin, operator, user, reader"),
        (["create", "--role", "king"], "no role 'king': admin, operator, user, reader"),
        (["create", "--role", "user", "--expires", "1y"], "'1y' is no time such as 30s, 15m, 1h or 90d"),
        (["create", "--role", "user", "--expires", "0s"], "must be above 0"),
        (["create", "--role", "user", "--concurrent", "-1"], "concurrent=-1 must be a whole number, 0 or more"),
        (["create", "--role", "user", "--name", "a\nb"], "1 to 64 letters, digits"),
        (["list", "--role", "user"], "list takes no role; create does"),
        (["rotate"], "rotate needs the start of a key, im-...;"),
        (["revoke", "im-nothing00"], "no key 'im-nothing00'; python -m serving keys list names them all"),
        (["destroy"], "invalid choice"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path, capsys, words, told):
    assert run("keys", *words, "--state", tmp_path) == 2
    said = capsys.readouterr()
    assert told in said.err
    assert (said.out, said.err.count("\n")) == ("", 1)


def test_a_key_that_cannot_be_written_down_is_not_made(tmp_path, capsys, monkeypatch):
    opened = open_state(tmp_path)
    monkeypatch.setattr("serving.access.audit._write_whole", lambda *a: (_ for _ in ()).throw(OSError(28, "full")))
    assert run("keys", "create", "--role", "user", "--state", tmp_path) == 2
    assert capsys.readouterr().out == ""
    assert opened.keys.all() == []


def test_a_full_or_locked_database_is_told_as_one_that_is_away(keys, tmp_path, monkeypatch):
    from serving.access.store import Unreachable

    def full(cursor):
        raise sqlite3.OperationalError("database or disk is full")

    with pytest.raises(Unreachable):
        keys._store.run(full, write=True)
    assert keys.create("user", made_by="test")
