"""What haproxy does with requests whose replica dies, stops or refuses: the real one, before replicas without a model.

These are the facts that serving.cluster rests on; another version of haproxy has to show them again.
"""

import contextlib
import json
import os
import signal
import socket
import ssl
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import trustme

from runtime.ports import free_port
from serving.cluster.balancer import Balancer

STAND_IN = Path(__file__).parent.parent / "stand_in.py"


class Pair:
    """Two replicas behind haproxy."""

    def __init__(self, folder: Path, **options):
        self.sockets = [folder / f"r{number}.sock" for number in (1, 2)]
        self.balancer = Balancer(folder, tuple(self.sockets), port=free_port(), **options)
        self.address = f"{self.balancer.scheme}://127.0.0.1:{self.balancer.port}"
        self.processes = [self.start(number) for number in (0, 1)]
        self.balancer.write()
        self.haproxy = subprocess.Popen(self.balancer.command(), stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 20
        while not all(map(self.up, (1, 2))):
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def start(self, number: int) -> subprocess.Popen:
        process = subprocess.Popen([sys.executable, STAND_IN, f"m{number + 1}", self.sockets[number]])
        while not self.sockets[number].exists():
            time.sleep(0.02)
        return process

    def up(self, number: int) -> bool:
        with contextlib.suppress(OSError, StopIteration):
            with socket.socket(socket.AF_UNIX) as link:
                link.connect(str(self.balancer.admin))
                link.sendall(b"show stat\n")
                rows = link.makefile().read().splitlines()
            return ",UP," in next(row for row in rows if row.startswith(f"replicas,r{number},"))
        return False

    def ask(self, **asked) -> httpx.Response:
        return httpx.post(f"{self.address}/v1/completions", json=asked, timeout=30)

    def of(self, pid: int) -> subprocess.Popen:
        return next(process for process in self.processes if process.pid == pid)

    def close(self) -> None:
        for process in (*self.processes, self.haproxy):
            process.kill()
            process.wait()


@pytest.fixture
def pair(tmp_path_factory):
    pair = Pair(tmp_path_factory.mktemp("p"))
    yield pair
    pair.close()


def busy_one(pair: Pair) -> int:
    """The index of the replica that has the only request: the other one answers a second."""
    other = pair.ask().json()["pid"]
    return next(index for index, process in enumerate(pair.processes) if process.pid != other)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("size", [0, 256_000])
def test_killed_before_the_first_byte_is_asked_of_the_other(pair, stream, size):
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(pair.ask, wait=1.5, stream=stream, x="x" * size)
        time.sleep(0.5)
        victim = pair.processes[busy_one(pair)]
        victim.kill()
        response = answer.result()
    assert response.status_code == 200
    text = response.text.splitlines()[0].removeprefix("data: ")
    assert json.loads(text)["pid"] not in (victim.pid, None)


def test_stopped_is_out_in_two_seconds_and_its_requests_go_on_once_it_is_killed(pair):
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(pair.ask, wait=1.0)
        time.sleep(0.4)
        index = busy_one(pair)
        victim = pair.processes[index]
        began = time.monotonic()
        victim.send_signal(signal.SIGSTOP)
        while pair.up(index + 1):
            time.sleep(0.01)
        assert time.monotonic() - began < 2.0
        assert not answer.done()
        assert pair.ask().json()["pid"] != victim.pid, "new requests go to the other meanwhile"
        victim.kill()
        response = answer.result()
    assert (response.status_code, response.json()["pid"] == victim.pid) == (200, False)


def test_cut_stream_does_not_end_well(pair):
    with httpx.stream(
        "POST", f"{pair.address}/v1/completions", json={"stream": True, "n": 99, "gap": 0.05}
    ) as response:
        lines = response.iter_lines()
        pid = json.loads(next(lines).removeprefix("data: "))["pid"]
        pair.of(pid).kill()
        rest = []
        with pytest.raises(httpx.RemoteProtocolError, match="incomplete"):
            rest.extend(lines)
        assert "data: [DONE]" not in rest


def test_refused_by_one_is_asked_of_the_other_and_all_refusing_is_told(pair):
    assert pair.ask(status=503).status_code == 503
    pair.processes[0].terminate()  # drains: refuses what is new
    assert {pair.ask().status_code for _ in range(20)} == {200}


def test_a_replica_that_drains_finishes_its_streams(pair):
    with httpx.stream(
        "POST", f"{pair.address}/v1/completions", json={"stream": True, "n": 60, "gap": 0.05}
    ) as response:
        lines = response.iter_lines()
        pid = json.loads(next(lines).removeprefix("data: "))["pid"]
        pair.of(pid).terminate()
        rest = list(lines)
    assert rest[-2] == "data: [DONE]"


def test_none_there_is_told_as_the_api_does(pair):
    for process in pair.processes:
        process.kill()
    response = pair.ask()
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) >= 1
    assert response.json()["error"]["type"] == "overloaded_error"


