"""A connection from every process to process 0, over which each learns at once that another has ended, and why.

JAX notices a process that is gone after its heartbeats fail, and then aborts the others from C++ without a reason. Here
a process that leaves says so in a line, the system closes the connections of one that is killed, and all end together
with the same exit code. A host that vanishes from the network is left to JAX's heartbeats.
"""

import contextlib
import json
import logging
import secrets
import select
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

from runtime.exit_codes import FAULT
from runtime.leave import leave

log = logging.getLogger("isomesh.lifeline")

KEY = "isomesh/lifeline"  # in the key-value store of JAX's coordinator
JOIN_SECONDS = 10
KEEPALIVE_SECONDS = 60  # a connection that says nothing for hours must not be forgotten on its way


class Lifeline:
    """Of one process. `store`: JAX's client of the coordinator, by which the address is told.

    Process 0 waits until all others are connected, so that none can be missed when it leaves, or for JOIN_SECONDS.
    """

    def __init__(self, store: Any, rank: int, processes: int, host: str, bind: str = ""):
        self.rank = rank
        self._links: dict[int, socket.socket] = {}  # by the rank at the other end
        self._lock = threading.Lock()
        self._heard = False
        self._joined = threading.Semaphore(0)
        if rank == 0:
            server, token = _listen(bind), secrets.token_hex(16)
            store.key_value_set(KEY, f"{server.getsockname()[1]} {token}")
            _in_thread(self._accept, server, token)
            deadline = time.monotonic() + JOIN_SECONDS
            for _ in range(processes - 1):
                self._joined.acquire(timeout=max(0.0, deadline - time.monotonic()))
            return
        port, token = store.blocking_key_value_get(KEY, 1000 * JOIN_SECONDS).split()
        try:
            link = socket.create_connection((host, int(port)), timeout=JOIN_SECONDS)
            _keep_alive(link)
            _send(link, {"token": token, "rank": rank})
        except OSError as error:
            log.warning("no connection to %s:%s (%s): the end of another process is noticed late", host, port, error)
            return
        self._links[0] = link
        _in_thread(self._listen_to, 0, link, _lines(link))

    def tell(self, code: int, line: str, seconds: float) -> None:
        """Tells the others that this process ends, and why; process 0 waits until they have ended, or so long."""
        deadline = time.monotonic() + seconds
        if not self._heard:  # else the word of another has been passed on
            self._pass_on({"process": self.rank, "code": code, "line": line})
        if self.rank == 0:  # JAX aborts the others when its coordinator ends before them
            for link in self._open():
                _wait_for_end(link, deadline)

    def goodbye(self) -> None:
        """This process has done its part: the others shall not wonder that it ends."""
        self._pass_on({"process": self.rank, "done": True})

    def _accept(self, server: socket.socket, token: str) -> None:
        while True:
            link, _ = server.accept()
            _in_thread(self._welcome, link, token)

    def _welcome(self, link: socket.socket, token: str) -> None:
        _keep_alive(link)
        try:
            lines = _lines(link)
            hello = next(lines)
            if not secrets.compare_digest(hello["token"], token):
                raise ValueError("a stranger")
        except (OSError, ValueError, KeyError, TypeError, StopIteration):
            link.close()
            return
        with self._lock:
            self._links[hello["rank"]] = link
        self._joined.release()
        self._listen_to(hello["rank"], link, lines)

    def _listen_to(self, rank: int, link: socket.socket, lines: Iterator[dict]) -> None:
        over = False
        try:
            for told in lines:
                if "code" in told:
                    self._leave_with(told, but=rank)
                over = True
        except OSError as error:  # the network, not the process: JAX's heartbeats shall judge
            log.warning("the connection to process %d is lost (%s): its end is noticed late", rank, error)
            over = True
        with self._lock:
            self._links.pop(rank, None)
        link.close()
        if not over:
            line = "ended without a word: it was killed, or has crashed"
            self._leave_with({"process": rank, "code": FAULT, "line": line})

    def _leave_with(self, told: dict, but: int | None = None) -> None:
        self._heard = True
        self._pass_on(told, but)
        leave(told["code"], f"process {told['process']}: {told['line']}")

    def _pass_on(self, told: dict, but: int | None = None) -> None:
        for link in self._open(but):
            with contextlib.suppress(OSError):
                _send(link, told)

    def _open(self, but: int | None = None) -> list[socket.socket]:
        with self._lock:
            return [link for rank, link in self._links.items() if rank != but]


def _listen(bind: str) -> socket.socket:
    if bind:
        family = socket.AF_INET6 if ":" in bind else socket.AF_INET
        return socket.create_server((bind, 0), family=family, backlog=1024)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(("", 0), backlog=1024)


def _keep_alive(link: socket.socket) -> None:
    link.settimeout(None)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name in ("TCP_KEEPIDLE", "TCP_KEEPINTVL"):  # not every system has them
        if hasattr(socket, name):
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), KEEPALIVE_SECONDS)


def _send(link: socket.socket, told: dict) -> None:
    link.sendall(json.dumps(told).encode() + b"\n")


def _lines(link: socket.socket) -> Iterator[dict]:
    """The messages of the other end until it closes the connection, or the system does so for it."""
    rest = b""
    with contextlib.suppress(ConnectionResetError):
        while received := link.recv(65536):
            *whole, rest = (rest + received).split(b"\n")
            yield from map(json.loads, whole)


def _wait_for_end(link: socket.socket, deadline: float) -> None:
    """The thread that listens may take what is received; but both learn of the end."""
    poll = select.poll()
    with contextlib.suppress(OSError, ValueError):
        poll.register(link, select.POLLIN)
        while (left := deadline - time.monotonic()) > 0 and poll.poll(1000 * left):
            with contextlib.suppress(BlockingIOError):
                if not link.recv(65536, socket.MSG_DONTWAIT):
                    return


def _in_thread(function, *arguments) -> None:
    threading.Thread(target=function, args=arguments, name="lifeline", daemon=True).start()
