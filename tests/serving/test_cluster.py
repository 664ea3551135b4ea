"""Replicas under supervision, with processes that have no model and a balancer that is none."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from runtime.exit_codes import DONE, FAULT, MISTAKE
from serving.cluster import control, probe
from serving.cluster.balancer import UNANSWERED, Balancer, quoted
from serving.cluster.child import Backoff, Child
from serving.cluster.replica import Replica, Watching, shares
from serving.cluster.supervisor import Supervisor

STAND_IN = Path(__file__).parent.parent / "stand_in.py"
WATCHING = Watching(look_seconds=0.05, silent_seconds=0.6, grace_seconds=5.0)


class NoBalancer(Balancer):
    """Stands where haproxy would; remembers what it is told."""

    told: list = []  # noqa: RUF012

    def command(self) -> list[str]:
        return ["sleep", "1000"]

    async def tell(self, command: str) -> str:
        self.told.append(command)
        return ""


@pytest.fixture
def folder(tmp_path_factory):
    """Short enough for sockets."""
    return tmp_path_factory.mktemp("c")


def replica(number: int, folder: Path, model: str, watching: Watching = WATCHING) -> Replica:
    command = lambda model, socket: [sys.executable, str(STAND_IN), model, str(socket)]
    return Replica(number, folder / f"r{number}.sock", command, model, watching, backoff=Backoff(first=0.05))


def supervisor(folder: Path, *models: str, watching: Watching = WATCHING) -> Supervisor:
    replicas = [replica(number, folder, model, watching) for number, model in enumerate(models, 1)]
    balancer = NoBalancer(folder, tuple(each.socket for each in replicas))
    balancer.told.clear()
    return Supervisor(balancer, replicas)


@contextlib.asynccontextmanager
async def running(cluster: Supervisor):
    """All replicas ready; afterwards the cluster has ended with code 0."""
    task = asyncio.create_task(cluster.run())
    try:
        await until(lambda: task.done() or all(each.ready for each in cluster.replicas))
        yield
    finally:
        cluster.stop()
        assert await asyncio.wait_for(task, 20) == DONE


async def until(true, seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not true():
            await asyncio.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be reaped does not."""
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


# ------------------------------------------------------------------ configuration


def test_configuration_has_what_keeps_requests(tmp_path):
    text = Balancer(tmp_path, (tmp_path / "r1.sock", tmp_path / "r2.sock"), kept_bytes=1 << 20).text()
    lines = [line.strip() for line in text.splitlines()]
    for line in ("retry-on conn-failure empty-response 503", "option redispatch 1", "option http-buffer-request"):
        assert line in lines
    assert "shutdown-sessions" not in text, "it would cut the streams of a replica that drains"
    (buffer,) = (int(line.split()[1]) for line in lines if line.startswith("tune.bufsize"))
    assert buffer >= (1 << 20) + 8192, "a body that is kept fits a buffer with its headers"
    assert sum(line.endswith(" check") for line in lines) == sum(line.endswith(" backup") for line in lines) == 2


def test_errors_of_the_balancer_are_those_of_the_api(tmp_path):
    text = Balancer(tmp_path, (tmp_path / "r1.sock",)).text()
    for status in UNANSWERED:
        (line,) = (line for line in text.splitlines() if f"http-error status {status} " in line)
        assert line.count("'") == 2, "one word in single quotes"
        assert ("Retry-After" in line) == (status == 503)


def test_routing_and_tls(tmp_path):
    made = lambda **options: Balancer(tmp_path, (tmp_path / "r1.sock",), **options).text()
    assert "balance leastconn" in made()
    assert "balance hash var(txn.start)" in made(routing="prefix")
    secure = made(host="::", port=443, tls_cert=Path("cert.pem"), tls_client_ca=Path("ca.pem"))
    assert "bind [::]:443 ssl crt" in secure
    assert "verify required" in secure
    assert "ssl-min-ver TLSv1.2" in secure


def test_paths_stay_one_word():
    assert quoted('a b"c$d\\e') == '"a b\\"c\\$d\\\\e"'
    with pytest.raises(ValueError, match="control characters"):
        quoted("a\nglobal")


# ------------------------------------------------------------------ single processes


def test_backoff_doubles_and_forgets():
    backoff = Backoff(first=1, most=5, long_life=60)
    assert [backoff.after(0) for _ in range(5)] == [1, 2, 4, 5, 5]
    assert [backoff.after(61), backoff.after(1), backoff.after(1)] == [1, 1, 2]


def test_gpus_are_shared_out():
    assert shares(2, "0,1,2,3") == [{"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "2,3"}]
    assert shares(2, None) == [{}, {}]
    with pytest.raises(ValueError, match="3 / 2 is not whole"):
        shares(2, "0,1,2")


def test_lines_of_a_child_have_its_name(capfd):
    async def run():
        child = await Child.start(
            "r7", ["sh", "-c", "printf 'one\\ntwo'; head -c 200000 /dev/zero | tr '\\0' x"], os.environ
        )
        return await child.ended()

    assert asyncio.run(run()) == 0
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == "[r7] one"
    assert all(line.startswith("[r7] ") for line in lines)
    assert sum(line.count("x") for line in lines) == 200000


def test_probe_tells_silence_from_absence(folder):
    async def run():
        place = folder / "s.sock"
        absent = await probe.get(place, "/livez", 0.2)
        server = await asyncio.start_unix_server(lambda *_: None, place)
        silent = await probe.get(place, "/livez", 0.2)
        server.close()
        return absent, silent

    absent, silent = asyncio.run(run())
    assert (absent.status, absent.silent) == (0, False)
    assert silent.silent


# ------------------------------------------------------------------ the cluster


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM])
def test_replica_comes_back(folder, number):
    """Killed it is started again, stopped it is killed first, ended from outside it is started again, too."""
    cluster = supervisor(folder, "a", "a")

    async def run():
        async with running(cluster):
            first, second = cluster.replicas
            old, other, began = first.child.pid, second.child.pid, time.monotonic()
            os.kill(old, number)
            await until(lambda: first.ready and first.child.pid != old)
            assert time.monotonic() - began < 5
            assert not alive(old)
            assert second.child.pid == other
            pids = [each.child.pid for each in cluster.replicas]
        assert not any(map(alive, pids))

    asyncio.run(run())