def test_largest_body_passes_and_more_is_refused(pair):
    most = pair.balancer.body_bytes
    assert pair.ask(x="x" * (most - 100)).status_code == 200
    response = pair.ask(x="x" * most)
    assert (response.status_code, response.json()["error"]["type"]) == (413, "invalid_request_error")


def test_one_replica_is_asked_by_its_number_and_cannot_be_told_who_asks(pair):
    for number in (1, 2):
        told = httpx.get(f"{pair.address}/replicas/{number}/headers", headers={"X-Forwarded-For": "6.6.6.6"}).json()
        assert told["pid"] == pair.processes[number - 1].pid
        assert told["x-forwarded-for"] == "127.0.0.1"
    pair.processes[0].kill()
    assert httpx.get(f"{pair.address}/replicas/1/headers").status_code == 503, "and never another in its place"


def test_client_that_leaves_is_noticed(pair):
    """haproxy closes the connection to the replica, whose stand-in goes on to the next request."""
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{pair.address}/v1/completions", json={"wait": 60}, timeout=0.5)
    deadline = time.monotonic() + 3
    while any(connections(process.pid) > 2 for process in pair.processes) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert pair.ask().status_code == 200


def connections(pid: int) -> int:
    return sum(os.readlink(link).startswith("socket:") for link in Path(f"/proc/{pid}/fd").iterdir())


def test_prefixes_stay_together_until_one_replica_has_too_many(tmp_path_factory):
    pair = Pair(tmp_path_factory.mktemp("p"), routing="prefix")
    try:
        chat = lambda system, user: {
            "messages": [{"role": "system", "content": system}, {"role": "user", "content": user}]
        }
        homes = {}
        for system in map(str, range(24)):
            (homes[system],) = {pair.ask(**chat(system, str(user))).json()["pid"] for user in range(4)}
        assert len(set(homes.values())) == 2
        (home,) = {pair.ask(prompt="once upon a time " * 100 + str(end)).json()["pid"] for end in range(6)}
        assert home
        with ThreadPoolExecutor(12) as threads:
            many = list(threads.map(lambda _: pair.ask(**chat("7", "x"), wait=0.5).json()["pid"], range(24)))
        assert len(set(many)) == 2, "a prefix that all want is served by both"
    finally:
        pair.close()


def test_tls_and_certificates_of_clients(tmp_path_factory):
    folder = tmp_path_factory.mktemp("p")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca.pem")
    server, client = authority.issue_cert("127.0.0.1"), authority.issue_cert("client@here")
    server.private_key_pem.write_to_path(folder / "key.pem")
    server.cert_chain_pems[0].write_to_path(folder / "cert.pem")
    tls = {"tls_cert": folder / "cert.pem", "tls_key": folder / "key.pem", "tls_client_ca": folder / "ca.pem"}
    pair = Pair(folder, **tls)
    try:
        known = ssl.create_default_context(cafile=str(folder / "ca.pem"))
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{pair.address}/headers", verify=known)
        client.configure_cert(known)
        assert httpx.get(f"{pair.address}/headers", verify=known).json()["x-forwarded-proto"] == "https"
        old = ["openssl", "s_client", "-connect", f"127.0.0.1:{pair.balancer.port}", "-tls1_1"]
        assert subprocess.run(old, capture_output=True, stdin=subprocess.DEVNULL).returncode
    finally:
        pair.close()


