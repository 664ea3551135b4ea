"""Ports that are found free."""

import contextlib
import socket

import pytest

from runtime import ports


def test_ports_in_a_row_can_be_listened_at_and_no_outgoing_connection_gets_them():
    first = ports.free_port(3)
    assert first + 3 <= int(ports.OUTGOING.read_text().split()[0])
    with contextlib.ExitStack() as stack:
        for port in range(first, first + 3):
            stack.enter_context(socket.create_server(("127.0.0.1", port)))


def test_taken_ports_are_passed_over(monkeypatch):
    with socket.create_server(("127.0.0.1", ports.free_port())) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(ports.random.SystemRandom, "randrange", lambda *_: port)
        with pytest.raises(OSError, match="no 2 free ports in a row"):
            ports.free_port(2)
        found = iter([port, port - 5, port - 5])
        monkeypatch.setattr(ports.random.SystemRandom, "randrange", lambda *_: next(found))
        assert ports.free_port(2) == port - 5
