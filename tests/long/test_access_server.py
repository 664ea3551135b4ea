"""`python -m serving` as a process: its first start, where it may listen, TLS, and what it writes."""

import json
import os
import re
import signal
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest
import trustme
from replicas import ROOT, TESTS, Postgres, environment, server

from runtime.ports import free_port
from serving.access.opening import open_state


@pytest.fixture
def state(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    return tmp_path / "state"


def log(state):
    return state.parent / "log"


def ask(address: str, key: str | None, path: str = "/v1/models", body=None, **more):
    """(status, text) of a request."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(
            urllib.request.Request(address + path, data, headers), timeout=30, **more
        ) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def command(*words) -> subprocess.CompletedProcess:
    """A command of `python -m serving`."""
    words = [sys.executable, "-m", "serving", *map(str, words)]
    return subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=120)


def refused(state, *words, **env) -> str:
    """What a server that does not start says."""
    words = [
        sys.executable,
        str(TESTS / "guarded_server.py"),
        str(state.parent),
        "--state",
        str(state),
        "--port",
        "0",
        *words,
    ]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment(**env), timeout=120)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done
    return done.stderr


def test_a_first_start_prints_a_curl_line_that_works_when_pasted(state):
    with server(log(state), "--state", str(state)) as process:
        time.sleep(0.5)
        lines = process.said().splitlines()
        (line,) = [line for line in lines if line.startswith("curl ")]
        assert lines[lines.index(line) - 1] == "first start: this admin key is shown once; try"
        done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, timeout=60)
        assert json.loads(done.stdout)["choices"][0]["message"]["role"] == "assistant", done
        key = re.search(r"im-[a-z0-9]{10}-\w{40}", line)[0]
        assert ask(process.address, None)[0] == 401
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    with server(log(state), "--state", str(state)) as process:
        time.sleep(0.5)
        assert "im-" not in process.said()
        assert ask(process.address, key)[0] == 200
    done = command("audit", "verify", "--state", state)
    assert (done.returncode, done.stdout.count("as they were written")) == (0, 1), done


def test_beyond_this_machine_it_needs_keys_and_tls(state, tmp_path):
    told = "--host 0.0.0.0 is reached from other machines: it needs "
    assert f"{told}--tls-cert and --tls-key and a key (python -m serving" in refused(state, "--host", "0.0.0.0")
    key = command("keys", "create", "--role", "user", "--state", state).stdout.strip()
    assert f"{told}--tls-cert and --tls-key, or --insecure" in refused(state, "--host", "0.0.0.0")
    with server(log(state), "--state", str(state), "--host", "0.0.0.0", "--insecure") as process:
        assert ask(process.address.replace("0.0.0.0", "127.0.0.1"), key)[0] == 200
        assert ask(process.address.replace("0.0.0.0", "127.0.0.1"), None)[0] == 401
        assert "first start" not in process.said()


@pytest.fixture
def authority(tmp_path):
    """A test authority with the certificates of a server and a client."""
    made = trustme.CA()
    server, client = made.issue_cert("127.0.0.1", "localhost"), made.issue_cert("client@example.org")
    paths = {}
    for name, cert in (("server", server), ("client", client)):
        paths[name] = (tmp_path / f"{name}.pem", tmp_path / f"{name}.key")
        for number, blob in enumerate(cert.cert_chain_pems):
            blob.write_to_path(paths[name][0], append=number > 0)
        cert.private_key_pem.write_to_path(paths[name][1])
        paths[name][1].chmod(0o600)
    made.cert_pem.write_to_path(tmp_path / "ca.pem")
    return made, paths, tmp_path / "ca.pem"


def context(authority, *, client: bool = False, most=ssl.TLSVersion.TLSv1_3) -> ssl.SSLContext:
    made, paths, _ = authority
    found = ssl.create_default_context()
    made.configure_trust(found)
    found.minimum_version, found.maximum_version = ssl.TLSVersion.MINIMUM_SUPPORTED, most
    found.set_ciphers("ALL:@SECLEVEL=0")
    if client:
        found.load_cert_chain(*paths["client"])
    return found


def test_tls(state, authority):
    cert, key_file = authority[1]["server"]
    words = ["--state", str(state), "--tls-cert", str(cert), "--tls-key", str(key_file)]
    key_file.chmod(0o644)
    assert "others can read this secret; run chmod 600" in refused(state, *words[2:])
    key_file.chmod(0o600)
    assert "TLS needs both --tls-cert and --tls-key" in refused(state, *words[2:4])
    assert "not a certificate, its key" in refused(state, "--tls-cert", str(key_file), "--tls-key", str(key_file))
    with server(log(state), *words) as process:
        time.sleep(0.5)
        key = re.search(r"im-[a-z0-9]{10}-\w{40}", process.said())[0]
        line = next(line for line in process.said().splitlines() if line.startswith("curl "))
        assert f"--cacert {cert}" in line
        assert process.address.startswith("https://")
        for most in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            assert ask(process.address, key, context=context(authority, most=most))[0] == 200
        for most in (ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1):
            with pytest.raises(urllib.error.URLError):
                ask(process.address, key, context=context(authority, most=most))
        with pytest.raises(urllib.error.URLError):
            ask(process.address, key)  # nobody trusts this authority
        with pytest.raises((urllib.error.URLError, ConnectionError)):
            ask(process.address.replace("https", "http"), key)
        assert ask(process.address, key, context=context(authority))[0] == 200


def test_mutual_tls(state, authority):
    cert, key_file = authority[1]["server"]
    words = ["--tls-cert", str(cert), "--tls-key", str(key_file), "--tls-client-ca", str(authority[2])]
    with server(log(state), "--state", str(state), *words) as process:
        time.sleep(0.5)
        key = re.search(r"im-[a-z0-9]{10}-\w{40}", process.said())[0]
        assert ask(process.address, key, context=context(authority, client=True))[0] == 200
        assert ask(process.address, None, context=context(authority, client=True))[0] == 401
        with pytest.raises((urllib.error.URLError, ConnectionError)):
            ask(process.address, key, context=context(authority))
        stranger = context((trustme.CA(), authority[1], None), client=True)
        authority[0].configure_trust(stranger)
        other = trustme.CA().issue_cert("client@example.org")
        other.configure_cert(stranger)
        with pytest.raises((urllib.error.URLError, ConnectionError)):
            ask(process.address, key, context=stranger)


def test_planted_secrets_are_nowhere(state):
    """Everything that a server writes is searched for every secret that it was given or has made."""
    database = Postgres()
    secret = "planted-secret-of-the-server-2718281828"
    env = {"ISOMESH_SECRET": secret, "ISOMESH_DATABASE": database.address}
    answers = []
    try:
        with server(log(state), "--state", str(state), **env) as process:
            time.sleep(0.5)
            admin = re.search(r"im-[a-z0-9]{10}-\w{40}", process.said())[0]
            (state.parent / "log").write_text("")  # the first key is shown once, as it has to be
            status, text = ask(process.address, admin, "/v1/keys", {"role": "user", "name": "bob"})
            user = json.loads(text)["key"]
            assert status == 200
            planted = [secret, "planted-pw-3141", admin[14:], user[14:], "planted prompt"]
            paths = ["/v1/models", "/v1/keys", "/state", "/openapi.json", "/metrics", "/v1/requests", "/nothing", "/"]
            for key in (admin, user, user + "x", user[:-1], None, f"{admin} {user}"):
                answers += [ask(process.address, key, path)[1] for path in paths]
                for body in (
                    {"prompt": "planted prompt"},
                    {"prompt": "planted prompt", "n": -1},
                    {"bad": "planted prompt"},
                ):
                    ask(process.address, key, "/v1/completions", body)
            ask(process.address, user, f"/v1/models/x?key={user}")
            database.stop()
            answers.append(ask(process.address, user)[1])
            database.start()
            process.send_signal(signal.SIGTERM)
            process.wait(60)
        told = refused(state, **env | {"ISOMESH_DATABASE": database.address.replace("3141", "wrong")})
        assert "cannot be used" in told
        answers.append(told)
        written = {path: path.read_bytes() for path in state.parent.rglob("*") if path.is_file()}
        assert {path.name for path in written} >= {"log", "server-0.000000.jsonl"}
        for one in [*planted, "planted-pw"]:
            assert not [path for path, data in written.items() if one.encode() in data], one
            assert not [text for text in answers if one in text], one
        dump = [str(database.bin / "pg_dump"), "-h", "127.0.0.1", "-p", str(database.port), "-U", "mesh", "postgres"]
        dumped = subprocess.run(
            dump, env=os.environ | {"PGPASSWORD": "planted-pw-3141"}, capture_output=True, text=True
        )
        assert user[:13] in dumped.stdout
        assert not any(one in dumped.stdout for one in planted)
    finally:
        database.close()


def test_kill_9_in_the_midst_leaves_a_right_audit_and_the_next_start_goes_on(state):
    with server(log(state), "--state", str(state), "--name", "slow") as process:
        time.sleep(0.5)
        key = re.search(r"im-[a-z0-9]{10}-\w{40}", process.said())[0]
        body = {"prompt": "the mesh", "max_tokens": 5}
        asking = [threading.Thread(target=lambda: _quietly(process.address, key, body)) for _ in range(12)]
        for thread in asking:
            thread.start()
        time.sleep(0.5)
        process.kill()
        for thread in asking:
            thread.join()
    with server(log(state), "--state", str(state)) as process:
        assert ask(process.address, key, "/v1/completions", body)[0] == 200
    assert command("audit", "verify", "--state", state).returncode == 0
    files = sorted((state / "audit").glob("server-0.*.jsonl"))
    lines = files[0].read_bytes().splitlines(keepends=True)
    files[0].write_bytes(b"".join([lines[0].replace(b'"decision":"allow"', b'"decision":"deny"'), *lines[1:]]))
    done = command("audit", "verify", "--state", state)
    altered = b'"decision":"allow"' in lines[0]
    assert (done.returncode, f"{files[0]}:1: altered" in done.stdout) == ((3, True) if altered else (0, False)), done
    assert open_state(state).keys.find(key)


def test_the_documents_examples_run_as_written(tmp_path):
    """docs/access.md in one shell, in order, from an empty home."""
    (tmp_path / "config.json").write_text("{}")
    shim = tmp_path / "python"
    fake = f'shift 3; exec {sys.executable} {TESTS}/guarded_server.py {tmp_path} "$@"'
    shim.write_text(f'#!/bin/sh\nif [ "$3" = runs/mine ]; then {fake}; fi\nexec {sys.executable} "$@"\n')
    shim.chmod(0o755)
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / "access.md").read_text(), re.DOTALL)
    port = free_port()
    script = "\n".join(blocks).replace("8000", str(port))
    wait = f"until curl -s http://127.0.0.1:{port}/livez; do sleep 0.2; done\n"
    first, rest = script.split("\n", 1)
    env = environment(HOME=str(tmp_path), PATH=f"{tmp_path}:{os.environ['PATH']}")
    script = f"set -e\n{first}\n{wait}{rest}\nkill %1; wait %1"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=ROOT, env=env, timeout=300)
    assert done.returncode == 0, done
    said = done.stdout
    assert "text_completion" in said
    assert "Authorization: Bearer im-" in said
    assert "as they were written" in said
    assert "analyst" in said


def _quietly(address: str, key: str, body: dict) -> None:
    try:
        ask(address, key, "/v1/completions", body)
    except OSError:
        return