def test_roll_replaces_one_at_a_time(folder):
    cluster = supervisor(folder, "a", "a", watching=replace(WATCHING, silent_seconds=6.0))  # beside a busy machine

    async def run():
        said, most_away = [], 0
        async with running(cluster):
            old = [each.child.pid for each in cluster.replicas]
            roll = asyncio.create_task(cluster.roll("b", said.append))
            while not roll.done():
                most_away = max(most_away, sum(not each.ready for each in cluster.replicas))
                await asyncio.sleep(0.01)
            await roll
            assert [each.serves for each in cluster.replicas] == ["b", "b"]
            assert not {each.child.pid for each in cluster.replicas} & set(old)
        return said, most_away

    said, most_away = asyncio.run(run())
    assert most_away == 1
    assert len(said) == 4
    states = [f"set server replicas/r{number} state {state}" for number in (1, 2) for state in ("drain", "ready")]
    assert cluster.balancer.told == states


def test_sighup_rolls(folder):
    cluster = supervisor(folder, "a", "a")

    async def run():
        async with running(cluster):
            old = {each.child.pid for each in cluster.replicas}
            os.kill(os.getpid(), signal.SIGHUP)
            await until(lambda: all(each.ready and each.child.pid not in old for each in cluster.replicas))

    asyncio.run(run())


def test_roll_to_what_does_not_start_is_taken_back(folder):
    cluster = supervisor(folder, "a", "a")

    async def run():
        async with running(cluster):
            untouched = cluster.replicas[1].child.pid
            with pytest.raises(ValueError, match="exit code 2"):
                await cluster.roll("broken")
            assert [(each.serves, each.ready) for each in cluster.replicas] == [("a", True)] * 2
            assert cluster.replicas[1].child.pid == untouched

    asyncio.run(run())


def test_roll_needs_another_that_is_ready(folder):
    async def run():
        async with running(alone := supervisor(folder, "a")):
            with pytest.raises(ValueError, match="--replicas 2"):
                await alone.roll("b")

    asyncio.run(run())


def test_a_mistake_ends_the_cluster_with_code_2(folder):
    assert asyncio.run(supervisor(folder, "broken", "broken").run()) == MISTAKE


def test_a_replica_that_never_gets_ready_ends_the_cluster(folder):
    cluster = supervisor(folder, "a", watching=Watching(look_seconds=0.05, start_seconds=0.0))
    cluster.replicas[0]._command = lambda model, socket: ["false"]
    assert asyncio.run(cluster.run()) == FAULT


def test_one_that_ignores_sigterm_is_killed(folder, monkeypatch):
    monkeypatch.setattr("serving.cluster.replica.TERM_SECONDS", 0.1)
    cluster = supervisor(folder, "wild", watching=Watching(look_seconds=0.05, grace_seconds=0.3))

    async def run():
        async with running(cluster):
            pid = cluster.replicas[0].child.pid
        assert not alive(pid)

    asyncio.run(run())


def test_a_running_cluster_is_asked_over_its_socket(folder):
    cluster = supervisor(folder, "a", "a")

    async def run():
        async with running(cluster), control.answering(cluster, folder):
            assert (folder / control.SOCKET).stat().st_mode & 0o777 == 0o600
            (shown,) = await asyncio.to_thread(lambda: list(control.ask(folder, command="show")))
            *said, last = await asyncio.to_thread(lambda: list(control.ask(folder, command="roll", model="b")))
            (refused,) = await asyncio.to_thread(lambda: list(control.ask(folder, model="b")))
            return shown, said, last, refused

    shown, said, last, refused = asyncio.run(run())
    assert [each["model"] for each in shown["replicas"]] == ["a", "a"]
    assert len(said) == 4
    assert (last["code"], [each["model"] for each in last["replicas"]]) == (DONE, ["b", "b"])
    assert refused["code"] == MISTAKE
    with pytest.raises(ValueError, match="no cluster runs"):
        list(control.ask(folder, command="show"))


def test_nothing_is_left_where_the_supervisor_is_killed(folder):
    program = f"""
import asyncio, sys
sys.path[:0] = {[str(STAND_IN.parent / "serving"), str(STAND_IN.parent.parent)]!r}
from pathlib import Path
from test_cluster import supervisor
cluster = supervisor(Path({str(folder)!r}), "a", "a")
cluster._ready = lambda: print("pids", *(each.child.pid for each in cluster.replicas), cluster._haproxy.pid, flush=True)
asyncio.run(cluster.run())
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        pids = [int(word) for word in process.stdout.readline().split()[1:]]
        assert len(pids) == 3
        assert all(map(alive, pids))
        process.kill()
    deadline = time.monotonic() + 5
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(alive, pids))