def test_what_the_balancer_costs(pair):
    """Milliseconds a request more than the replica alone, in turns; a few tenths on a quiet machine."""
    alone = httpx.Client(transport=httpx.HTTPTransport(uds=str(pair.sockets[0])))
    through, times = httpx.Client(), {"alone": [], "through": []}
    for _ in range(300):
        for name, client, address in (("alone", alone, "http://replica"), ("through", through, pair.address)):
            began = time.perf_counter()
            assert client.post(f"{address}/v1/completions", json={}).status_code == 200
            times[name].append(time.perf_counter() - began)
    added = {q: 1e3 * (quantile(times["through"], q) - quantile(times["alone"], q)) for q in (50, 99)}
    print(f"added by the balancer: p50 {added[50]:.2f} ms, p99 {added[99]:.2f} ms")
    assert added[50] < 50, "on whatever machine"


def quantile(values: list[float], percent: int) -> float:
    return statistics.quantiles(values, n=100)[percent - 1]


def test_no_request_is_lost_while_replicas_die_one_after_the_other(pair):
    """How long a client waits at most where a replica is killed under it, besides its own request."""
    stop, waits, failed = threading.Event(), [], []

    def client() -> None:
        while not stop.is_set():
            began = time.perf_counter()
            response = pair.ask(wait=0.05)
            waits.append(time.perf_counter() - began)
            if response.status_code != 200:
                failed.append(response.text)

    with ThreadPoolExecutor(6) as threads:
        running = [threads.submit(client) for _ in range(6)]
        for index in (0, 1, 0, 1):
            time.sleep(1.0)
            pair.processes[index].kill()
            pair.processes[index].wait()
            time.sleep(0.5)
            pair.sockets[index].unlink()
            pair.processes[index] = pair.start(index)
            while not pair.up(index + 1):
                time.sleep(0.02)
        stop.set()
        for each in running:
            each.result()
    print(f"{len(waits)} requests over 4 kills, {len(failed)} failed; longest {1e3 * max(waits):.0f} ms")
    assert not failed


def test_nothing_is_left_where_the_supervisor_is_killed(tmp_path_factory):
    """Not haproxy either, nor the port that it had."""
    folder, port = tmp_path_factory.mktemp("p"), free_port()
    program = f"""
import asyncio, sys
from pathlib import Path
from serving.cluster.balancer import Balancer
from serving.cluster.replica import Replica, Watching
from serving.cluster.supervisor import Supervisor
folder = Path({str(folder)!r})
sockets = tuple(folder / f"r{{number}}.sock" for number in (1, 2))
command = lambda model, socket: [sys.executable, {str(STAND_IN)!r}, model, str(socket)]
replicas = [Replica(number, socket, command, "m", Watching()) for number, socket in enumerate(sockets, 1)]
balancer = Balancer(folder, sockets, port={port})
balancer.write()
pids = lambda: print(*(each.child.pid for each in replicas), cluster._haproxy.pid, flush=True)
cluster = Supervisor(balancer, replicas, pids)
asyncio.run(cluster.run())
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=STAND_IN.parent.parent
    ) as process:
        pids = process.stdout.readline().split()
        assert len(pids) == 3
        assert httpx.get(f"http://127.0.0.1:{port}/headers").status_code == 200
        process.kill()
    deadline = time.monotonic() + 5
    while any(map(runs, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(runs, pids))
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/headers")


def runs(pid: str) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False
