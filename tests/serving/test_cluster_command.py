"""python -m serving cluster, roll and replicas: what is passed on to replicas, and mistakes told in one line."""

import argparse
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.arguments import Parser
from runtime.commands import parser
from serving.__main__ import COMMANDS, main
from serving.cluster import control
from serving.commands import cluster
from serving.opening import name_of


def options(*words: str) -> argparse.Namespace:
    return parser("serving", "", COMMANDS, "cluster").parse_intermixed_args(list(words))


def test_replicas_get_the_options_of_the_server(tmp_path):
    given = ("--max-running", "3", "--cache-dtype", "int8", "--audit-strict", "--grace", "7", "mesh.tensor=2")
    own = (
        "--host",
        "::1",
        "--port",
        "7",
        "--routing",
        "prefix",
        "--replicas",
        "3",
        "--insecure",
        "--state",
        str(tmp_path),
    )
    own += ("--metrics-port", "9100")
    command = cluster.command_of(options("some/model", *own, *given), 3)("other/model", Path("/s/r1.sock"))
    server = Parser()
    cluster.add_serve(server)
    read = server.parse_intermixed_args(command[command.index("serve") + 1 :])
    assert (str(read.model), read.socket, read.settings) == ("other/model", Path("/s/r1.sock"), ["mesh.tensor=2"])
    assert read.name == "model", "of the first weights, whatever comes later"
    assert (read.max_running, read.cache_dtype, read.audit_strict, read.grace) == (3, "int8", True, 7.0)
    assert (read.host, read.tls_cert, read.insecure) == ("127.0.0.1", None, False)
    assert (read.state, read.metrics_port) == (tmp_path, 9102)


@pytest.mark.parametrize(
    ("path", "name"),
    [(".", "run-1.5"), ("../run-1.5", "run-1.5"), ("small-0.5b.gguf", "small-0.5b"), ("a/b.v2", "b.v2")],
)
def test_a_model_is_called_as_its_folder_or_file(path, name, tmp_path, monkeypatch):
    (tmp_path / "run-1.5").mkdir()
    monkeypatch.chdir(tmp_path / "run-1.5")
    assert name_of(Path(path)) == name
    with pytest.raises(ValueError, match="give one with --name"):
        name_of(Path("/"))


def test_balancer_gets_the_rest(tmp_path):
    words = ("--host", "::1", "--port", "81", "--routing", "prefix", "--replicas", "3", "--kept-body", "1000")
    balancer = cluster.balancer_of(options("m", *words, "--connections", "9"), tmp_path)
    assert (balancer.host, balancer.port, balancer.routing, len(balancer.sockets)) == ("::1", 81, "prefix", 3)
    assert (balancer.kept_bytes, balancer.connections, balancer.address) == (1000, 9, "[::1]")


def test_place_is_its_owners_and_not_too_deep(tmp_path):
    place = cluster.open_place(tmp_path / "s", 2)
    assert place.stat().st_mode & 0o777 == 0o700
    with pytest.raises(ValueError, match=r"has \d+ bytes, a socket's path at most 97"):
        cluster.open_place(tmp_path / ("x" * 120), 2)
    with pytest.raises(ValueError, match="more than 64"):
        cluster.open_place(tmp_path, 65)


@pytest.mark.parametrize("command", ["roll", "replicas"])
def test_without_a_cluster(command, tmp_path, capsys):
    assert main([command, "--state", str(tmp_path)]) == 2
    assert "no cluster runs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--socket", "x.sock"), "sockets of its own"),
        (("--tls-cert", "no.pem"), "both --tls-cert and --tls-key"),
        (("--host", "0.0.0.0"), "reached from other machines"),
        (("--port", "TAKEN"), "cannot listen at"),
    ],
)
def test_mistakes_are_told_before_anything_starts(words, told, tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        words = [port if word == "TAKEN" else word for word in words]
        address = [] if "--port" in words else ["--port", "0"]
        assert main(["cluster", "some/model", "--state", str(tmp_path), *address, *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert told in lines[0]


def test_what_was_asked_is_printed(tmp_path, capsys, monkeypatch):
    told = {"number": 1, "state": "ready", "pid": 5, "model": "/m", "starts": 2, "socket": "s"}
    monkeypatch.setattr(
        control, "ask", lambda place, **asked: iter([{"line": "rolling"}, {"replicas": [told], "code": 0}])
    )
    assert main(["roll", "--state", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert said.err == "rolling\n"
    assert said.out.split() == ["1", "ready", "pid", "5", "starts", "2", "/m"]
    monkeypatch.setattr(control, "ask", lambda place, **asked: iter([{"line": "rolling"}]))
    assert main(["roll", "--state", str(tmp_path)]) == 2, "it went away before it was done"


def test_supervising_imports_no_jax():
    code = "import sys, serving.commands.cluster; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ).returncode == 0
