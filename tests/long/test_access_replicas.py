"""Limits and keys over several processes, on one SQLite file and on a real Postgres."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from guarded import guarded
from replicas import Postgres, environment

from serving.access.limits import LEASE_SECONDS, Limits, Quotas, Taken
from serving.access.opening import open_state
from serving.access.store import Unreachable

HAMMER = """
import sys, time
from pathlib import Path
from serving.access.limits import Limits, Quotas, Taken
from serving.access.opening import open_state
folder, name, count, subject, kind = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), *sys.argv[4:]
settle = kind == "settle"
opened = open_state(folder)
quotas = Quotas(opened.store, name)
quotas.beat()
limits = {subject: Limits(requests_a_minute=200, tokens_a_minute=1800, tokens_a_day=10**6, concurrent=10**6)}
limits["role:x"] = Limits(tokens_a_minute=10**6)
granted = tokens = 0
print("ready", flush=True)
sys.stdin.readline()
for number in range(count):
    taken = quotas.take(f"{name}-{number}", limits, 10)
    if isinstance(taken, Taken):
        granted += 1
        used = number % 10 if settle else 10
        tokens += used
        if settle:
            quotas.settle(taken, used)
print(granted, tokens, flush=True)
if not settle:
    time.sleep(1000)
"""


@pytest.fixture(scope="module")
def postgres():
    server = Postgres()
    yield server
    server.close()


@pytest.fixture(params=["sqlite", "postgres"])
def state(request, tmp_path, monkeypatch):
    """A state folder whose database is empty."""
    if request.param == "postgres":
        server = request.getfixturevalue("postgres")
        name = f"d{time.monotonic_ns()}"
        env = {**os.environ, "PGPASSWORD": "planted-pw-3141"}
        where = ["-h", "127.0.0.1", "-p", str(server.port), "-U", "mesh", name]
        subprocess.run([str(server.bin / "createdb"), *where], env=env, check=True)
        address = server.address.rpartition("/")[0] + f"/{name}"
        monkeypatch.setenv("ISOMESH_DATABASE", address)
    return tmp_path / "state"


def hammers(state, subject: str, kind: str, count: int = 4, each: int = 120) -> list[subprocess.Popen]:
    """Processes that open the empty database at once, and begin together."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", HAMMER, str(state), f"r{number}", str(each), subject, kind],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(), text=True,
        )
        for number in range(count)
    ]  # fmt: skip
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    return processes


def test_four_processes_on_one_quota_get_exactly_the_limit(state):
    """Requests that keep all they took: 180 of 10 tokens are 1800, and not one more."""
    processes = hammers(state, "holder:a", "keep")
    began = time.monotonic()
    got = [list(map(int, process.stdout.readline().split())) for process in processes]
    print(f"{time.monotonic() - began:.1f} s for 480 asks of 4 processes: {got}")
    try:
        assert sum(granted for granted, _ in got) == 180
        assert sum(tokens for _, tokens in got) == 1800
        # kill -9: their requests come back, and until then nobody takes their places
        store = open_state(state).store
        quotas = Quotas(store, "alive")
        quotas.beat()
        full = {"holder:a": Limits(concurrent=181)}
        assert isinstance(quotas.take("one", full, 0), Taken)
        assert quotas.take("two", full, 0).limit == "concurrent"
        for process in processes:
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert quotas.take("three", full, 0).limit == "concurrent"
        time.sleep(LEASE_SECONDS + 1)
        quotas.beat()
        freed = sum(isinstance(quotas.take(f"more{number}", full, 0), Taken) for number in range(200))
        assert freed == 180
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_four_processes_that_give_back_use_no_more_than_the_limit(state):
    processes = hammers(state, "holder:b", "settle")
    got = [list(map(int, process.communicate()[0].split())) for process in processes]
    assert sum(granted for granted, _ in got) == 200  # by then the limit of requests: tokens were given back
    assert sum(tokens for _, tokens in got) <= 1800


def test_two_replicas_of_one_database(state, tmp_path, monkeypatch):
    """A key is made, limited and revoked over both; a state folder of its own each, one secret for both."""
    monkeypatch.setenv("ISOMESH_SECRET", "one secret for both of the replicas")
    other = tmp_path / "other" if "ISOMESH_DATABASE" in os.environ else state
    with guarded(state) as one, guarded(other) as two:
        key = one.key(limits={"requests_a_minute": 3})
        assert [server.complete(key).status for server in (one, two, one, two)] == [200, 200, 200, 429]
        key = two.key()
        assert one.complete(key).status == 200
        two.opened.keys.revoke(key[:13])
        assert one.complete(key).status == 401


def test_the_database_is_gone_for_some_seconds(postgres, tmp_path, monkeypatch):
    """Requests wait for it and are answered; none is refused, and none is let in without being counted."""
    monkeypatch.setenv("ISOMESH_DATABASE", postgres.address)
    monkeypatch.setenv("ISOMESH_SECRET", "one secret for both of the tests of it")
    with guarded(tmp_path / "state") as server:
        key = server.key(limits={"requests_a_minute": 10})
        assert server.complete(key).status == 200
        postgres.stop()
        statuses: list[int] = []
        asking = [threading.Thread(target=lambda: statuses.append(server.complete(key).status)) for _ in range(12)]
        for thread in asking:
            thread.start()
        time.sleep(5)
        assert statuses == []
        postgres.start()
        for thread in asking:
            thread.join()
        assert sorted(statuses) == [200] * 9 + [429] * 3
        assert server.ask(None, "GET", "/livez").status == 200


def test_a_database_that_never_comes_back(postgres, tmp_path, monkeypatch):
    monkeypatch.setenv("ISOMESH_DATABASE", postgres.address)
    monkeypatch.setenv("ISOMESH_SECRET", "one secret for both of the tests of it")
    with guarded(tmp_path / "state", patience=1.0) as server:
        key = server.key()
        postgres.stop()
        try:
            began = time.monotonic()
            answer = server.complete(key)
            assert (answer.status, answer.headers["retry-after"]) == (503, "5")
            assert time.monotonic() - began < 5
            assert "planted-pw" not in answer.text
            with pytest.raises(Unreachable):
                server.opened.keys.all()
        finally:
            postgres.start()
