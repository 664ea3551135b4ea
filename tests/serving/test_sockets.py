"""What only shows on a real connection: clients that go away, are slow, send too much; how streams begin and end."""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from doubles import EngineDouble, OpenGate, listening, served, until

import serving.body
from inference.requests import Piece
from serving.api import completions
from serving.lifecycle import bound_to

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def engine():
    return EngineDouble(seconds=0.01, reach=4096)


@pytest.fixture(scope="module")
def gate():
    return OpenGate()


@pytest.fixture(scope="module")
def app(engine, gate):
    return served(engine, gate)


@pytest.fixture(scope="module")
def address(app):
    with listening(app) as url:
        yield url


@contextlib.contextmanager
def connected(address):
    host = urlsplit(address)
    with contextlib.closing(socket.create_connection((host.hostname, host.port), 10)) as connection:
        yield connection


def post(body: bytes | dict, path="/v1/completions", **headers) -> bytes:
    body = json.dumps(body).encode() if isinstance(body, dict) else body
    told = {"content-type": "application/json", "content-length": str(len(body)), "host": "x"}
    told |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = "".join(f"{name}: {value}\r\n" for name, value in told.items() if value is not None)
    return f"POST {path} HTTP/1.1\r\n{lines}\r\n".encode("latin-1") + body


def answered(address, request: bytes) -> tuple[int, dict, bytes]:
    with connected(address) as connection:
        connection.sendall(request)
        response = http.client.HTTPResponse(connection)
        response.begin()
        return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_place_within_a_step(address, engine, gate, stream):
    with connected(address) as connection:
        connection.sendall(post({"prompt": "a", "max_tokens": 3000, "stream": stream}))
        if stream:
            assert b"200 OK" in connection.recv(4096)
        assert until(lambda: engine.state().running == 1)
    gone = time.monotonic()
    assert until(lambda: engine.state().running == 0, 2)
    assert time.monotonic() - gone < 0.5  # the double's step takes 10 ms; the rest is the machine's
    assert until(lambda: bool(gate.admissions[-1].settled))
    (status, prompt, new) = gate.admissions[-1].settled[0]
    assert (status, prompt) == (499, 1)
    assert new < 3000


def test_headers_of_a_stream_come_only_with_its_first_piece(address, engine):
    engine.paused.set()
    try:
        with connected(address) as connection:
            connection.sendall(post({"prompt": "a", "max_tokens": 2, "stream": True}))
            connection.settimeout(0.3)
            with pytest.raises(TimeoutError):
                connection.recv(1)
            engine.paused.clear()
            connection.settimeout(5)
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")
    finally:
        engine.paused.clear()


def test_what_fails_before_the_first_piece_has_a_status(address, engine):
    engine.script = lambda request, index: [Piece(index, finish="error", error="no")]
    try:
        status, _, body = answered(address, post({"prompt": "a", "stream": True}))
    finally:
        engine.script = engine.counting
    assert (status, json.loads(body)["error"]["code"]) == (500, "engine_error")


def test_a_fault_in_mid_stream_is_an_event_and_no_done(address, engine):
    engine.script = lambda request, index: [Piece(index, "a", (97,)), Piece(index, finish="error", error="no")]
    try:
        status, _, body = answered(address, post({"prompt": "a", "stream": True}))
    finally:
        engine.script = engine.counting
    events = body.decode().strip().split("\n\n")
    assert status == 200
    assert json.loads(events[-1].removeprefix("data: "))["error"]["type"] == "server_error"
    assert "[DONE]" not in body.decode()


def test_a_fault_of_the_server_in_mid_stream_is_recorded_as_500(address, app, gate, monkeypatch):
    records, choice = [], completions.Teller._choice

    def broken(self, *pieces):
        if self._exchange.new_tokens > 1:
            raise RuntimeError("a fault of the server")
        return choice(self, *pieces)

    monkeypatch.setattr(completions.Teller, "_choice", broken)
    app.state.service.told.append(records.append)
    _, _, body = answered(address, post({"prompt": "a", "max_tokens": 4, "stream": True}))
    assert b"internal_error" in body
    assert until(lambda: any(record.fault == "RuntimeError" for record in records))
    app.state.service.told.remove(records.append)
    assert (records[-1].status, records[-1].parts) == (500, 1)
    assert gate.admissions[-1].settled[0][0] == 500


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (post(b"x" * 10, content_encoding="gzip"), 415),
        (post(b"{}", content_type="text/plain"), 415),
        (post(b"{}", content_type=None), 415),
        (post(b"{}", content_length=str(10**12)), 413),
        (post(b"[" * 100_000), 400),
        (post(b'{"prompt": "a", "n": ' + b"9" * 100_000 + b"}"), 400),
        (post(b'{"prompt": "\\ud800"}'), 400),
        (post(b'{"prompt": "\xff"}'), 400),
        (post(b""), 400),
        (post(b"null"), 400),
        (post(b'{"prompt": "a", "temperature": NaN}'), 400),
        (post({"prompt": ["a"] * 129}), 400),
        (post({"prompt": ["a"] * 100, "n": 2}), 400),
        (post({"prompt": "a" * 100_000}), 400),
        (post({"prompt": "a", "stop": ["x" * 257]}), 400),
        (post({"prompt": "a", "logit_bias": {str(i): 1 for i in range(2000)}}), 400),
        (post({"prompt": "a", "guided_regex": "a" * 70_000}), 400),
        (post(b"", path="/nothing"), 404),
        (b"DELETE /v1/completions HTTP/1.1\r\nhost: x\r\n\r\n", 405),
        (b"no HTTP at all\r\n\r\n", 400),
    ],
)
def test_hostile_bodies_end_in_a_status(address, request_bytes, status):
    found, headers, body = answered(address, request_bytes)
    assert found == status
    if headers["content-type"].startswith("application/json"):  # else it is no HTTP, and uvicorn's own words
        assert {"message", "type", "param", "code"} == json.loads(body)["error"].keys()
    assert answered(address, b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n")[0] == 200


def test_an_endless_body_is_cut_off(address):
    with connected(address) as connection:
        connection.sendall(post(b"", transfer_encoding="chunked", content_length=None))
        chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
        with contextlib.suppress(ConnectionError):
            for _ in range(1000):
                connection.sendall(chunk)
                if until(lambda: bool(_readable(connection)), 0):
                    break
        assert connection.recv(100).startswith(b"HTTP/1.1 413")


def _readable(connection) -> bytes:
    connection.setblocking(False)
    try:
        return connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return b""
    finally:
        connection.settimeout(10)


def test_a_slow_body_times_out(address, monkeypatch):
    monkeypatch.setattr(serving.body, "SECONDS", 0.2)
    with connected(address) as connection:
        connection.sendall(post(b"", content_length="100") + b'{"prompt')
        assert connection.recv(100).startswith(b"HTTP/1.1 408")


def test_a_long_prompt_does_not_stall_others(address, app):
    tokenizer = app.state.service.tokenizer
    slow, encode = threading.Event(), type(tokenizer).encode_batch

    def encode_batch(self, texts):
        slow.wait(5)
        return encode(self, texts)

    type(tokenizer).encode_batch = encode_batch
    try:
        with connected(address) as connection:
            connection.sendall(post({"prompt": "a" * 4000 + "é" * 200, "max_tokens": 1}))
            began = time.monotonic()
            assert answered(address, b"GET /readyz HTTP/1.1\r\nhost: x\r\n\r\n")[0] == 200
            assert time.monotonic() - began < 2
            slow.set()
            assert connection.recv(100).startswith(b"HTTP/1.1 400")  # 4,400 tokens and not 4,096
    finally:
        slow.set()
        type(tokenizer).encode_batch = encode


def test_a_clients_own_id_is_cleaned_and_never_the_id(address, app, caplog):
    records = []
    app.state.service.told.append(records.append)
    with caplog.at_level("INFO", "isomesh.serving"):
        secret = "the secret of the prompt"
        _, headers, _ = answered(address, post({"prompt": secret}, x_request_id="a\tb\x9b[31m" + "c" * 100))
        assert until(lambda: bool(records))
    assert headers["x-request-id"].startswith("req-")
    assert records[-1].client_id == "ab[31m" + "c" * 56  # of 64 characters
    lines = [line.getMessage() for line in caplog.records]
    assert json.loads(lines[-1])["id"] == headers["x-request-id"]
    assert secret not in "".join(lines)
    assert all(line.isprintable() for line in lines)


def test_a_request_is_seen_and_ended_by_its_own_tenant_only(address, engine):
    with connected(address) as connection:
        connection.sendall(post({"prompt": "a", "max_tokens": 3000}, x_tenant="one", x_request_id="mine"))
        assert until(lambda: engine.state().running == 1)

        def ask(method, path, tenant):
            request = f"{method} {path} HTTP/1.1\r\nhost: x\r\nx-tenant: {tenant}\r\n\r\n".encode()
            status, _, body = answered(address, request)
            return status, json.loads(body)

        assert ask("GET", "/v1/requests", "two")[1]["data"] == []
        (entry,) = ask("GET", "/v1/requests", "one")[1]["data"]
        assert entry["client_request_id"] == "mine"
        path = f"/v1/requests/{entry['id']}"
        others = ask("GET", path, "two"), ask("DELETE", path, "two"), ask("GET", "/v1/requests/req-none", "two")
        assert [status for status, _ in others] == [404] * 3
        assert others[0][1] == others[2][1]
        assert engine.state().running == 1
        assert ask("GET", path, "one")[1]["new_tokens"] > 0
        assert ask("DELETE", path, "one")[0] == 200
        response = http.client.HTTPResponse(connection)
        response.begin()
        assert (response.status, json.loads(response.read())["error"]["code"]) == (409, "request_ended")
    assert engine.state().running == 0


def test_a_request_is_ended_while_its_grammar_is_compiled(address, engine, monkeypatch):
    deleted, submit = [], engine.submit

    def slow(request, listener):
        ask = lambda method, path: answered(
            address, f"{method} /v1/requests{path} HTTP/1.1\r\nhost: x\r\n\r\n".encode()
        )
        (entry,) = json.loads(ask("GET", "")[2])["data"]
        deleted.append(json.loads(ask("DELETE", f"/{entry['id']}")[2])["ended"])
        submit(request, listener)

    monkeypatch.setattr(engine, "submit", slow)
    status, _, body = answered(address, post({"prompt": "a", "max_tokens": 3000, "guided_regex": "a+"}))
    assert (status, json.loads(body)["error"]["code"], deleted) == (409, "request_ended", [True])
    assert until(lambda: engine.state().running == 0)


def test_a_client_that_goes_away_while_its_grammar_is_compiled_leaves_nothing(address, engine, gate, monkeypatch):
    compiles, goes_on, submit = threading.Event(), threading.Event(), engine.submit

    def slow(request, listener):
        compiles.set()
        assert goes_on.wait(10)
        submit(request, listener)

    monkeypatch.setattr(engine, "submit", slow)
    with connected(address) as connection:
        connection.sendall(post({"prompt": "a", "max_tokens": 3000, "guided_regex": "a+"}))
        assert compiles.wait(10)
    goes_on.set()
    assert until(lambda: bool(gate.admissions[-1].settled))
    assert gate.admissions[-1].settled[0][0] == 499
    assert until(lambda: engine.state().running == engine.state().waiting == 0)


def test_who_sends_grammars_that_take_long_holds_up_nobody_else(address, engine, monkeypatch):
    compiled, goes_on, submit = [], threading.Event(), engine.submit

    def slow(request, listener):
        compiled.append(request.sampling.grammar)
        assert "slow" not in request.sampling.grammar or goes_on.wait(10)
        submit(request, listener)

    monkeypatch.setattr(engine, "submit", slow)
    asked = {"prompt": "a", "max_tokens": 1}
    with contextlib.ExitStack() as connections:
        many = [connections.enter_context(connected(address)) for _ in range(6)]
        for connection in many:
            connection.sendall(post(asked | {"guided_regex": "slow"}, x_tenant="one"))
        assert until(lambda: bool(compiled))
        assert answered(address, post({"prompt": "x" * 5000}, "/tokenize"))[0] == 200
        assert answered(address, post(asked | {"guided_regex": "quick"}, x_tenant="two"))[0] == 200
        assert len(compiled) == 2
        goes_on.set()
        for connection in many:
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")
    assert len(compiled) == 7


def test_a_long_list_of_tokens_is_spelled_in_a_thread(address, app, monkeypatch):
    spelling, names = app.state.service.spelling, set()
    spelled = spelling.text
    monkeypatch.setattr(spelling, "text", lambda t: names.add(threading.current_thread().name) or spelled(t))
    _, _, body = answered(address, post({"prompt": "ab" * 5000, "return_token_strs": True}, "/tokenize"))
    told = json.loads(body)
    assert (told["count"], told["tokens"], told["token_strs"]) == (10_000, [97, 98] * 5000, ["a", "b"] * 5000)
    assert all(name.startswith("tokenize") for name in names)


def test_a_silent_step_loop_is_not_ready(address, app, engine):
    app.state.service.beat_seconds = 0.2
    engine.paused.set()
    try:
        with connected(address) as connection:
            connection.sendall(post({"prompt": "a"}))
            ready = lambda: answered(address, b"GET /readyz HTTP/1.1\r\nhost: x\r\n\r\n")
            assert until(lambda: ready()[0] == 503, 3)
            assert ready()[1]["retry-after"]
            assert answered(address, b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n")[0] == 200
            engine.paused.clear()
            assert until(lambda: ready()[0] == 200, 3)
    finally:
        engine.paused.clear()
        app.state.service.beat_seconds = 10.0


@pytest.fixture
def process(request):
    """A server in a process of its own: (process, address)."""
    program = [sys.executable, "tests/serving/double_server.py", "0", *request.param]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    running = subprocess.Popen(program, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        yield running, running.stdout.readline().decode().strip()
    finally:
        running.kill()
        running.communicate()


@pytest.mark.parametrize("process", [("0.02", "20")], indirect=True)
def test_sigterm_refuses_new_work_finishes_the_old_and_ends_with_0(process):
    running, address = process
    with connected(address) as connection:
        connection.sendall(post({"prompt": "a", "max_tokens": 50, "stream": True}))
        first = connection.recv(4096)
        running.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        status, headers, _ = answered(address, post({"prompt": "a"}))
        assert (status, headers["retry-after"]) == (503, "1")
        assert answered(address, b"GET /readyz HTTP/1.1\r\nhost: x\r\n\r\n")[0] == 503
        rest = b""
        while part := connection.recv(65536):
            rest += part
    assert b"[DONE]" in rest
    assert (first + rest).count(b"data: ") == 51
    assert running.wait(10) == 0


@pytest.mark.parametrize("process", [("0.05", "0.3")], indirect=True)
def test_what_outlives_the_grace_is_told_so(process):
    running, address = process
    with connected(address) as connection:
        connection.sendall(post({"prompt": "a", "max_tokens": 3000, "stream": True}))
        connection.recv(4096)
        running.send_signal(signal.SIGTERM)
        rest = b""
        while part := connection.recv(65536):
            rest += part
    assert b"overloaded_error" in rest
    assert b"[DONE]" not in rest
    assert running.wait(10) == 0


def test_a_socket_takes_the_place_of_an_older_one_and_of_nothing_else(tmp_path):
    for _ in range(2):
        bound_to(tmp_path / "socket").close()
    (tmp_path / "notes.txt").write_text("important")
    with pytest.raises(OSError, match=r"cannot listen at .*notes.txt: it is there, and no socket"):
        bound_to(tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "important"
